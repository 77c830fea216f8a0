"""Rows that begin alike: what they share is walked once, and every row comes out as by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastedit.backbone import EditableModel, Encoded, PackedState, load
from fastedit.backbone import branches as module
from fastedit.backbone.branches import branched, branches, shared_start
from fastedit.backbone.packed_forward import packed_prefix, packed_start, packed_tail
from fastedit.requests import Query

FAMILIES = ("random:blip2-tiny", "random:qwen2vl-tiny", "random:qwen3vl-tiny", "random:llava-tiny")


@pytest.fixture(autouse=True)
def _worth_while(monkeypatch: pytest.MonkeyPatch) -> None:
    # Images of tiny models are a few tokens
    monkeypatch.setattr(module, "FEWEST", 2)


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8))


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> EditableModel:
    return load(request.param, dtype="float64")


def questions(model: EditableModel) -> Encoded:
    """An edit, another wording about its image, its wording about another image, and the edit's wording once more."""
    asked = [("what is red", 0), ("look and say what is red", 0), ("what is red", 1), ("what is red", 0)]
    return model.encode([Query(prompt, picture(seed), "two cups") for prompt, seed in asked], answers=True)


def test_rows_share_one_image_and_words_up_to_the_end_of_a_prompt(model: EditableModel) -> None:
    encoded = questions(model)
    shared = shared_start(encoded, 1, 0)
    assert shared >= int(encoded.image_mask[0].nonzero().max()) + 1
    assert torch.equal(encoded.input_ids[0, :shared], encoded.input_ids[1, :shared])
    assert encoded.input_ids[0, shared] != encoded.input_ids[1, shared]
    # The last token of a prompt carries the first label
    assert shared_start(encoded, 3, 0) == int(encoded.last_prompt[0])
    before = int(encoded.image_mask[0].nonzero().min())
    assert shared_start(encoded, 2, 0) == (before if before >= 2 else 0)
    assert branches(encoded, [0, 0, 2, 0]) == {1: (1, shared), 3: (3, int(encoded.last_prompt[0]))}


def test_a_text_shares_nothing_worth_while_with_a_question_about_an_image(
    model: EditableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FEWEST", 16)
    encoded = model.encode([Query("what is red", picture(0), "cups"), Query("what is red", None, "cups")], answers=True)
    assert shared_start(encoded, 1, 0) == 0


def ends(model: EditableModel, state: PackedState, layer: int, stage: str) -> tuple[Tensor, Tensor]:
    """Final states of wanted tokens, and the gradient of a weight that both walks reach."""
    state = packed_prefix(model, state, layer, stage)
    weight = model.module(model.sites([layer], ["down"])[0]).weight
    weight.requires_grad_(True)
    try:
        hidden = packed_tail(model, state)
        (grad,) = torch.autograd.grad((hidden * torch.arange(hidden.numel()).view_as(hidden).sin()).sum(), weight)
    finally:
        weight.requires_grad_(False)
    return hidden.detach(), grad


@pytest.mark.parametrize(("layer", "stage"), [(0, "attention"), (1, "attention"), (1, "ffn"), (-1, "ffn")])
def test_every_row_comes_out_as_by_itself(model: EditableModel, layer: int, stage: str) -> None:
    encoded = questions(model)
    whole = packed_start(model, encoded)
    less = branched(whole, branches(encoded, [0, 0, 2, 0]))
    assert less.counts[0] == whole.counts[0]
    assert sum(less.counts) < sum(whole.counts)
    assert less.wanted_counts == whole.wanted_counts
    expected, found = (ends(model, state, layer % model.n_layers, stage) for state in (whole, less))
    assert torch.allclose(found[0], expected[0], rtol=0, atol=1e-12)
    # Norms may compute in float32
    assert torch.allclose(found[1], expected[1], rtol=1e-6, atol=1e-6)


def test_rows_are_taken_apart_and_put_together_again(model: EditableModel) -> None:
    encoded = questions(model)
    less = branched(packed_start(model, encoded), branches(encoded, [0, 0, 2, 0]))
    rows = [less.of_row(row) for row in range(4)]
    again = PackedState.cat([PackedState.cat(rows[:2]), PackedState.cat(rows[2:3]), rows[0], rows[3]])
    assert again.back == (0, 1, 0, 0, 3)
    with pytest.raises(ValueError, match=r"a row comes behind the one that it branches off \(got row=0, back=1\)"):
        packed_tail(model, rows[1])


def test_rows_that_share_nothing_are_as_they_are(model: EditableModel) -> None:
    state = packed_start(model, questions(model))
    assert branched(state, {}) is state
