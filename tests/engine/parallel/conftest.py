"""A tiny random model and edits on it, made once in this process to compare with."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastedit
from fastedit import EditRequest
from fastedit.backbone import EditableModel
from fastedit.engine import Run
from tests.engine.conftest import make_edits

FEW: dict[str, Any] = {"method": "odedit+lora", "steps": 2, "lr": 1e-2, "batch_size": 2, "show_progress": False}


@pytest.fixture(scope="package")
def model() -> EditableModel:
    return fastedit.load("random:llava-tiny", dtype="float64")


@pytest.fixture(scope="package")
def edits() -> list[EditRequest]:
    return make_edits(5)


@pytest.fixture(scope="package")
def here(model: EditableModel, edits: list[EditRequest]) -> Run:
    """Made by one process."""
    return fastedit.edit(model, edits, **FEW)


def assert_same(run: Run, other: Run, numbers: list[int] | None = None) -> None:
    """Deltas equal to 1e-8 in float64, and equal scores; of the edits with these numbers in ``other``."""
    chosen = list(range(len(other.deltas))) if numbers is None else numbers
    assert [delta.request_id for delta in run.deltas] == [other.deltas[n].request_id for n in chosen]
    for place, number in enumerate(chosen):
        made, wanted = run.deltas[place], other.deltas[number]
        for name, tensor in wanted.tensors.items():
            torch.testing.assert_close(made.tensors[name], tensor, rtol=0, atol=1e-8)
        assert run.outcomes[place].status == other.outcomes[number].status
        assert run.outcomes[place].steps == other.outcomes[number].steps
        scored, expected = run.edit_scores[place], other.edit_scores[number]
        assert scored.answers == expected.answers
        for table, known in ((scored.legacy, expected.legacy), (scored.strict, expected.strict)):
            assert table == pytest.approx(known, abs=1e-8, nan_ok=True)
