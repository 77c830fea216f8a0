"""Fine-tuning on the language and on the vision side."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastedit
from fastedit.backbone import EditableModel
from fastedit.methods.ft import FTVision, FTVisionConfig
from tests.engine.conftest import make_edits

QUICK: dict[str, Any] = {"steps": 3, "stop_loss": None, "evaluate": False, "show_progress": False}


@pytest.fixture(scope="module", params=["llava", "blip2", "qwen2vl"])
def exact(request: pytest.FixtureRequest) -> EditableModel:
    return fastedit.load(f"random:{request.param}-tiny", dtype="float64")


@pytest.mark.parametrize("method", ["ft-vision", "odedit+ft-vision"])
def test_an_edit_of_the_vision_side_is_the_same_in_any_batch(exact: EditableModel, method: str) -> None:
    edits = make_edits(4)
    together = fastedit.edit(exact, edits, method, batch_size=4, **QUICK)
    alone = fastedit.edit(exact, edits, method, batch_size=1, **QUICK)
    for one, other in zip(together.deltas, alone.deltas, strict=True):
        for name, tensor in one.tensors.items():
            torch.testing.assert_close(tensor, other.tensors[name], rtol=1e-6, atol=1e-9)
            assert bool(tensor.any())


def test_a_vision_edit_leaves_text_questions_alone_to_the_bit(exact: EditableModel) -> None:
    run = fastedit.edit(exact, make_edits(3), "ft-vision", steps=20, show_progress=False)
    strict = run.scores["strict"]
    assert strict["text_locality"].mean == 1.0
    assert strict["text_locality_kl"].mean == 0.0
    assert strict["blind"].mean == 1.0
    # and others not: an image is read through what was changed
    assert strict["near_kl"].mean > 0.0


def test_without_steps_nothing_changes(exact: EditableModel) -> None:
    strict = fastedit.edit(exact, make_edits(2), "ft-vision", steps=0, show_progress=False).scores["strict"]
    assert all(strict[f"{name}_kl"].mean == 0.0 for name in ("text_locality", "image_locality", "near", "same"))


def test_vision_edits_add_up_in_sequence(exact: EditableModel) -> None:
    """The last edit is fitted on top of the others, and all act when they are scored."""
    edits = make_edits(2)
    run = fastedit.edit(exact, edits, "ft-vision", mode="sequential", steps=60, lr=0.005, show_progress=False)
    with fastedit.applied(exact, run.deltas):
        assert (
            exact.answer(edits[1].image, edits[1].prompt, max_new_tokens=48) == run.edit_scores[1].answers[0]["after"]
        )
    total = sum(delta.n_parameters for delta in run.deltas)
    assert total == 2 * sum(site.d_in * site.d_out for site in FTVision.spec(exact, FTVisionConfig()).sites)


def test_some_maps_of_the_vision_side(exact: EditableModel) -> None:
    name = FTVision.spec(exact, FTVisionConfig()).sites[-1].name
    run = fastedit.edit(exact, make_edits(1), "ft-vision", names=(name,), views="record", **QUICK)
    assert list(run.deltas[0].tensors) == [f"-1.{name}:delta"]


def test_a_vision_edit_is_saved_and_applied(exact: EditableModel, tmp_path: Any) -> None:
    edits = make_edits(1)
    run = fastedit.edit(exact, edits, "ft-vision", views="record", steps=60, lr=0.005, show_progress=False)
    run.save(tmp_path)
    before = exact.answer(edits[0].image, edits[0].prompt)
    with fastedit.applied(exact, fastedit.Run.load(tmp_path).deltas[0]):
        edited = exact.answer(edits[0].image, edits[0].prompt, max_new_tokens=48)
    assert edited == run.edit_scores[0].answers[0]["after"]
    assert exact.answer(edits[0].image, edits[0].prompt) == before


def test_a_plan_and_a_peak_are_no_obstacle(exact: EditableModel) -> None:
    plan = fastedit.plan_memory(exact, method="ft-vision", edits=make_edits(2), batch_size=2)
    assert plan.total_bytes > 0
    peak = fastedit.measure_peak(seconds=0.05, scale=0.05)
    run = fastedit.edit(exact, make_edits(2), "ft-vision", peak=peak, **QUICK)
    assert run.timing.nfu is None
