"""Tiny models and made-up edits for the harness."""

from __future__ import annotations

import pytest

from benchmarks.cases import Case, made_up_edits
from fastedit.backbone import EditableModel, load
from fastedit.requests import EditRequest


@pytest.fixture(scope="session")
def exact() -> EditableModel:
    """A tiny model in float64."""
    return load("random:qwen2vl-tiny", dtype="float64")


@pytest.fixture(scope="session")
def two_edits() -> list[EditRequest]:
    return made_up_edits(2, seed=3)


@pytest.fixture
def tiny() -> Case:
    """A case that takes a moment."""
    return Case("tiny", "random:qwen2vl-tiny", steps=3, edits=2, batch_size=2, repeats=2)
