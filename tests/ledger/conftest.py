"""A tiny random model, edits on it, and an empty ledger."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import fastedit
from fastedit import EditRequest, Ledger
from fastedit.backbone import EditableModel
from tests.engine.conftest import make_edits

FEW = {"steps": 4, "lr": 1e-2, "show_progress": False}


@pytest.fixture(scope="session")
def model() -> EditableModel:
    return fastedit.load("random:llava-tiny", dtype="float64")


@pytest.fixture(scope="session")
def edits() -> list[EditRequest]:
    return make_edits(6)


@pytest.fixture
def ledger(model: EditableModel, tmp_path: Path) -> Iterator[Ledger]:
    with fastedit.open_ledger(tmp_path / "edits", model) as opened:
        yield opened
