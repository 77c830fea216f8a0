"""GRACE: keys and radii of edits, single and in sequence, on a random model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastedit
from fastedit import Query
from fastedit.backbone import EditableModel
from fastedit.deltas import split_point
from fastedit.methods.base import Resources
from fastedit.methods.grace import GRACE, LEAST, MOST, SHORT_OF, GRACEConfig, _radius, deep_layer
from tests.engine.conftest import make_edits

IN, OUT = [0, 1, 2], [3, 4]


@pytest.fixture(scope="module", params=["llava", "blip2", "qwen2vl"])
def model(request: pytest.FixtureRequest) -> EditableModel:
    return fastedit.load(f"random:{request.param}-tiny", dtype="float32")


def test_the_layer_at_three_quarters_of_the_depth() -> None:
    assert [deep_layer(None, layers, "x") for layers in (4, 28, 32)] == [2, 20, 23]
    assert deep_layer(-1, 4, "x") == 3
    with pytest.raises(ValueError, match=r"x: layers lie in 0 to 3 on this model \(got layers=\(4,\)\)"):
        deep_layer(4, 4, "x")


@pytest.mark.parametrize(("key", "value"), [("epsilon", 0.0), ("values", 0)])
def test_settings_that_cannot_be(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"grace: {key} is .* \(got {key}={value!r}\)"):
        GRACEConfig(**{key: value})


@pytest.mark.parametrize(
    ("distances", "radius"),
    [
        # without rows that must not change, the first radius
        ([0.0, 0.5], 1.0),
        # a third of the way from the furthest rephrase to the nearest of the others
        ([0.0, 0.6, 0.3, 2.0, 1.5], 0.9),
        # within bounds
        ([0.0, 0.1, 0.1, 9.0, 9.0], MOST),
        ([0.0, 0.1, 0.1, 1.0, 9.0], LEAST),
        # rephrases that lie further out are reached beyond that
        ([0.0, 1.6, 0.1, 9.0, 9.0], 2.0),
        # never as far as what must not change
        ([0.0, 0.5, 0.1, 0.5, 9.0], SHORT_OF * 0.5),
        ([0.0, 3.0, 0.1, 0.5, 9.0], SHORT_OF * 0.5),
    ],
)
def test_radii(distances: list[float], radius: float) -> None:
    roles = ([*IN, *OUT] if len(distances) > 2 else IN)[: len(distances)]
    assert float(_radius(1.0, torch.tensor(distances), roles)) == pytest.approx(radius)


def test_the_unit_of_radii_needs_a_pool(model: EditableModel) -> None:
    assert GRACE.setup(model, GRACEConfig(), Resources()) is None
    unit = GRACE.setup(model, GRACEConfig(), Resources(pool=make_edits(4)))
    assert unit is not None
    assert unit > 0


@pytest.mark.parametrize("method", ["grace", "kl+grace", "odedit+grace"])
def test_edits_hold_and_leave_text_questions_alone(model: EditableModel, method: str) -> None:
    edits = make_edits(4)
    run = fastedit.edit(model, edits, method, steps=60, show_progress=False)
    strict = run.scores["strict"]
    assert strict["reliability"].mean == 1.0
    assert strict["text_locality"].mean == 1.0
    place = f"{split_point(run.deltas[0].spec)[0]}.down:"
    for edit, delta in zip(edits, run.deltas, strict=True):
        encoded = model.encode([Query(edit.prompt, edit.image, edit.target)], answers=True)
        labels = int(encoded.label_mask.sum())
        assert float(delta.tensors[f"{place}length"]) == labels
        # beyond the target nothing was learned
        if not delta.spec.options["replace"]:
            assert not bool(delta.tensors[f"{place}value"][labels:].any())


def test_an_edit_is_the_same_in_any_batch(model: EditableModel) -> None:
    edits = make_edits(3)
    settings: dict[str, Any] = {"steps": 3, "stop_loss": None, "evaluate": False, "show_progress": False}
    together = fastedit.edit(model, edits, "grace", batch_size=3, **settings)
    alone = fastedit.edit(model, edits, "grace", batch_size=1, **settings)
    for one, other in zip(together.deltas, alone.deltas, strict=True):
        for name, tensor in one.tensors.items():
            torch.testing.assert_close(tensor, other.tensors[name], rtol=1e-3, atol=1e-4)


def test_a_sequence_keeps_every_edit(model: EditableModel) -> None:
    """All are stored side by side; each question finds its own."""
    run = fastedit.edit(model, make_edits(4), "grace", mode="sequential", steps=60, show_progress=False)
    assert run.scores["strict"]["reliability"].mean == 1.0


def test_targets_that_agree_have_one_label(model: EditableModel) -> None:
    edits = make_edits(4)
    run = fastedit.edit(model, edits, "grace", steps=1, evaluate=False, show_progress=False)
    labels = [next(t for name, t in delta.tensors.items() if name.endswith(":label")) for delta in run.deltas]
    assert edits[0].target == edits[3].target
    assert torch.equal(labels[0], labels[3])
    assert not torch.equal(labels[0], labels[1])


def test_applied_edits_answer_from_files(model: EditableModel, tmp_path: Any) -> None:
    edits = make_edits(3)
    run = fastedit.edit(model, edits, "grace", steps=60, evaluate=False, show_progress=False)
    run.save(tmp_path)
    loaded = fastedit.Run.load(tmp_path).deltas
    before = model.answer(edits[0].image, edits[0].prompt)
    with fastedit.applied(model, loaded):
        assert [model.answer(edit.image, edit.prompt) for edit in edits] == [edit.target for edit in edits]
    with fastedit.applied(model, loaded[1]):
        assert model.answer(edits[1].image, edits[1].prompt) == edits[1].target
    assert model.answer(edits[0].image, edits[0].prompt) == before
