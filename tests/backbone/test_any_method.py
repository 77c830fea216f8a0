"""Methods that write, route or are trained, on models that are walked by tracing."""

from __future__ import annotations

import pytest
import torch

import fastedit
from fastedit.backbone import weights_hash
from tests.engine.conftest import make_edits
from tests.test_conformance import logits, run

from .test_architectures import editable

METHODS = ("tpatcher", "grace", "wise", "unike", "ldke", "serac", "mend", "ke")


@pytest.mark.parametrize("key", ["gemma3", "qwen3_vl"])
@pytest.mark.parametrize("name", METHODS)
def test_an_edit_acts_and_leaves_the_base_alone(key: str, name: str) -> None:
    model, edits = editable(key), make_edits(2)
    weights, before = weights_hash(model.hf), logits(model, edits)
    deltas = run(model, edits, name).deltas
    assert weights_hash(model.hf) == weights
    assert torch.equal(logits(model, edits), before)
    with fastedit.applied(model, deltas[0]):
        after = logits(model, edits)
    assert torch.isfinite(after).all()
    assert not torch.equal(after[0], before[0]), "the edit's own question"
    assert torch.equal(logits(model, edits), before)
    assert weights_hash(model.hf) == weights
    assert model.holders == []
