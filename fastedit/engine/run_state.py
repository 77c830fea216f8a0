"""A run while it goes on: what was asked of it, which edits have ended, and what every batch shares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from fastedit.backbone import EditableModel
from fastedit.deltas import DeltaSpec, EditDelta
from fastedit.engine.leaving import Leaving
from fastedit.engine.profiling.timing import PhaseTimer
from fastedit.evaluation import EditScores, Score
from fastedit.fitting.solver import FitOutcome, SolverConfig
from fastedit.fitting.views import ViewSource
from fastedit.methods import EditPlan
from fastedit.requests import EditRequest
from fastedit.training import Artifact

#: How fits end that came to nothing.
FAILED = ("diverging", "diverged")


@dataclass(frozen=True)
class EditJob:
    """What was asked.

    Args:
        model: frozen. edits: of the run. plan: method, objective and their settings.
        spec, solver: of the method on this model.
        views: what the edits are fitted on. pool: records that may be learned from.
        artifact: trained parts of the method.
        seed: of the run.
        bind: what the deltas belong to: "content" of the weights, or their "architecture".
    """

    model: EditableModel
    edits: Sequence[EditRequest]
    plan: EditPlan
    spec: DeltaSpec
    solver: SolverConfig
    views: ViewSource
    pool: Sequence[EditRequest] = ()
    artifact: Artifact | None = None
    seed: int = 0
    bind: str = "content"

    @property
    def delta_dtype(self) -> torch.dtype:
        """Of the deltas while they are fitted: float64 for a model in float64, else float32."""
        return torch.float64 if self.model.dtype == torch.float64 else torch.float32


class EditStore(Protocol):
    """Where the edits of a run are kept as they end, and found again by the next run (``fastedit.ledger``).

    Edits are numbered as in the run. The timeline is what acts there: deltas of this run, and of earlier ones.
    """

    folder: Path
    #: The run's edits, each once; ``members`` says which of them each of the given ones is.
    edits: Sequence[EditRequest]
    members: Sequence[int]

    def outcomes(self) -> dict[int, FitOutcome]:
        """Of the edits that are there already."""

    def commit(self, number: int, delta: EditDelta, outcome: FitOutcome) -> None:
        """Keep an edit for good; when this returns it is on the disk."""

    def timeline(self) -> Sequence[int | None]:
        """What acts, in order, by number of the edit; None are edits of other runs."""

    def acting(self, count: int | None = None) -> Sequence[EditDelta]:
        """The deltas of the timeline as they were fitted, or the first ones; read when asked for."""

    def deltas(self, numbers: Sequence[int]) -> Sequence[EditDelta]:
        """Deltas of these edits; read when asked for."""

    def state(self, count: int | None = None) -> str:
        """What identifies the deltas that act, or the first ones; of edits that act alone one word."""

    def scores(self, state: str) -> dict[int, EditScores]:
        """Scores that were made in a state."""

    def commit_scores(self, state: str, scores: Mapping[int, EditScores]) -> None:
        """Keep scores for good."""


class EditLedger(Protocol):
    """Keeps edits for good (``fastedit.Ledger``)."""

    def on_base(self) -> AbstractContextManager[None]:
        """Inside the block, in this context, edits that are served do not act: new ones are made on the base model."""

    def session(
        self, job: EditJob, *, mode: str, conflicts: str, provenance: Mapping[str, Any]
    ) -> AbstractContextManager[EditStore]:
        """Inside the block the edits of a run are kept, and nobody else writes.

        Raises:
            ValueError: the edits contradict those that are there, or belong to another model or method.
        """


@dataclass
class EndedEdits:
    """What there is of the edits that have ended, by number of the edit.

    Args:
        timer: seconds by phase. store: that keeps them for good; None keeps them in memory.
    """

    timer: PhaseTimer
    store: EditStore | None = None
    outcomes: dict[int, FitOutcome] = field(default_factory=dict)
    scores: dict[int, EditScores] = field(default_factory=dict)
    #: Those that this run made itself, and how many of them came to nothing.
    made: set[int] = field(default_factory=set)
    failed: int = 0
    #: In memory, without a store.
    deltas: dict[int, EditDelta] = field(default_factory=dict)
    #: Given up, each with the reason; on several workers alone.
    set_aside: dict[int, str] = field(default_factory=dict)
    #: Of a sequence, scores after so many edits.
    checkpoints: dict[int, Mapping[str, Mapping[str, Score]]] = field(default_factory=dict)

    def recall(self, store: EditStore) -> None:
        """Take over what a store has of these edits."""
        self.store = store
        self.outcomes.update(store.outcomes())

    def keep(self, number: int, delta: EditDelta, outcome: FitOutcome) -> None:
        """Take over an edit that has ended."""
        if self.store is None:
            self.deltas[number] = delta
        else:
            with self.timer.phase("store"):
                self.store.commit(number, delta, outcome)
        self.outcomes[number] = outcome
        self.made.add(number)
        self.failed += outcome.status in FAILED

    def timeline(self) -> Sequence[int | None]:
        """What acts in sequence, in order, by number of the edit; None are edits of earlier runs."""
        return sorted(self.deltas) if self.store is None else self.store.timeline()

    def known_scores(self, state: str) -> dict[int, EditScores]:
        """Scores that were made in a state before."""
        return {} if self.store is None else self.store.scores(state)

    def keep_scores(self, state: str, scores: Mapping[int, EditScores]) -> None:
        """Keep scores that were made in a state, where there is a store."""
        if self.store is not None:
            with self.timer.phase("store"):
                self.store.commit_scores(state, scores)

    def deltas_of(self, numbers: Sequence[int]) -> Sequence[EditDelta]:
        """Deltas of these edits, in order."""
        if self.store is not None:
            return self.store.deltas(numbers)
        return [self.deltas[number] for number in numbers]


class Workers(Protocol):
    """Several processes that make edits (``engine.parallel.workers``)."""

    def single(self, run: RunState, batch_size: int, evaluate: bool, show: bool | None) -> None:
        """See ``schedule.run_single``."""

    def together(
        self,
        run: RunState,
        acting: Sequence[EditDelta],
        numbers: Sequence[int],
        state: str,
        batch_size: int,
        show: bool | None,
    ) -> dict[int, EditScores]:
        """Score edits while all these deltas act, and keep the scores as those of a state."""

    def described(self) -> dict[str, Any]:
        """For the run's provenance."""

    def close(self) -> None:
        """End them."""


@contextmanager
def ending(workers: Workers | None) -> Iterator[None]:
    """End workers behind the block."""
    try:
        yield
    finally:
        if workers is not None:
            workers.close()


@dataclass
class RunState:
    """What every batch of a run shares.

    Args:
        job: what was asked. ended: the edits that have ended. timer: seconds by phase.
        shared: made by the method's ``setup``.
        retention: of a sequence, keeps earlier edits while the next one is fitted (``engine.retention``); None without.
        score_sample: of a sequence, most edits that are scored at a time; None is all.
        on_step: gets, at every step, how many edits the steps of those at work amount to.
        workers: make the edits that do not see each other (``engine.parallel``); None makes them here.
    """

    job: EditJob
    ended: EndedEdits
    timer: PhaseTimer
    shared: Any = None
    retention: Any = None
    score_sample: int | None = None
    on_step: Callable[[float], None] | None = None
    workers: Workers | None = None
    #: Takes fitted deltas to ``ended``.
    leaving: Leaving = field(init=False)

    def __post_init__(self) -> None:
        self.leaving = Leaving(self.job.model.device, self.ended.keep, self.timer)
