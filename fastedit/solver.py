"""The per-edit masked optimiser loop: B edits step together, each with its own loss, clip norm and stop."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastedit.deltas import StackedDelta
from fastedit.objectives import Losses
from fastedit.ops import adam_step_, workspace


@dataclass(frozen=True)
class SolverConfig:
    """Settings of the loop.

    Args:
        steps: most optimiser steps per edit.
        lr: learning rate.
        clip: largest Euclidean norm of one edit's gradient; None is off.
        weight_decay: decoupled, on the delta (the weights themselves are frozen).
        betas, eps: of Adam.
        radius: clamp every entry of the delta to [-radius, radius] after each step; None is off.
        stop_loss: an edit stops when its target NLL is below this and every target token is the argmax; None never
            stops.
    """

    steps: int = 20
    lr: float = 1e-3
    clip: float | None = 1.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    radius: float | None = None
    stop_loss: float | None = 0.02

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"solver: steps is not negative (got steps={self.steps!r})")
        if not self.lr > 0:
            raise ValueError(f"solver: lr is positive (got lr={self.lr!r})")
        for name in ("clip", "radius"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"solver: {name} is positive or None (got {name}={value!r})")


class Problem(Protocol):
    """What the loop asks of a batch of edits."""

    def losses(self, step: int) -> Losses:
        """Losses of all B edits at the current parameters; those of finished edits are ignored."""

    def keep(self, active: Tensor) -> None:
        """Only the edits in ``active`` (B,) bool are needed from now on."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """A timer for a part of the loop."""


@dataclass(frozen=True)
class FitOutcome:
    """How one edit's fit ended.

    Args:
        status: "converged" (stop rule met), "max_steps" or "diverged" (a loss was not finite; the parameters are those
            before that step).
        steps: optimiser steps taken.
        loss, nll: at the last evaluation before the end.
    """

    status: str
    steps: int
    loss: float
    nll: float


def fit(problem: Problem, stacked: StackedDelta, config: SolverConfig) -> list[FitOutcome]:
    """Fit all edits of a stack; edit b's parameters are bit-untouched from the moment it stops.

    Args:
        problem: gives per-edit losses.
        stacked: the deltas, changed in place.
        config: settings.
    Returns:
        One FitOutcome per edit.
    """
    size, device = stacked.size, stacked.flat.device
    with problem.phase("setup"):
        state = {
            "exp_avg": workspace(stacked.flat, stacked.flat.shape).zero_(),
            "exp_avg_sq": workspace(stacked.flat, stacked.flat.shape).zero_(),
            "step": torch.zeros(size, dtype=torch.long, device=device),
        }
    active = torch.ones(size, dtype=torch.bool, device=device)
    status = ["max_steps"] * size
    record = torch.full((size, 2), float("nan"), dtype=torch.float64, device=device)

    for step in range(config.steps):
        losses = problem.losses(step)
        total = losses.total.detach()
        record[active] = torch.stack([total, losses.nll], 1).double()[active]
        finite = torch.isfinite(total)
        done = losses.correct & (losses.nll < config.stop_loss) if config.stop_loss is not None else ~finite
        for index in torch.nonzero(active & (done | ~finite)).flatten().tolist():
            status[index] = "converged" if bool(finite[index]) else "diverged"
        still = active & finite & ~done
        shrunk = bool((still != active).any())
        active = still
        if not bool(active.any()):
            break
        stacked.begin_step()
        with problem.phase("backward"):
            losses.total[active].sum().backward()  # type: ignore[no-untyped-call]
            stacked.end_step()
        with problem.phase("optimiser"), torch.no_grad():
            adam_step_(
                stacked.flat,
                stacked.grad,
                state["exp_avg"],
                state["exp_avg_sq"],
                state["step"],
                config.lr,
                active,
                betas=config.betas,
                eps=config.eps,
                weight_decay=config.weight_decay,
                clip=config.clip,
                radius=config.radius,
            )
        if shrunk:
            problem.keep(active)
    taken, values = state["step"].tolist(), record.tolist()
    return [FitOutcome(status[b], int(taken[b]), values[b][0], values[b][1]) for b in range(size)]


def no_phase(_name: str) -> AbstractContextManager[None]:
    """A timer that measures nothing."""
    return nullcontext()
