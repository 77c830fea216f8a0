"""Two edits of an embedded model, in sequence."""

from __future__ import annotations

import pytest

import fastedit
from fastedit import EditRequest
from fastedit.backbone import EditableModel
from fastedit.deltas import EditDelta


@pytest.fixture(scope="module")
def edits() -> list[EditRequest]:
    return list(fastedit.read_edits("pocket-vqa", split="eval")[:2])


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return fastedit.load("pocket-llava")


@pytest.fixture(scope="module")
def deltas(model: EditableModel, edits: list[EditRequest]) -> list[EditDelta]:
    run = fastedit.edit(model, edits, "lora", mode="sequential", evaluate=False, show_progress=False)
    return list(run.deltas)
