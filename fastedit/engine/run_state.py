"""A run while it goes on: what was asked of it, which edits have ended, and what every batch shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastedit.backbone import EditableModel
from fastedit.deltas import DeltaSpec, EditDelta, StoredDeltas
from fastedit.engine.profiling.timing import PhaseTimer
from fastedit.evaluation import EditScores, Score
from fastedit.fitting.solver import FitOutcome, SolverConfig
from fastedit.fitting.views import ViewSource
from fastedit.methods import EditPlan
from fastedit.requests import EditRequest
from fastedit.training import Artifact


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


@dataclass
class EndedEdits:
    """What there is of the edits that have ended, by number of the edit.

    Args:
        timer: seconds by phase. store: folder that the deltas go to; None keeps them in memory.
        per_file: deltas of one file.
    """

    timer: PhaseTimer
    store: StoredDeltas | None = None
    per_file: int = 1
    outcomes: dict[int, FitOutcome] = field(default_factory=dict)
    scores: dict[int, EditScores] = field(default_factory=dict)
    #: In memory all, or those that are not in a file yet.
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
            written = set(self.store.numbers)
            numbers = sorted(number for number in self.deltas if number not in written)
            self.store.append([self.deltas[number] for number in numbers], numbers)
            self.deltas.clear()

    def all_deltas(self) -> Sequence[EditDelta]:
        """Those of every edit, in order."""
        self.write()
        return self.store if self.store is not None else [self.deltas[n] for n in sorted(self.deltas)]

    def finished(self) -> list[int]:
        """Numbers of the edits that have ended and whose deltas are there."""
        there = set(self.deltas) | set(() if self.store is None else self.store.numbers)
        return sorted(there & set(self.outcomes))

    def deltas_of(self, numbers: Sequence[int]) -> Sequence[EditDelta]:
        """Deltas of these edits, also where no more can be written: those in memory beside those in files."""
        try:
            deltas = self.all_deltas()
        except OSError:
            assert self.store is not None
            stored = dict(zip(self.store.numbers, self.store, strict=True))
            return [(self.deltas | stored)[number] for number in numbers]
        if self.store is None:
            return [self.deltas[number] for number in numbers]
        return deltas


@dataclass
class RunState:
    """What every batch of a run shares.

    Args:
        job: what was asked. ended: the edits that have ended. timer: seconds by phase.
        shared: made by the method's ``setup``.
        on_step: gets, at every step, how many edits the steps of those at work amount to.
    """

    job: EditJob
    ended: EndedEdits
    timer: PhaseTimer
    shared: Any = None
    on_step: Callable[[float], None] | None = None
