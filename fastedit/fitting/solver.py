"""The per-edit optimiser loop: B edits step together, each with its own loss, clip norm and stop; others take over."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fastedit.deltas import StackedDelta
from fastedit.deltas.rows import slices_of
from fastedit.fitting import capture
from fastedit.objectives import Losses
from fastedit.ops import adam_step_, adam_step_outer_, workspace
from fastedit.settings import check_ranges


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
        check_every: the host asks every so many steps which edits have ended. A GPU need not be waited for in
            between. An edit's parameters and numbers are those of the step at which it ended, whatever this is; the
            steps until that is seen are computed and not made.
        capture: record a step as a CUDA graph once some were made, and replay it until edits enter or leave. It pays
            with ``check_every`` above 1, and takes the memory of a step once more. Off, as no GPU has run it yet; where
            there is no NVIDIA GPU it is refused.
    """

    steps: int = 20
    lr: float = 1e-3
    clip: float | None = 1.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    radius: float | None = None
    stop_loss: float | None = 0.02
    check_every: int = 1
    capture: bool = False

    def __post_init__(self) -> None:
        positive = ("lr", "clip", "radius")
        check_ranges("solver", self, at_least={"check_every": 1}, positive=positive, not_negative=("steps",))
        if not math.isfinite(self.lr):
            raise ValueError(f"solver: lr is finite (got lr={self.lr!r})")


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

    def next_step(self) -> tuple[Hashable, Hashable]:
        """Called before each step, ``losses`` where it is no replay: arrangement and branch (``StepCapture.run``)."""

    def losses(self, steps: Tensor) -> Losses:
        """Losses (B,) at the current parameters; ``steps`` (B,) int64: taken so far. Free ones: anything."""

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
    recorder = capture.recorder_for(stacked.flat.device) if config.capture else None
    recorded = None if recorder is None else capture.StepCapture(recorder, problem.phase)
    loop = _Slots(stacked, config, problem)

    def step() -> Tensor:
        losses = problem.losses(loop.steps)
        table = loop.judge(losses)
        loop.step(problem, losses)
        return table

    while loop.fill(problem):
        arrangement, branch = problem.next_step()
        if recorded is not None:
            # The device leaves those alone that end here, so the host may look behind the step; a replay writes there
            if loop.note(problem, recorded.run(step, arrangement, branch).clone()):
                loop.count(problem)
            continue
        losses = problem.losses(loop.steps)
        if loop.note(problem, loop.judge(losses)):
            loop.step(problem, losses)
            loop.count(problem)


class _Slots:
    """The optimiser's state of every slot, and who is where.

    The device knows which slots make a step (``running``) and leaves those alone that have ended, from that very step
    on. What it saw is kept in a log, which the host reads now and then to learn who has ended, and how.
    """

    def __init__(self, stacked: StackedDelta, config: SolverConfig, problem: Problem) -> None:
        self.stacked, self.config = stacked, config
        #: As the host knows them: an edit that has ended is active until the log is read.
        self.active = [False] * stacked.size
        self.taken = [0] * stacked.size
        self.courses = [_Course() for _ in range(stacked.size)]
        self._log: list[tuple[Tensor, dict[int, int]]] = []
        with problem.phase("setup"):
            flat = stacked.flat
            self.first = workspace(flat, flat.shape).zero_()
            self.second = workspace(flat, flat.shape).zero_()
            #: (B,) steps made, int64; slots that make one, bool; gradient norms of the last one.
            self.steps = torch.zeros(stacked.size, dtype=torch.long, device=flat.device)
            self.running = torch.zeros(stacked.size, dtype=torch.bool, device=flat.device)
            self.norms = flat.new_zeros(stacked.size)
            self._never = torch.zeros_like(self.running)
            self._rates = torch.full((stacked.size,), config.lr, dtype=torch.float64, device=flat.device)

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
        for span in slices_of(slots):
            for state in (self.first, self.second, self.steps, self.norms):
                state[span].zero_()
            self.running[span] = self.config.steps > 0
        for slot in slots:
            self.taken[slot] = 0
            self.courses[slot] = _Course()
            self.active[slot] = self.config.steps > 0

    def judge(self, losses: Losses) -> Tensor:
        """Stop the slots that are done or broken, on the device; what the host may learn of it (5, B)."""
        total, nll, stop = losses.total.detach(), losses.nll, self.config.stop_loss
        done = self._never if stop is None else losses.correct & (nll < stop)
        # The norm is that of the step before, which was not made where it is not finite
        table = torch.stack([total, nll, self.norms, losses.correct, done])
        # A number that is not finite less itself is none; of booleans, > is "and not"
        self.running.logical_and_((table - table).sum(0) == 0).gt_(done)
        return table

    def note(self, problem: Problem, table: Tensor) -> bool:
        """Log what was judged, read the log where it is time; whether there is a step, as far as the host knows."""
        self._log.append((table, {slot: self.taken[slot] for slot, busy in enumerate(self.active) if busy}))
        # Where a slot will have made all its steps after this one, the log is read behind it
        last = any(busy and self.taken[slot] + 1 >= self.config.steps for slot, busy in enumerate(self.active))
        if len(self._log) >= self.config.check_every and not last:
            values = torch.stack([table for table, _ in self._log]).tolist()
            self._end(problem, self._replayed(values))
        return any(self.active)

    def _replayed(self, tables: Sequence[Sequence[Sequence[float]]]) -> dict[int, FitOutcome]:
        """The edits that ended within the log, whose tables as the host has read them these are; the log is empty."""
        ended: dict[int, FitOutcome] = {}
        for table, (_, taken) in zip(tables, self._log, strict=True):
            for slot, steps in taken.items():
                value, nll, norm, is_correct, is_done = (row[slot] for row in table)
                if slot in ended:
                    continue
                if not math.isfinite(norm):
                    ended[slot] = self._outcome(slot, "diverged", steps - 1)
                    continue
                self.courses[slot].note(value, nll, bool(is_correct))
                if not (math.isfinite(value) and math.isfinite(nll)):
                    ended[slot] = self._outcome(slot, "diverged", steps)
                elif is_done:
                    ended[slot] = self._outcome(slot, "converged", steps)
        self._log.clear()
        return ended

    def step(self, problem: Problem, losses: Losses) -> None:
        """One AdamW step of the running slots; none where the gradient is not finite."""
        self.stacked.begin_step(outer=True)
        with problem.phase("backward"):
            # Not indexed: a GPU need not be waited for. Losses of other slots may be anything.
            losses.total.backward(self.running.to(losses.total.dtype))  # type: ignore[no-untyped-call]
            self.stacked.end_step()
        with problem.phase("optimiser"), torch.no_grad():
            self._adam()

    def _adam(self) -> None:
        config, flat, factored = self.config, self.stacked.flat, self.stacked.factored()
        settings: dict[str, Any] = {"betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
        settings |= {"clip": config.clip, "radius": config.radius}
        shared = (self.steps, self._rates, self.running)
        if factored is None:
            self.norms.copy_(adam_step_(flat, self.stacked.grad, self.first, self.second, *shared, **settings))
            return
        params, first, second = (factored.matrices(rows) for rows in (flat, self.first, self.second))
        inputs, grads, offsets = factored.inputs, factored.grads, factored.offsets
        norms = adam_step_outer_(params, inputs, grads, offsets, first, second, *shared, **settings)
        # What a step hands to the next one stays where it is: a recording of it can be replayed
        self.norms.copy_(norms)

    def count(self, problem: Problem) -> None:
        """One more step was taken; take out the edits that have had all theirs."""
        self.taken = [taken + int(busy) for taken, busy in zip(self.taken, self.active, strict=True)]
        full = [p for p, busy in enumerate(self.active) if busy and self.taken[p] >= self.config.steps]
        if not full:
            return
        # by both ends: a norm of infinite order takes five times as long
        largest = [torch.stack(self.stacked.flat[slot].aminmax()).abs().amax() for slot in full]
        logged = [table.flatten() for table, _ in self._log]
        values = torch.cat([*logged, self.norms, torch.stack(largest)]).tolist()
        width, size = 5 * self.stacked.size, self.stacked.size
        tables = [values[at : at + width] for at in range(0, width * len(logged), width)]
        ended = self._replayed([[table[at : at + size] for at in range(0, width, size)] for table in tables])
        norms, of_full = values[width * len(logged) :][:size], values[-len(full) :]
        for slot, most in zip(full, of_full, strict=True):
            if slot not in ended:
                ended[slot] = self._full(slot, norms[slot], most)
        self._end(problem, ended)

    def _full(self, slot: int, gradient: float, largest: float) -> FitOutcome:
        """How an edit ended that has had all its steps: with that gradient norm, and parameters as large as that."""
        if not math.isfinite(gradient):
            return self._outcome(slot, "diverged", self.taken[slot] - 1)
        if not math.isfinite(largest):
            return self._outcome(slot, "diverged", self.taken[slot])
        diverging = self.courses[slot].is_diverging(largest, gradient)
        return self._outcome(slot, "diverging" if diverging else "max_steps", self.taken[slot])

    def _outcome(self, slot: int, status: str, steps: int) -> FitOutcome:
        course = self.courses[slot]
        return FitOutcome(status, steps, course.loss, course.nll, course.first_nll, course.best_nll)

    def _end(self, problem: Problem, ended: Mapping[int, FitOutcome]) -> None:
        if not ended:
            return
        for span in slices_of(sorted(ended)):
            self.running[span] = False
        for slot in ended:
            self.active[slot] = False
        problem.ended(ended)


def no_phase(_name: str) -> AbstractContextManager[None]:
    """A timer that measures nothing."""
    return nullcontext()
