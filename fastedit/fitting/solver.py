"""The per-edit optimiser loop: B edits step together, each with its own loss, clip norm and stop; others take over."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fastedit.deltas import StackedDelta
from fastedit.objectives import Losses
from fastedit.ops import adam_step_, adam_step_outer_, workspace


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
        if not math.isfinite(self.lr):
            raise ValueError(f"solver: lr is finite (got lr={self.lr!r})")
        for name in ("clip", "radius"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"solver: {name} is positive or None (got {name}={value!r})")


@dataclass(frozen=True)
class FitOutcome:
    """How one edit's fit ended.

    Args:
        status: "converged" (stop rule met), "max_steps", "diverging" (all steps were taken, and it goes nowhere: see
            below) or "diverged" (a loss or a gradient was not finite, the parameters are those before that step; or the
            last step left parameters that are not). Of methods that fit nothing: "computed".
        steps: optimiser steps taken.
        loss, nll: at the last evaluation before the end, which a last step of "max_steps" and "diverging" comes after.
        first_nll, best_nll: at the first evaluation, and the smallest of all.

    A fit is diverging whose target is not said at the last evaluation (its tokens are not the argmax) and whose NLL
    lies above that of the first or far above the best; or whose parameters are beyond anything that a model's numbers
    are (``LARGE``), whatever its NLL: one of a logarithm of the vocabulary's size says nothing, and may be less than
    the first; or which has moved and has no gradient any more. Totals do not count: a multiplier may let them grow.
    """

    status: str
    steps: int
    loss: float
    nll: float
    first_nll: float = math.nan
    best_nll: float = math.nan


#: How far above the first NLL the last one lies where a fit is called diverging, as a share of it and in nats; how far
#: above the best, in nats; and the largest absolute value of a parameter.
WORSE, LOST, LARGE = (0.01, 1e-3), 1.0, 1e5


@dataclass
class _Course:
    """The losses of one slot so far."""

    loss: float = math.nan
    nll: float = math.nan
    first_nll: float = math.nan
    best_nll: float = math.nan
    correct: bool = False

    def note(self, loss: float, nll: float, correct: bool) -> None:
        """One more evaluation."""
        self.loss, self.nll, self.correct = loss, nll, correct
        self.first_nll = nll if math.isnan(self.first_nll) else self.first_nll
        self.best_nll = nll if math.isnan(self.best_nll) else min(self.best_nll, nll)

    def is_diverging(self, largest: float, gradient: float) -> bool:
        """Whether it goes nowhere, with parameters as large and a last gradient as long as that."""
        share, least = WORSE
        worse = self.nll > self.first_nll * (1 + share) + least or self.nll > self.best_nll + LOST
        stuck = gradient == 0 and self.nll != self.first_nll
        return not self.correct and (worse or stuck or largest > LARGE)


class Problem(Protocol):
    """What the loop asks of the edits: B slots, each with one edit in it or free."""

    def losses(self, steps: Tensor) -> Losses:
        """Losses (B,) at the current parameters; ``steps`` (B,) int64 on the CPU: taken so far. Free ones: anything."""

    def ended(self, outcomes: Mapping[int, FitOutcome]) -> None:
        """The edits in these slots have ended; their parameters stay untouched until the slot is filled again."""

    def refill(self, free: Sequence[int], *, idle: bool) -> Sequence[int]:
        """Put waiting edits into free slots, where any wait and it is worth while; which. ``idle``: all are free."""

    def started(self, slots: Sequence[int]) -> None:
        """The deltas of these slots are fresh; whatever they should start from is to be written now."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """A timer for a part of the loop."""


def fit(problem: Problem, stacked: StackedDelta, config: SolverConfig) -> None:
    """Fit edits until none waits; an edit's parameters are bit-untouched from the moment it ends.

    An edit that ends frees its slot in the stack, and a waiting one enters there with steps, moments and parameters of
    its own. Nothing is reduced over slots, so an edit comes out the same whatever shares its steps.

    Args:
        problem: gives edits and per-edit losses, takes outcomes.
        stacked: the deltas, changed in place.
        config: settings.
    """
    loop = _Slots(stacked, config, problem)
    while loop.fill(problem):
        losses = problem.losses(torch.tensor(loop.taken))
        active = loop.check(problem, losses)
        if active is None:
            continue
        stacked.begin_step(outer=True)
        with problem.phase("backward"):
            # Not indexed: a GPU need not be waited for. Losses of other slots may be anything.
            torch.where(active, losses.total, 0.0).sum().backward()  # type: ignore[no-untyped-call]
            stacked.end_step()
        with problem.phase("optimiser"), torch.no_grad():
            loop.step(active)
        loop.count(problem)


class _Slots:
    """The optimiser's state of every slot, and who is where."""

    def __init__(self, stacked: StackedDelta, config: SolverConfig, problem: Problem) -> None:
        self.stacked, self.config = stacked, config
        self.active = [False] * stacked.size
        self.taken = [0] * stacked.size
        self.courses = [_Course() for _ in range(stacked.size)]
        self._mask: Tensor | None = None
        with problem.phase("setup"):
            self.first = workspace(stacked.flat, stacked.flat.shape).zero_()
            self.second = workspace(stacked.flat, stacked.flat.shape).zero_()
            self.steps = torch.zeros(stacked.size, dtype=torch.long, device=stacked.flat.device)
            #: Places whose last gradient was not finite, and which made no step for it.
            self.broken = torch.zeros(stacked.size, dtype=torch.bool, device=stacked.flat.device)
            self.norms = stacked.flat.new_zeros(stacked.size)

    def fill(self, problem: Problem) -> bool:
        """Let waiting edits enter; whether there is anything to do."""
        free = [slot for slot, busy in enumerate(self.active) if not busy]
        while free:
            filled = problem.refill(free, idle=not any(self.active))
            if not filled:
                break
            with problem.phase("setup"):
                self._restart(filled)
                problem.started(filled)
            if self.config.steps > 0:
                break
            problem.ended({slot: FitOutcome("max_steps", 0, math.nan, math.nan) for slot in filled})
        return any(self.active)

    def _restart(self, slots: Sequence[int]) -> None:
        self.stacked.restart(slots)
        for slot in slots:
            self.first[slot].zero_()
            self.second[slot].zero_()
            self.steps[slot] = 0
            self.taken[slot] = 0
            self.courses[slot] = _Course()
            self.active[slot] = self.config.steps > 0
        self.broken[list(slots)] = False
        self._mask = None

    @property
    def mask(self) -> Tensor:
        """(B,) bool, the slots at work."""
        if self._mask is None:
            self._mask = torch.tensor(self.active, device=self.steps.device)
        return self._mask

    def check(self, problem: Problem, losses: Losses) -> Tensor | None:
        """Take out the edits that are done or broken; return the slots (B,) bool that make a step, None for none."""
        total, stop = losses.total.detach(), self.config.stop_loss
        done = torch.zeros_like(losses.correct) if stop is None else losses.correct & (losses.nll < stop)
        # The one value of a step that the host reads
        columns = (total, losses.nll, losses.correct, done, self.broken)
        table = torch.stack([column.double() for column in columns], 1).tolist()
        ended: dict[int, FitOutcome] = {}
        for slot, (value, nll, is_correct, is_done, is_broken) in enumerate(table):
            if not self.active[slot]:
                continue
            if is_broken:
                ended[slot] = self._broke(slot)
                continue
            self.courses[slot].note(value, nll, bool(is_correct))
            if not (math.isfinite(value) and math.isfinite(nll)):
                ended[slot] = self._outcome(slot, "diverged")
            elif is_done:
                ended[slot] = self._outcome(slot, "converged")
        self._end(problem, ended)
        return self.mask if any(self.active) else None

    def step(self, active: Tensor) -> None:
        """One AdamW step of the slots at work; none where the gradient is not finite."""
        config, flat, factored = self.config, self.stacked.flat, self.stacked.factored()
        settings: dict[str, Any] = {"betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
        settings |= {"clip": config.clip, "radius": config.radius}
        if factored is not None:
            params, first, second = (factored.matrices(rows) for rows in (flat, self.first, self.second))
            inputs, grads, offsets = factored.inputs, factored.grads, factored.offsets
            self.norms = adam_step_outer_(
                params, inputs, grads, offsets, first, second, self.steps, config.lr, active, **settings
            )
            self.broken = active & ~self.norms.isfinite()
            return
        # The sum of a row tells it, in one pass that waits for nothing
        finite = self.stacked.grad.sum(1).isfinite()
        self.broken, stepping = active & ~finite, active & finite
        self.norms = adam_step_(
            flat, self.stacked.grad, self.first, self.second, self.steps, config.lr, stepping, **settings
        )

    def count(self, problem: Problem) -> None:
        """One more step was taken; take out the edits that have had all theirs."""
        self.taken = [taken + int(busy) for taken, busy in zip(self.taken, self.active, strict=True)]
        full = [p for p, busy in enumerate(self.active) if busy and self.taken[p] >= self.config.steps]
        if full:
            broken, norms = self.broken.tolist(), self.norms.tolist()
            self._end(problem, {p: self._broke(p) if broken[p] else self._full(p, norms[p]) for p in full})

    def _full(self, slot: int, gradient: float) -> FitOutcome:
        """How an edit ended that has had all its steps."""
        largest = float(torch.linalg.vector_norm(self.stacked.flat[slot], math.inf))
        if not math.isfinite(largest):
            return self._outcome(slot, "diverged")
        diverging = self.courses[slot].is_diverging(largest, gradient)
        return self._outcome(slot, "diverging" if diverging else "max_steps")

    def _broke(self, slot: int) -> FitOutcome:
        """How an edit ended whose last step was not made."""
        self.taken[slot] -= 1
        return self._outcome(slot, "diverged")

    def _outcome(self, slot: int, status: str) -> FitOutcome:
        course = self.courses[slot]
        return FitOutcome(status, self.taken[slot], course.loss, course.nll, course.first_nll, course.best_nll)

    def _end(self, problem: Problem, ended: Mapping[int, FitOutcome]) -> None:
        if not ended:
            return
        for slot in ended:
            self.active[slot] = False
        self._mask = None
        problem.ended(ended)


def no_phase(_name: str) -> AbstractContextManager[None]:
    """A timer that measures nothing."""
    return nullcontext()
