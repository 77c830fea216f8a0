"""What a low-rank change is fitted with."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastedit
from fastedit.backbone import EditableModel
from fastedit.methods.lora import LoRA, LoRAConfig
from tests.engine.conftest import make_edits


@pytest.fixture(scope="module")
def exact() -> EditableModel:
    return fastedit.load("random:llava-tiny", dtype="float64")


@pytest.mark.parametrize("lr", [None, 1e-3, 0.1])
def test_two_per_cent_of_the_factors_fade_at_a_step(exact: EditableModel, lr: float | None) -> None:
    solver = LoRA.solver(exact, LoRAConfig(lr=lr))
    assert solver.lr * solver.weight_decay == pytest.approx(0.02)


def test_what_no_gradient_asks_for_fades(exact: EditableModel) -> None:
    """At a rate that learns nothing the drawn factors are left, less two per cent a step."""
    given: dict[str, Any] = {"steps": 10, "lr": 1e-12, "stop_loss": None, "evaluate": False, "show_progress": False}
    plain = fastedit.edit(exact, make_edits(1), "lora", weight_decay=0.0, **given).deltas[0]
    faded = fastedit.edit(exact, make_edits(1), "lora", **given).deltas[0]
    drawn = [name for name in plain.tensors if name.endswith(":down")]
    assert drawn
    for name in drawn:
        assert float(plain.tensors[name].norm()) > 0.1
        torch.testing.assert_close(faded.tensors[name], 0.98**10 * plain.tensors[name], rtol=1e-6, atol=1e-9)


def test_no_decay_below_none(exact: EditableModel) -> None:
    with pytest.raises(ValueError, match=r"weight_decay is .*\(got weight_decay=-1"):
        fastedit.edit(exact, make_edits(1), "lora", weight_decay=-1.0)
