"""How the edits of a run follow one another: each alone on the base model, or in sequence."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import partial

from fastedit.deltas import EditDelta, stack
from fastedit.engine.checks import question_of
from fastedit.engine.evaluate import Evaluator
from fastedit.engine.fitting import make_deltas
from fastedit.engine.memory.oom import Halving, once_more
from fastedit.engine.run_state import RunState
from fastedit.evaluation import EditScores, summarise
from fastedit.fitting.solver import FitOutcome
from fastedit.methods.base import Method
from fastedit.progress import ProgressLine, progress

#: Of an edit's time, what its fit takes and not its scoring, before any is known.
FIT_SHARE = 0.7


def run_single(run: RunState, batch_size: int, evaluate: bool, show: bool | None) -> None:
    """Every edit alone on the base model; where memory runs out, half as many together."""
    waiting = deque(range(len(run.job.edits)))
    room = Halving(run.job.model, batch_size, "in a batch of {}", "batches of {}")
    with progress("editing", len(run.job.edits), show) as line:
        scored = Scoring(run, batch_size, line) if evaluate else None
        run.on_step = line.underway if scored is None else scored.fitting

        def take(number: int, delta: EditDelta, outcome: FitOutcome) -> None:
            run.ended.keep(number, delta, outcome)
            room.done += 1
            if scored is None:
                line.advance()
            else:
                scored.add(number, delta)

        while waiting:
            with room.trial(min(room.size, len(waiting))):
                make_deltas(run, waiting, room.trying, (), take)
            # Those that were at work begin anew
            waiting = deque(number for number in range(len(run.job.edits)) if number not in run.ended.outcomes)
        if scored is not None:
            scored.flush()


class Scoring:
    """Scores edits that have ended, a batch at a time."""

    def __init__(self, run: RunState, batch_size: int, line: ProgressLine) -> None:
        self.run, self.line = run, line
        self._room = Halving(run.job.model, batch_size, "scoring {} edits")
        self._evaluator = Evaluator(run.job.model, run.job.spec, run.timer)
        self._ended: list[tuple[int, EditDelta]] = []
        self._share = FIT_SHARE

    def add(self, number: int, delta: EditDelta) -> None:
        """One more has ended."""
        self._ended.append((number, delta))
        if len(self._ended) >= self._room.size:
            self.flush()

    def fitting(self, edits: float) -> None:
        """The steps of the edits at work amount to so many edits."""
        self.line.underway(self._share * (edits + len(self._ended)))

    def flush(self) -> None:
        """Score those that wait for it."""
        # What memory has no room for beside a batch stays here until there is room
        while self._ended:
            part = self._ended[: self._room.size]
            with self._room.trial(len(part)):
                stacked = stack([delta for _, delta in part], device=self.run.job.model.device)
                found = self._evaluator.scores([self.run.job.edits[number] for number, _ in part], stacked)
                for (number, _), scores in zip(part, found, strict=True):
                    self.run.ended.scores[number] = scores
                    self._room.done += 1
                    self.line.advance()
                del self._ended[: len(part)]
                spent = self.run.timer.total()
                self._share = self.run.timer.total(without=("evaluation",)) / spent if spent else FIT_SHARE


def run_sequential(run: RunState, batch_size: int, evaluate: bool, show: bool | None, score_at: Sequence[int]) -> None:
    """Edits in order; scores of all edits so far after so many (``run.ended.checkpoints``), and after the last.

    Edits that a router keeps apart are fitted together, as they do not see each other; those that add up are fitted one
    after another, each on top of the earlier ones.
    """
    apart = run.job.plan.method.sequence == "route"
    if apart:
        run_single(run, batch_size, False, show)
    committed: list[EditDelta] = []
    label = "scoring in sequence" if apart else "editing in sequence"
    with progress(label, len(run.job.edits), show) as line:
        run.on_step = line.underway
        deltas = run.ended.all_deltas() if apart else ()
        for index in range(len(run.job.edits)):
            new = deltas[index] if apart else _next(run, index, committed)
            committed = once_more(run.job.model, partial(_combined, run, committed, new), "adding up {} edit")
            line.advance()
            if evaluate and index + 1 in score_at:
                scored = score_committed(run, committed, index + 1, batch_size, show)
                run.ended.checkpoints[index + 1] = summarise(scored, seed=run.job.seed)
    if evaluate:
        scored = score_committed(run, committed, len(run.job.edits), batch_size, show)
        run.ended.scores.update(enumerate(scored))


def _next(run: RunState, index: int, committed: Sequence[EditDelta]) -> EditDelta:
    """The delta of one edit, made on top of the newest committed one (closed memories of a method do not act)."""
    question = question_of(run.job.edits[index])
    acting = run.job.plan.method.active_while_fitting(run.job.plan.config, committed, question)
    fitted: list[EditDelta] = []

    def take(number: int, delta: EditDelta, outcome: FitOutcome) -> None:
        run.ended.keep(number, delta, outcome)
        fitted.append(delta)

    once_more(run.job.model, lambda: make_deltas(run, deque([index]), 1, acting, take), "in a sequence")
    return fitted[0]


def _combined(run: RunState, committed: list[EditDelta], new: EditDelta) -> list[EditDelta]:
    method = run.job.plan.method
    if method.sequence == "route" and method.combine is Method.combine:
        # In place: a copy for every edit would make a long sequence quadratic
        committed.append(new)
        return committed
    return method.combine(run.job.plan.config, committed, new)


def score_committed(
    run: RunState, committed: Sequence[EditDelta], count: int, batch_size: int, show: bool | None
) -> list[EditScores]:
    """Scores of the first ``count`` edits with the committed deltas acting."""
    model = run.job.model
    evaluator = Evaluator(model, run.job.spec, run.timer)
    with run.timer.phase("evaluation"):
        stacked = once_more(
            model, lambda: stack(list(committed), device=model.device), f"stacking {len(committed)} deltas"
        )
    found: list[EditScores] = []
    with progress(f"scoring after edit {count}", count, show) as line:
        for start in range(0, count, batch_size):
            part = run.job.edits[start : min(start + batch_size, count)]
            found += evaluator.scores(part, stacked, shared=True)
            line.advance(len(part))
    return found
