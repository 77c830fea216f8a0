"""Tokens of prompts: whose they are, what is left out; the pool over them."""

from __future__ import annotations

import pytest
import torch

import fastedit
from fastedit import Query
from fastedit.backbone import EditableModel
from fastedit.backbone.packed_forward import packed_prefix, packed_start
from fastedit.routers.features import AttentionPool, PromptTokens, prompt_tokens
from tests.backbone.padded import prefix
from tests.engine.conftest import picture

QUERIES = [
    Query("what colour is it ?", picture(1), "seven red"),
    Query("who ?", None, "nobody at all"),
    Query("where is the large one in here ?", picture(2), "left"),
]
POINTS = [(0, "attention"), (0, "ffn"), (1, "attention")]


@pytest.fixture(scope="module", params=["random:llava-tiny", "random:blip2-tiny", "random:qwen2vl-tiny"])
def model(request: pytest.FixtureRequest) -> EditableModel:
    return fastedit.load(request.param, dtype="float64")


@pytest.mark.parametrize("point", POINTS, ids=str)
def test_the_tokens_of_prompts_are_theirs(model: EditableModel, point: tuple[int, str]) -> None:
    encoded = model.encode(QUERIES, answers=False)
    padded = prefix(model, encoded, *point)
    found = prompt_tokens(packed_prefix(model, packed_start(model, encoded), *point))
    for row in range(len(QUERIES)):
        length = int(encoded.lengths[row])
        image = encoded.image_mask[row, :length]
        hidden = padded.hidden[row, :length]
        assert int(found.text_count[row]) == int((~image).sum())
        assert int(found.image_count[row]) == int(image.sum())
        torch.testing.assert_close(found.text[row, : int((~image).sum())], hidden[~image], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.image[row, : int(image.sum())], hidden[image], rtol=1e-9, atol=1e-9)
        assert not bool(found.text[row, int((~image).sum()) :].any())


@pytest.mark.parametrize("point", POINTS, ids=str)
def test_answers_behind_a_prompt_are_left_out(model: EditableModel, point: tuple[int, str]) -> None:
    with_answers = packed_prefix(model, packed_start(model, model.encode(QUERIES, answers=True)), *point)
    without = packed_prefix(model, packed_start(model, model.encode(QUERIES, answers=False)), *point)
    ours, theirs = prompt_tokens(with_answers), prompt_tokens(without)
    assert torch.equal(ours.text_count, theirs.text_count)
    torch.testing.assert_close(ours.text, theirs.text, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.image, theirs.image, rtol=1e-9, atol=1e-9)


def test_prompts_taken_apart_and_put_together(model: EditableModel) -> None:
    found = prompt_tokens(packed_start(model, model.encode(QUERIES, answers=False)))
    again = PromptTokens.cat(found.split())
    assert torch.equal(again.text, found.text)
    assert torch.equal(again.image, found.image)
    assert torch.equal(again.text_count, found.text_count)
    assert torch.equal(again.image_count, found.image_count)
    alone = PromptTokens.cat(found.split()[1:2])
    assert alone.image.shape[1] == 0
    assert alone.n_bytes == alone.text.numel() * 8


def test_the_centre_of_an_image_is_its_own(model: EditableModel) -> None:
    found = prompt_tokens(packed_start(model, model.encode(QUERIES, answers=False)))
    centre = found.centre()
    for row in (0, 2):
        mean = found.image[row, : int(found.image_count[row])].float().mean(0)
        torch.testing.assert_close(centre[row], mean / mean.norm())
    assert not bool(centre[1].any())


def test_the_pool_sees_the_tokens_that_there_are_and_no_others() -> None:
    make = torch.Generator().manual_seed(0)
    pool = AttentionPool(6, 3, 4, 5, make)
    tokens = torch.randn(2, 7, 6, generator=make)
    count = torch.tensor([4, 7])
    found = pool(tokens, count)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))
    tokens[0, 4:] = 1e4
    assert torch.equal(pool(tokens, count), found)
    torch.testing.assert_close(pool(tokens[:1, :4], count[:1])[0], found[0])
    shuffled = tokens[:, torch.tensor([2, 0, 3, 1, 4, 5, 6])]
    torch.testing.assert_close(pool(shuffled, count), found)
    tokens[1, 6] = 3.0
    assert not torch.allclose(pool(tokens, count)[1], found[1])


def test_rows_without_tokens_give_finite_gradients() -> None:
    pool = AttentionPool(6, 3, 4, 5, torch.Generator().manual_seed(0))
    for width in (0, 2):
        found = pool(torch.zeros(2, width, 6), torch.tensor([0, min(1, width)]))
        assert found.shape == (2, 5)
        assert torch.isfinite(found).all()
        if width:
            found.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in pool.parameters() if p.grad is not None)
