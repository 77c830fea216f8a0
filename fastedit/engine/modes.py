"""How the edits of a run follow one another: each alone on the base model, or in sequence."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Mapping, Sequence

from fastedit.deltas import EditDelta, accumulate, stack
from fastedit.engine.evaluate import Evaluator
from fastedit.engine.memory import is_out_of_memory, release_memory
from fastedit.engine.work import Work, make_deltas
from fastedit.evaluation import EditScores, Score, summarise
from fastedit.methods.base import hook
from fastedit.progress import ProgressLine, progress
from fastedit.solver import FitOutcome

#: Of an edit's time, what its fit takes and not its scoring, before any is known.
FIT_SHARE = 0.7


def run_single(work: Work, batch_size: int, evaluate: bool, show: bool | None) -> None:
    """Every edit alone on the base model; where memory runs out, half as many together."""
    waiting = deque(range(len(work.edits)))
    size = batch_size
    with progress("editing", len(work.edits), show) as line:
        scored = Scoring(work, batch_size, line) if evaluate else None
        work.on_step = line.underway if scored is None else scored.fitting

        def take(number: int, delta: EditDelta, outcome: FitOutcome) -> None:
            work.keep(number, delta, outcome)
            if scored is None:
                line.advance()
            else:
                scored.add(number, delta)

        while waiting:
            places = min(size, len(waiting))
            try:
                make_deltas(work, waiting, places, (), take)
            except Exception as error:
                if places == 1 or not is_out_of_memory(error):
                    raise
                size = places // 2
                # Those that were at work begin anew
                waiting = deque(number for number in range(len(work.edits)) if number not in work.outcomes)
                told = f"edit: memory ran out in a batch of {places}; going on with batches of {size}"
                warnings.warn(told, RuntimeWarning, stacklevel=3)
            else:
                break
            # outside of the handler: the traceback holds the tensors of the batch
            release_memory(work.model)
        if scored is not None:
            scored.flush()


class Scoring:
    """Scores edits that have ended, a batch at a time."""

    def __init__(self, work: Work, batch_size: int, line: ProgressLine) -> None:
        self.work, self.size, self.line = work, batch_size, line
        self._evaluator = Evaluator(work.model, work.spec, work.timer)
        self._ended: list[tuple[int, EditDelta]] = []
        self._share = FIT_SHARE

    def add(self, number: int, delta: EditDelta) -> None:
        """One more has ended."""
        self._ended.append((number, delta))
        if len(self._ended) >= self.size:
            self.flush()

    def fitting(self, edits: float) -> None:
        """The steps of the edits at work amount to so many edits."""
        self.line.underway(self._share * (edits + len(self._ended)))

    def flush(self) -> None:
        """Score those that wait for it."""
        # What memory has no room for beside a batch stays here until there is room
        while self._ended:
            part = self._ended[: self.size]
            stacked = stack([delta for _, delta in part], device=self.work.model.device)
            try:
                found = self._evaluator.scores([self.work.edits[number] for number, _ in part], stacked)
            except Exception as error:
                if len(part) == 1 or not is_out_of_memory(error):
                    raise
                self.size = len(part) // 2
                told = f"edit: memory ran out scoring {len(part)} edits; going on with {self.size} at a time"
                warnings.warn(told, RuntimeWarning, stacklevel=3)
            else:
                for (number, _), scores in zip(part, found, strict=True):
                    self.work.scored[number] = scores
                    self.line.advance()
                del self._ended[: len(part)]
                spent = self.work.timer.total()
                self._share = self.work.timer.total(without=("evaluation",)) / spent if spent else FIT_SHARE
                continue
            release_memory(self.work.model)


def run_sequential(
    work: Work, batch_size: int, evaluate: bool, show: bool | None, score_at: Sequence[int]
) -> dict[int, dict[str, dict[str, Score]]]:
    """Edits in order; scores of all edits so far after so many, and after the last.

    Edits that a router keeps apart are fitted together, as they do not see each other; those that add up are fitted one
    after another, each on top of the earlier ones.
    """
    apart = work.plan.method.sequence == "route"
    if apart:
        run_single(work, batch_size, False, show)
    committed: list[EditDelta] = []
    found: dict[int, dict[str, dict[str, Score]]] = {}
    label = "scoring in sequence" if apart else "editing in sequence"
    with progress(label, len(work.edits), show) as line:
        work.on_step = line.underway
        deltas = work.all_deltas() if apart else ()
        for index in range(len(work.edits)):
            new = deltas[index] if apart else _next(work, index, committed)
            committed = _combined(work, committed, new)
            line.advance()
            if evaluate and index + 1 in score_at:
                scored = score_committed(work, committed, index + 1, batch_size, show)
                found[index + 1] = summarise(scored, seed=work.seed)
    if evaluate:
        scored = score_committed(work, committed, len(work.edits), batch_size, show)
        work.scored.update(enumerate(scored))
    return found


def _next(work: Work, index: int, committed: Sequence[EditDelta]) -> EditDelta:
    """The delta of one edit, made on top of the newest committed one (closed memories of a method do not act)."""
    own = hook(work.plan.method, "beneath")
    acting = committed[-1:] if own is None else own(work.plan.config, committed)
    fitted: list[EditDelta] = []

    def take(number: int, delta: EditDelta, outcome: FitOutcome) -> None:
        work.keep(number, delta, outcome)
        fitted.append(delta)

    make_deltas(work, deque([index]), 1, acting, take)
    return fitted[0]


def _combined(work: Work, committed: list[EditDelta], new: EditDelta) -> list[EditDelta]:
    own = hook(work.plan.method, "combine")
    if own is not None:
        combined: list[EditDelta] = own(work.plan.config, committed, new)
        return combined
    if work.plan.method.sequence == "route":
        committed.append(new)
        return committed
    return [accumulate([*committed, new])] if committed else [new]


def score_committed(
    work: Work, committed: Sequence[EditDelta], count: int, batch_size: int, show: bool | None
) -> list[EditScores]:
    """Scores of the first ``count`` edits with the committed deltas acting."""
    evaluator = Evaluator(work.model, work.spec, work.timer)
    with work.timer.phase("evaluation"):
        stacked = stack(list(committed), device=work.model.device)
    found: list[EditScores] = []
    with progress(f"scoring after edit {count}", count, show) as line:
        for start in range(0, count, batch_size):
            part = work.edits[start : min(start + batch_size, count)]
            found += evaluator.scores(part, stacked, shared=True)
            line.advance(len(part))
    return found


Checkpoints = Mapping[int, Mapping[str, Mapping[str, Score]]]
