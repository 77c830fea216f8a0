"""The masked loop against torch's own optimiser, one edit at a time."""

from __future__ import annotations

from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor

from fastedit.backbone import Site
from fastedit.deltas import DeltaSpec, Rows
from fastedit.deltas.base import new_stack
from fastedit.objectives import Losses
from fastedit.solver import SolverConfig, fit, no_phase


class Regression:
    """Per-edit least squares with known data: edit b fits ``x_b W_b = y_b``."""

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(size, 6, 4, generator=generator, dtype=torch.float64)
        self.y = torch.randn(size, 6, 3, generator=generator, dtype=torch.float64)
        self.stacked = new_stack(DeltaSpec("full", (Site(0, "up", "up", 4, 3),)), size, dtype=torch.float64)
        self.kept: list[list[bool]] = []

    def losses(self, step: int) -> Losses:
        size = self.stacked.size
        out = self.stacked.delta(0, self.x.view(-1, 4), Rows((6,) * size)).view(size, 6, 3)
        total = (out - self.y).square().mean((1, 2))
        return Losses(total, total.detach(), torch.ones(size, dtype=torch.bool))

    def keep(self, active: Tensor) -> None:
        self.kept.append(active.tolist())

    def phase(self, name: str) -> AbstractContextManager[None]:
        return no_phase(name)


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_equals_torch_adamw_on_each_edit(clip: float | None, decay: float) -> None:
    problem = Regression(3)
    config = SolverConfig(steps=25, lr=0.03, clip=clip, weight_decay=decay, stop_loss=None)
    outcomes = fit(problem, problem.stacked, config)
    assert [o.steps for o in outcomes] == [25] * 3
    for b in range(3):
        weight = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.AdamW([weight], lr=0.03, weight_decay=decay)
        for _ in range(25):
            optimiser.zero_grad()
            (problem.x[b] @ weight.T - problem.y[b]).square().mean().backward()  # type: ignore[no-untyped-call]
            if clip is not None:
                torch.nn.utils.clip_grad_norm_([weight], clip)
            optimiser.step()
        torch.testing.assert_close(problem.stacked.parts["0.up:delta"][b], weight.detach(), atol=1e-12, rtol=1e-10)


def test_a_stopped_edit_keeps_every_bit_while_others_go_on() -> None:
    problem = Regression(3)
    problem.y[1] *= 0.01
    config = SolverConfig(steps=40, lr=0.03, clip=None, stop_loss=2e-2)
    snapshots: list[Tensor] = []
    original = problem.losses

    def watching(step: int) -> Losses:
        snapshots.append(problem.stacked.flat[1].clone())
        return original(step)

    problem.losses = watching  # type: ignore[method-assign]
    outcomes = fit(problem, problem.stacked, config)
    assert outcomes[1].status == "converged"
    assert outcomes[1].steps < outcomes[0].steps == 40
    assert all(torch.equal(s, problem.stacked.flat[1]) for s in snapshots[outcomes[1].steps :])
    assert problem.kept[0] == [True, False, True]


def test_radius_keeps_the_delta_in_its_ball() -> None:
    problem = Regression(2)
    fit(problem, problem.stacked, SolverConfig(steps=30, lr=0.1, clip=None, radius=0.05, stop_loss=None))
    assert problem.stacked.flat.abs().max() == pytest.approx(0.05)


@pytest.mark.parametrize(("field", "value"), [("steps", -1), ("lr", 0.0), ("clip", 0.0), ("radius", -1.0)])
def test_bad_settings_are_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"solver: {field} .*\(got {field}="):
        SolverConfig(**{field: value})  # type: ignore[arg-type]
