"""Scope of an edit: what the heads see, how near questions are, and who may act."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastedit
from fastedit import Query
from fastedit.backbone import EditableModel, PackedState
from fastedit.backbone.packed_forward import packed_prefix, packed_start
from fastedit.routers.scope import (
    APART,
    ScopeFeatures,
    ScopeHeads,
    ScopeRouter,
    ScopeShape,
    scope_features,
    scope_loss,
    squared_distances,
    trained_part,
)
from tests.backbone.padded import prefix


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return fastedit.load("random:llava-tiny", dtype="float64")


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8))


QUESTIONS = [Query("What is it?", picture(0), "a cat"), Query("Who?", None, "me"), Query("Where?", picture(1), "here")]


def walked(model: EditableModel, answers: bool, layer: int = 1) -> tuple[Any, PackedState]:
    encoded = model.encode(QUESTIONS, answers=answers)
    return encoded, packed_prefix(model, packed_start(model, encoded), layer, "attention")


def features_of(model: EditableModel, answers: bool, *, segments: int = 2, layer: int = 0) -> ScopeFeatures:
    shape = ScopeShape(model.hidden_size, segments=segments, layer=layer)
    return scope_features(model, walked(model, answers)[1], shape)


@pytest.mark.parametrize("segments", [1, 3])
def test_features_are_means_of_text_and_image_tokens(model: EditableModel, segments: int) -> None:
    encoded = model.encode(QUESTIONS, answers=False)
    hidden = prefix(model, encoded, 1).hidden.float()
    found = features_of(model, False, segments=segments)
    for row in range(3):
        length = int(encoded.lengths[row])
        marks = encoded.image_mask[row, :length]
        own = hidden[row, :length]
        torch.testing.assert_close(found.text[row], torch.cat([own[~marks].mean(0), own[-1]]))
        image = own[marks]
        if not len(image):
            assert not found.image[row].any()
        else:
            numbers = torch.arange(len(image)) * segments // len(image)
            parts = [image[numbers == part].mean(0) for part in range(segments)]
            torch.testing.assert_close(found.image[row], torch.cat(parts))
    assert found.has_image.tolist() == [1, 0, 1]


def test_answers_behind_a_prompt_do_not_count(model: EditableModel) -> None:
    without, behind = (features_of(model, answers) for answers in (False, True))
    torch.testing.assert_close(without.text, behind.text)
    torch.testing.assert_close(without.image, behind.image)


def test_the_depth_is_fixed_wherever_the_state_comes_from(model: EditableModel) -> None:
    """A state before the layer is walked to it; one that is there, or behind it, is read as it is."""
    deep = ScopeShape(model.hidden_size, layer=2)
    early, there, behind = (scope_features(model, walked(model, True, layer)[1], deep) for layer in (0, 2, 3))
    torch.testing.assert_close(early.text, there.text)
    torch.testing.assert_close(early.image, there.image)
    assert not torch.allclose(there.text, behind.text)
    hidden = prefix(model, walked(model, True)[0], 2).hidden.float()
    last = int(walked(model, False)[0].lengths[1]) - 1
    torch.testing.assert_close(early.text[1, model.hidden_size :], hidden[1, last])


def test_features_select_and_join(model: EditableModel) -> None:
    found = features_of(model, False)
    again = ScopeFeatures.cat([found.select([2]), found.select([0, 1])]).select([1, 2, 0])
    assert torch.equal(again.text, found.text)
    assert torch.equal(again.image, found.image)
    assert torch.equal(again.has_image, found.has_image)
    assert found.n_bytes == 4 * sum(t.numel() for t in (found.text, found.image, found.has_image))


def random_features(rows: int, width: int = 6, segments: int = 2) -> ScopeFeatures:
    generator = torch.Generator().manual_seed(rows)
    text = torch.randn(rows, 2 * width, generator=generator) * 3 + 5
    image = torch.randn(rows, segments * width, generator=generator)
    has = (torch.arange(rows) % 3 > 0).float()
    return ScopeFeatures(text, image * has[:, None], has)


def test_an_edit_acts_where_text_and_image_are_near() -> None:
    heads = ScopeHeads(ScopeShape(6, size=4, hidden=8, segments=2)).eval()
    features = random_features(7)
    heads.standardise(features)
    places = heads(features)
    assert places.shape == (7, 9)
    text, image, mark = places.split([4, 4, 1], 1)
    assert not image[features.has_image == 0].any()
    assert mark[:, 0].tolist() == [APART * float(has) for has in features.has_image]
    whole = squared_distances(places, places)
    parts = sum(squared_distances(part, part) for part in (text, image, mark))
    torch.testing.assert_close(whole, parts)
    # With and without an image: far apart, whatever the rest says
    assert bool((torch.exp(-whole)[0, 1:3] < 1e-6).all())


def test_published_scope_sees_no_image() -> None:
    heads = ScopeHeads(ScopeShape(6, size=4, hidden=8, segments=2, sees_image=False)).eval()
    features = random_features(7)
    other = ScopeFeatures(features.text, torch.zeros_like(features.image), torch.zeros(7))
    assert torch.equal(heads(features), heads(other))
    assert heads(features).shape == (7, 4)


def test_features_are_standardised() -> None:
    heads = ScopeHeads(ScopeShape(6, size=4, hidden=8, segments=2))
    features = random_features(300)
    features.text[:, 0] = 7.0
    heads.standardise(features)
    moved = (features.text - heads.text_mean) * heads.text_scale
    torch.testing.assert_close(moved[:, 1:].std(0, unbiased=False), torch.ones(11), rtol=1e-4, atol=1e-4)
    # One that never moves stays where it is
    assert not moved[:, 0].any()
    shown = features.image[features.has_image > 0]
    torch.testing.assert_close(heads.image_mean, shown.mean(0))


def test_dropout_acts_in_training_only() -> None:
    heads = ScopeHeads(ScopeShape(6, size=4, hidden=64, segments=2, dropout=0.5))
    features = random_features(5)
    assert not torch.equal(heads.train()(features), heads.train()(features))
    assert torch.equal(heads.eval()(features), heads.eval()(features))


def test_loss_is_the_binary_cross_entropy_of_the_similarity() -> None:
    distance = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64, requires_grad=True)
    similarity = torch.exp(-distance)
    for inside in (True, False):
        marks = torch.full((3,), inside)
        expected = torch.nn.functional.binary_cross_entropy(similarity, marks.double(), reduction="none")
        torch.testing.assert_close(scope_loss(distance, marks), expected)
    # Identical questions of two edits must not break training
    same = torch.zeros(1, requires_grad=True)
    loss = scope_loss(same, torch.tensor([False])).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    assert bool(torch.isfinite(loss))
    assert bool(torch.isfinite(same.grad).all())  # type: ignore[union-attr]


def test_small_distances_survive() -> None:
    places = torch.full((2, 65), 100.0)
    places[1, 0] += 0.25
    assert squared_distances(places, places)[0].tolist() == [0.0, 0.0625]


class _Artifact:
    def __init__(self, heads: ScopeHeads) -> None:
        self.config, self.tensors = {"scope": heads.settings()}, heads.tensors()


def test_router_scores_own_and_all_edits_alike(model: EditableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = ScopeHeads(ScopeShape(model.hidden_size, size=4, hidden=8), seed=1).eval()
    monkeypatch.setitem(model.artifacts, "known", _Artifact(heads))
    _, state = walked(model, False)
    stored = heads(scope_features(model, state, heads.shape)).detach()
    spec = SimpleNamespace(options={"artifact": "known", "threshold": 0.7})
    router = ScopeRouter(model, SimpleNamespace(spec=spec, fixed={}, size=3, delta=None))  # type: ignore[arg-type]
    fixed = {"scope": stored}
    every = router.scores(state, fixed, None)
    assert every.shape == (3, 3)
    torch.testing.assert_close(every.diagonal(), torch.ones(3))
    assert float(every[0, 1]) < 1e-6
    own = torch.tensor([2, 1, 0])
    torch.testing.assert_close(router.scores(state, fixed, own), every[torch.arange(3), own])
    assert router.threshold(fixed).tolist() == pytest.approx([0.7] * 3)


def test_router_says_what_to_load(model: EditableModel) -> None:
    with pytest.raises(ValueError, match=r"load_artifact.*got artifact='missing'"):
        trained_part(model, {"artifact": "missing"})


@pytest.mark.parametrize("wrong", [{"size": 0}, {"segments": 0}, {"layer": -1}, {"dropout": 1.0}])
def test_shapes_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"scope: {next(iter(wrong))}"):
        ScopeShape(6, **wrong)
