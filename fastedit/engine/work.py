"""What the batches of a run share, and how waiting edits become deltas: fitted together, or computed at once."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastedit.backbone import EditableModel, held_inputs
from fastedit.deltas import DeltaSpec, EditDelta, Rows, StoredDeltas, company, installed, split_point, stack
from fastedit.deltas.kinds import new_stack
from fastedit.deltas.questions import QUESTIONS
from fastedit.engine.apply import AS_FITTED, fitted_as
from fastedit.engine.checks import question_of
from fastedit.engine.fit_problem import BatchProblem
from fastedit.engine.profiling.timing import PhaseTimer
from fastedit.evaluation import EditScores, Score
from fastedit.fitting.prepared import EditRows, prepare
from fastedit.fitting.solver import FitOutcome, SolverConfig, fit
from fastedit.fitting.views import ViewSource
from fastedit.methods import EditPlan
from fastedit.methods.base import Method, is_computed
from fastedit.objectives import Role
from fastedit.requests import EditRequest
from fastedit.training import Artifact

Take = Callable[[int, EditDelta, FitOutcome], None]


@dataclass
class Work:
    """What every batch of a run shares."""

    model: EditableModel
    edits: Sequence[EditRequest]
    plan: EditPlan
    spec: DeltaSpec
    solver: SolverConfig
    views: ViewSource
    timer: PhaseTimer
    delta_dtype: torch.dtype
    store: StoredDeltas | None
    per_file: int
    seed: int = 0
    pool: Sequence[EditRequest] = ()
    artifact: Artifact | None = None
    #: What the deltas belong to: "content" of the weights, or their "architecture".
    bind: str = "content"
    #: Made by the method's ``setup``
    shared: Any = None
    #: Gets, at every step, how many edits the steps of those at work amount to.
    on_step: Callable[[float], None] | None = None
    outcomes: dict[int, FitOutcome] = field(default_factory=dict)
    scored: dict[int, EditScores] = field(default_factory=dict)
    # In memory all, or those that are not in a file yet
    deltas: dict[int, EditDelta] = field(default_factory=dict)
    #: Of a sequence, scores after so many edits.
    checkpoints: dict[int, Mapping[str, Mapping[str, Score]]] = field(default_factory=dict)

    def keep(self, number: int, delta: EditDelta, outcome: FitOutcome) -> None:
        """Take over an edit that has ended."""
        self.deltas[number], self.outcomes[number] = delta, outcome
        if self.store is not None and len(self.deltas) >= self.per_file:
            self.write()

    def write(self) -> None:
        """Put the deltas that are in memory into a file, where the run has files."""
        if self.store is None or not self.deltas:
            return
        with self.timer.phase("store"):
            # A run that was stopped between the two lines below
            written = set(self.store.places)
            places = sorted(place for place in self.deltas if place not in written)
            self.store.append([self.deltas[place] for place in places], places)
            self.deltas.clear()

    def all_deltas(self) -> Sequence[EditDelta]:
        """Those of every edit, in order."""
        self.write()
        return self.store if self.store is not None else [self.deltas[n] for n in sorted(self.deltas)]

    def finished(self) -> list[int]:
        """Numbers of the edits that have ended and whose deltas are there."""
        there = set(self.deltas) | set(() if self.store is None else self.store.places)
        return sorted(there & set(self.outcomes))

    def kept(self, numbers: Sequence[int]) -> Sequence[EditDelta]:
        """Deltas of these edits, also where no more can be written: those in memory beside those in files."""
        try:
            deltas = self.all_deltas()
        except OSError:
            assert self.store is not None
            stored = dict(zip(self.store.places, self.store, strict=True))
            return [(self.deltas | stored)[number] for number in numbers]
        if self.store is None:
            return [self.deltas[number] for number in numbers]
        return deltas

    @property
    def writes(self) -> bool:
        """Whether deltas are computed, not fitted."""
        return is_computed(self.plan.method)


def make_deltas(work: Work, waiting: deque[int], places: int, committed: Sequence[EditDelta], take: Take) -> None:
    """Turn waiting edits into deltas, so many at a time, on top of the committed ones; those made leave the queue."""
    if work.writes:
        _write(work, waiting, places, committed, take)
    else:
        _fit(work, waiting, places, committed, take)


def _named(work: Work, committed: Sequence[EditDelta], take: Take) -> Take:
    """Hand over a delta with the names of its model, edit and company, and what the method adds once it is fitted."""
    fitted_on = company(committed)
    as_fitted = {} if work.bind == "content" else {AS_FITTED: fitted_as(work.model)}

    def named(number: int, delta: EditDelta, outcome: FitOutcome) -> None:
        request = work.edits[number]
        # Here no delta of the run acts
        bound = work.model.fingerprint if work.bind == "content" else work.model.architecture
        made = replace(delta, model_fingerprint=bound, request_id=request.id, fitted_on=fitted_on)
        made = replace(made, texts={**made.texts, **as_fitted})
        (made,) = work.plan.method.finish(work.model, work.plan.config, work.shared, [request], [made])
        made, outcome = _finite(made, outcome)
        take(number, replace(made, texts={**made.texts, QUESTIONS: question_of(request)}), outcome)

    return named


def _finite(delta: EditDelta, outcome: FitOutcome) -> tuple[EditDelta, FitOutcome]:
    """A delta with values that are not finite as one that changes nothing, of an edit that has diverged."""
    if all(bool(tensor.isfinite().all()) for tensor in delta.tensors.values()):
        return delta, outcome
    nothing = {name: torch.zeros_like(tensor) for name, tensor in delta.tensors.items()}
    return replace(delta, tensors=nothing), replace(outcome, status="diverged")


def _write(work: Work, waiting: deque[int], places: int, committed: Sequence[EditDelta], take: Take) -> None:
    model, named = work.model, _named(work, committed, take)
    while waiting:
        numbers = [waiting[place] for place in range(min(places, len(waiting)))]
        requests = [work.edits[number] for number in numbers]
        with work.timer.phase("encode"):
            views = [work.views.views(number, (Role.EDIT,)) for number in numbers]
        # Changed questions have no rows on the frozen model that would be of use
        rows = prepare(model, work.spec, views, work.timer) if work.spec.sites else []
        with ExitStack() as entered:
            for earlier in committed:
                stacked = stack([earlier], device=model.device)
                entered.enter_context(installed(model, stacked, Rows(), route=False))
            with work.timer.phase("compute"):
                found = work.plan.method.compute(model, work.plan.config, work.shared, requests, rows)
        for number, made in zip(numbers, found, strict=True):
            waiting.popleft()
            options = {**work.spec.options, **made.options}
            delta = EditDelta(replace(work.spec, options=options), dict(made.tensors), texts=dict(made.texts))
            named(number, delta, FitOutcome("computed", 0, math.nan, math.nan))


def _fit(work: Work, waiting: deque[int], places: int, committed: Sequence[EditDelta], take: Take) -> None:
    model, timer, method = work.model, work.timer, work.plan.method
    objective = work.plan.build_objective(work.solver.steps)

    def make(numbers: Sequence[int]) -> list[EditRows]:
        with timer.phase("encode"):
            views = [work.views.views(number, objective.roles) for number in numbers]
        return prepare(model, work.spec, views, timer)

    def begin(numbers: Sequence[int], rows: Sequence[EditRows]) -> Sequence[Mapping[str, Tensor]]:
        requests = [work.edits[number] for number in numbers]
        with timer.phase("setup"):
            return method.start(model, work.plan.config, work.shared, requests, rows)

    def stepped(taken: int) -> None:
        assert work.on_step is not None
        work.on_step(taken / max(1, work.solver.steps))

    with timer.phase("setup"):
        stacked = new_stack(work.spec, places, dtype=work.delta_dtype, device=model.device)
    with ExitStack() as entered:
        held = entered.enter_context(held_inputs(model, *split_point(work.spec)))
        holders = [entered.enter_context(installed(model, stacked, Rows(), route=False))]
        stacked.earlier = [stack([delta], device=model.device) for delta in committed]
        for earlier in stacked.earlier:
            holders.append(entered.enter_context(installed(model, earlier, Rows(), route=False)))
        problem = BatchProblem(
            model, stacked, holders, held, objective, waiting, make, _named(work, committed, take), timer,
            None if method.start is Method.start else begin, None if work.on_step is None else stepped,
        )  # fmt: skip
        fit(problem, stacked, work.solver)
