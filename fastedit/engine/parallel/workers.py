"""The workers of a run: what they make is taken over here, by the one process that commits."""

from __future__ import annotations

import importlib.util
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from fastedit.deltas import EditDelta
from fastedit.engine.parallel.dispatch import Dispatch, Handle
from fastedit.engine.parallel.processes import Processes
from fastedit.engine.parallel.ray_actors import RayActors
from fastedit.engine.parallel.shards import shards
from fastedit.engine.parallel.source import source_of
from fastedit.engine.parallel.worker import Shard, ShardResult, Task
from fastedit.engine.run_state import RunState
from fastedit.engine.schedule import ALONE, note_outcomes
from fastedit.evaluation import EditScores
from fastedit.progress import ProgressLine, progress

ENGINES = ("processes", "ray")
#: How many workers there are where nobody says.
USUAL = 2


def workers_of(engine: str | None, count: int | None, resources: Mapping[str, float] | None) -> RunWorkers | None:
    """The workers that are asked for; None where everything is made in this process.

    Raises:
        ValueError: no possible engine, number or resources. ImportError: Ray is absent; says what to install.
    """
    if engine is None:
        if count is not None or resources is not None:
            raise ValueError(
                f"edit: workers and resources belong to an engine, one of {list(ENGINES)} (got engine=None, "
                f"workers={count!r}, resources={resources!r})"
            )
        return None
    if engine not in ENGINES:
        raise ValueError(f"edit: engine is one of {list(ENGINES)}, or None (got engine={engine!r})")
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
        raise ValueError(f"edit: workers is at least 1, or None (got workers={count!r})")
    if resources is not None:
        _check_resources(engine, resources)
    if engine == "ray" and importlib.util.find_spec("ray") is None:
        raise ImportError("edit: engine='ray' needs Ray: pip install 'fastedit-mllm[ray]' (got no module 'ray')")
    return RunWorkers(engine, count or USUAL, dict(resources or {}))


def _check_resources(engine: str, resources: Mapping[str, float]) -> None:
    if engine != "ray":
        raise ValueError(f"edit: resources belong to engine='ray' (got engine={engine!r}, resources={resources!r})")
    for name, amount in resources.items():
        if not isinstance(amount, (int, float)) or isinstance(amount, bool) or not amount >= 0:
            raise ValueError(f"edit: resources are amounts by name, {{'GPU': 1}} (got {name!r}: {amount!r})")


class RunWorkers:
    """Several processes that make the edits of a run (``run_state.Workers``).

    Args:
        engine: of ``ENGINES``. count: of workers. resources: of each, on a Ray cluster.
    """

    def __init__(self, engine: str, count: int, resources: Mapping[str, float]) -> None:
        self.engine, self.count, self.resources = engine, count, resources
        #: What is at work; its processes and how many of them were lost.
        self.dispatch: Dispatch | None = None
        self._seconds: Counter[str] = Counter()
        self._lost = 0
        #: Started with the first task; workers keep the model from one task to the next.
        self._pool: Processes | RayActors | None = None
        self._handles: dict[int, Handle] = {}

    def close(self) -> None:
        """End the workers."""
        while self._handles:
            self._handles.popitem()[1].close()
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def described(self) -> dict[str, Any]:
        """For the run's provenance: ``seconds`` are those of all workers together, by phase."""
        return {"engine": self.engine, "workers": self.count, "lost": self._lost, "seconds": dict(self._seconds)}

    def single(self, run: RunState, batch_size: int, evaluate: bool, show: bool | None) -> None:
        """Make the edits that have not ended, each alone on the base model, and score those without scores."""
        ended, edits = run.ended, run.job.edits
        known = ended.known_scores(ALONE) if evaluate else {}
        ended.scores.update({number: known[number] for number in ended.outcomes if number in known})
        unscored = [number for number in sorted(ended.outcomes) if number not in known] if evaluate else []
        fitted = {
            number: (delta, ended.outcomes[number])
            for number, delta in zip(unscored, ended.deltas_of(unscored), strict=True)
        }
        wanted = sorted([*unscored, *(number for number in range(len(edits)) if number not in ended.outcomes)])
        if not wanted:
            return
        whole = Shard(wanted, fitted)
        listed = [whole.part(numbers) for numbers in shards(edits, wanted, self.count, batch_size)]
        with progress("editing", len(edits), show, unit="edits") as line:
            line.skip(len(edits) - len(wanted))
            task = Task(source_of(run.job.model), run.job, batch_size, evaluate)
            self._dispatch(run, task, listed, partial(self._take, run, line), partial(self._set_aside, run))
        if not ended.outcomes:
            number, reason = next(iter(ended.set_aside.items()))
            raise RuntimeError(f"edit: at least one edit can be made (got {reason} of edits[{number}])")

    def together(
        self,
        run: RunState,
        acting: Sequence[EditDelta],
        numbers: Sequence[int],
        state: str,
        batch_size: int,
        show: bool | None,
    ) -> dict[int, EditScores]:
        """Score edits while all these deltas act, and keep the scores as those of a state.

        Raises:
            RuntimeError: an edit cannot be scored; says why.
        """
        found: dict[int, EditScores] = {}
        task = Task(source_of(run.job.model), run.job, batch_size, True, list(acting))
        listed = [Shard(part) for part in shards(run.job.edits, numbers, self.count, batch_size)]

        def refuse(number: int, reason: str) -> None:
            raise RuntimeError(f"edit: every edit can be scored (got {reason} of edits[{number}])")

        with progress(f"scoring {len(numbers)} edits", len(numbers), show) as line:

            def take(result: ShardResult) -> None:
                scores = {number: scored for number, (_, _, scored) in result.made.items() if scored is not None}
                run.ended.keep_scores(state, scores)
                found.update(scores)
                self._seconds.update(result.seconds)
                line.advance(len(scores))

            self._dispatch(run, task, listed, take, refuse)
        return found

    def _dispatch(
        self,
        run: RunState,
        task: Task,
        listed: Sequence[Shard],
        take: Callable[[ShardResult], None],
        set_aside: Callable[[int, str], None],
    ) -> None:
        pickled = task.pickled()
        device = run.job.model.device
        if self._pool is None:
            is_here = self.engine == "processes"
            self._pool = Processes(self.count, device) if is_here else RayActors(self.resources, device)
        pool = self._pool
        pool.give(pickled)
        waiting = partial(run.timer.phase, "workers")
        self.dispatch = Dispatch(
            pool.new_worker, self.count, pool.is_lost, waiting, take, set_aside, self._handles
        )  # fmt: skip
        try:
            self.dispatch.run(listed)
        finally:
            self._lost += self.dispatch.lost

    def _take(self, run: RunState, line: ProgressLine, result: ShardResult) -> None:
        """Keep what a worker made; the only place where edits of workers are committed."""
        scores = {}
        for number, (delta, outcome, scored) in result.made.items():
            if delta is not None and outcome is not None and number not in run.ended.outcomes:
                run.ended.keep(number, delta, outcome)
            if scored is not None:
                scores[number] = scored
        if scores:
            run.ended.keep_scores(ALONE, scores)
            run.ended.scores.update(scores)
        self._seconds.update(result.seconds)
        note_outcomes(run, line)
        line.advance(len(result.made))

    def _set_aside(self, run: RunState, number: int, reason: str) -> None:
        run.ended.set_aside[number] = reason
        edit = run.job.edits[number]
        warnings.warn(
            f"edit: edits[{number}] ({edit.id!r:.80}) failed each time and is set aside; the run goes on ({reason})",
            RuntimeWarning,
            stacklevel=2,
        )
