"""What a worker does: it loads the model once, makes shards of edits, and gives back deltas and scores."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fastedit.backbone import EditableModel
from fastedit.backbone.context import on_frozen_model, with_gradients
from fastedit.deltas import EditDelta, stack
from fastedit.engine.evaluate import Evaluator
from fastedit.engine.parallel.source import ModelSource
from fastedit.engine.profiling.timing import PhaseTimer
from fastedit.engine.readying import expanded, ready_device, set_up
from fastedit.engine.run_state import EditJob, EndedEdits, RunState
from fastedit.engine.schedule import run_single
from fastedit.evaluation import EditScores
from fastedit.fitting.solver import FitOutcome


@dataclass(frozen=True)
class Task:
    """What every worker of a run has; pickled, it travels to each of them.

    Args:
        source: of the model. job: of the run; its model stays behind.
        batch_size: edits that are fitted, or scored, together. evaluate: score each edit alone.
        acting: deltas that all act; edits are scored with them, and none is made. None makes edits.
    """

    source: ModelSource
    job: EditJob
    batch_size: int
    evaluate: bool
    acting: Sequence[EditDelta] | None = None

    def pickled(self) -> bytes:
        """As bytes, without the model."""
        return pickle.dumps(replace(self, job=replace(self.job, model=None)))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Shard:
    """Edits that a worker makes together.

    Args:
        numbers: of the run's edits. fitted: of those that have a delta and are only scored.
    """

    numbers: Sequence[int]
    fitted: Mapping[int, tuple[EditDelta, FitOutcome]] = field(default_factory=dict)

    def part(self, numbers: Sequence[int]) -> Shard:
        """Some of them."""
        return Shard(numbers, {number: self.fitted[number] for number in numbers if number in self.fitted})


@dataclass
class ShardResult:
    """What became of a shard.

    Args:
        made: number -> delta, outcome and, where they were wanted, scores. What was only scored has no delta, and with
            deltas that all act no outcome.
        reason: what ended it early; "" where all edits are there.
        seconds: by phase.
    """

    made: dict[int, tuple[EditDelta | None, FitOutcome | None, EditScores | None]] = field(default_factory=dict)
    reason: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)


class Worker:
    """Makes shards of one run, task after task; lives in a process of its own, and loads the model once.

    Args:
        task: pickled. device: where its model goes; None is where the run's model is.
        threads: of the CPU; None leaves them.
    """

    def __init__(self, task: bytes, device: str | None, threads: int | None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        first: Task = pickle.loads(task)
        self._model = first.source.open(device)
        ready_device(self._model.device)
        self.take_up(first)

    def take_up(self, task: Task | bytes) -> None:
        """What is made from here on, of the same run."""
        self.task: Task = pickle.loads(task) if isinstance(task, bytes) else task
        self.job = replace(self.task.job, model=self._model)
        if self.job.artifact is not None:
            self._model.artifacts[self.job.artifact.id] = self.job.artifact
        self._shared: Any = None
        self._is_ready = False
        self._acting: Any = None

    @property
    def acting(self) -> Any:
        """The deltas that all act, stacked."""
        if self._acting is None:
            assert self.task.acting is not None
            self._acting = stack(self.task.acting, device=self.job.model.device)
        return self._acting

    def make(self, shard: bytes) -> bytes:
        """A pickled ``Shard`` -> its pickled ``ShardResult``; an error of an edit is in it."""
        work = _make if self.task.acting is None else _score
        return pickle.dumps(work(self.job.model, self, pickle.loads(shard)))

    def run_state(self) -> RunState:
        """That of one shard, with what all of them share."""
        timer = PhaseTimer(self.job.model.device)
        run = RunState(self.job, EndedEdits(timer), timer)
        if not self._is_ready:
            set_up(run, False)
            self._shared, self._is_ready = run.shared, True
        run.shared = self._shared
        return run


@on_frozen_model
@with_gradients
def _make(_model: EditableModel, worker: Worker, shard: Shard) -> ShardResult:
    """Make a shard; what an error leaves finished is given back with it."""
    # What makes this fail is no edit's fault, and ends the run
    run = worker.run_state()
    result, task = ShardResult(), worker.task
    for number, (delta, outcome) in shard.fitted.items():
        run.ended.deltas[number], run.ended.outcomes[number] = delta, outcome
    try:
        with expanded(worker.job):
            run_single(run, task.batch_size, task.evaluate, False, shard.numbers)
    except Exception as error:
        result.reason = _told(error)
    for number, outcome in run.ended.outcomes.items():
        if number in run.ended.scores or not task.evaluate:
            made = None if number in shard.fitted else run.ended.deltas[number]
            result.made[number] = made, outcome, run.ended.scores.get(number)
    result.seconds = dict(run.timer.seconds)
    return result


@on_frozen_model
def _score(model: EditableModel, worker: Worker, shard: Shard) -> ShardResult:
    """Score a shard with the deltas that all act."""
    job, size, result = worker.job, worker.task.batch_size, ShardResult()
    timer = PhaseTimer(model.device)
    stacked, evaluator = worker.acting, Evaluator(model, job.spec, timer)
    try:
        for start in range(0, len(shard.numbers), size):
            part = shard.numbers[start : start + size]
            scores = evaluator.scores([job.edits[number] for number in part], stacked, shared=True)
            result.made.update({number: (None, None, each) for number, each in zip(part, scores, strict=True)})
    except Exception as error:
        result.reason = _told(error)
    result.seconds = dict(timer.seconds)
    return result


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error!s:.300}"
