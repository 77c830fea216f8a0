"""Tiny models and made-up edits for the harness."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.cases import Case, made_up_edits
from benchmarks.gate import full_norms
from fastedit.backbone import EditableModel, load
from fastedit.requests import EditRequest


@pytest.fixture(scope="session")
def exact() -> Iterator[EditableModel]:
    """A tiny model in float64, its norms too."""
    model = load("random:qwen2vl-tiny", dtype="float64")
    with full_norms(model):
        yield model


@pytest.fixture(scope="session")
def two_edits() -> list[EditRequest]:
    return made_up_edits(2, seed=3)


@pytest.fixture
def tiny() -> Case:
    """A case that takes a moment."""
    return Case("tiny", "random:qwen2vl-tiny", steps=3, edits=2, batch_size=2, repeats=2)
