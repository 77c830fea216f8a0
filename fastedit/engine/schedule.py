"""How the edits of a run follow one another: each alone on the base model, or in sequence."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import partial

from fastedit.deltas import EditDelta, stack
from fastedit.engine.checks import question_of
from fastedit.engine.evaluate import Evaluator
from fastedit.engine.memory.oom import Halving, once_more
from fastedit.engine.work import Work, make_deltas
from fastedit.evaluation import EditScores, summarise
from fastedit.fitting.solver import FitOutcome
from fastedit.methods.base import Method
from fastedit.progress import ProgressLine, progress

#: Of an edit's time, what its fit takes and not its scoring, before any is known.
FIT_SHARE = 0.7


def run_single(work: Work, batch_size: int, evaluate: bool, show: bool | None) -> None:
    """Every edit alone on the base model; where memory runs out, half as many together."""
    waiting = deque(range(len(work.edits)))
    room = Halving(work.model, batch_size, "in a batch of {}", "batches of {}")
    with progress("editing", len(work.edits), show) as line:
        scored = Scoring(work, batch_size, line) if evaluate else None
        work.on_step = line.underway if scored is None else scored.fitting

        def take(number: int, delta: EditDelta, outcome: FitOutcome) -> None:
            work.keep(number, delta, outcome)
            room.done += 1
            if scored is None:
                line.advance()
            else:
                scored.add(number, delta)

        while waiting:
            with room.trial(min(room.size, len(waiting))):
                make_deltas(work, waiting, room.trying, (), take)
            # Those that were at work begin anew
            waiting = deque(number for number in range(len(work.edits)) if number not in work.outcomes)
        if scored is not None:
            scored.flush()


class Scoring:
    """Scores edits that have ended, a batch at a time."""

    def __init__(self, work: Work, batch_size: int, line: ProgressLine) -> None:
        self.work, self.line = work, line
        self._room = Halving(work.model, batch_size, "scoring {} edits")
        self._evaluator = Evaluator(work.model, work.spec, work.timer)
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
                stacked = stack([delta for _, delta in part], device=self.work.model.device)
                found = self._evaluator.scores([self.work.edits[number] for number, _ in part], stacked)
                for (number, _), scores in zip(part, found, strict=True):
                    self.work.scored[number] = scores
                    self._room.done += 1
                    self.line.advance()
                del self._ended[: len(part)]
                spent = self.work.timer.total()
                self._share = self.work.timer.total(without=("evaluation",)) / spent if spent else FIT_SHARE


def run_sequential(work: Work, batch_size: int, evaluate: bool, show: bool | None, score_at: Sequence[int]) -> None:
    """Edits in order; scores of all edits so far after so many (``work.checkpoints``), and after the last.

    Edits that a router keeps apart are fitted together, as they do not see each other; those that add up are fitted one
    after another, each on top of the earlier ones.
    """
    apart = work.plan.method.sequence == "route"
    if apart:
        run_single(work, batch_size, False, show)
    committed: list[EditDelta] = []
    label = "scoring in sequence" if apart else "editing in sequence"
    with progress(label, len(work.edits), show) as line:
        work.on_step = line.underway
        deltas = work.all_deltas() if apart else ()
        for index in range(len(work.edits)):
            new = deltas[index] if apart else _next(work, index, committed)
            committed = once_more(work.model, partial(_combined, work, committed, new), "adding up {} edit")
            line.advance()
            if evaluate and index + 1 in score_at:
                scored = score_committed(work, committed, index + 1, batch_size, show)
                work.checkpoints[index + 1] = summarise(scored, seed=work.seed)
    if evaluate:
        scored = score_committed(work, committed, len(work.edits), batch_size, show)
        work.scored.update(enumerate(scored))


def _next(work: Work, index: int, committed: Sequence[EditDelta]) -> EditDelta:
    """The delta of one edit, made on top of the newest committed one (closed memories of a method do not act)."""
    question = question_of(work.edits[index])
    acting = work.plan.method.active_while_fitting(work.plan.config, committed, question)
    fitted: list[EditDelta] = []

    def take(number: int, delta: EditDelta, outcome: FitOutcome) -> None:
        work.keep(number, delta, outcome)
        fitted.append(delta)

    once_more(work.model, lambda: make_deltas(work, deque([index]), 1, acting, take), "in a sequence")
    return fitted[0]


def _combined(work: Work, committed: list[EditDelta], new: EditDelta) -> list[EditDelta]:
    method = work.plan.method
    if method.sequence == "route" and method.combine is Method.combine:
        # In place: a copy for every edit would make a long sequence quadratic
        committed.append(new)
        return committed
    return method.combine(work.plan.config, committed, new)


def score_committed(
    work: Work, committed: Sequence[EditDelta], count: int, batch_size: int, show: bool | None
) -> list[EditScores]:
    """Scores of the first ``count`` edits with the committed deltas acting."""
    evaluator = Evaluator(work.model, work.spec, work.timer)
    with work.timer.phase("evaluation"):
        stacked = once_more(
            work.model, lambda: stack(list(committed), device=work.model.device), f"stacking {len(committed)} deltas"
        )
    found: list[EditScores] = []
    with progress(f"scoring after edit {count}", count, show) as line:
        for start in range(0, count, batch_size):
            part = work.edits[start : min(start + batch_size, count)]
            found += evaluator.scores(part, stacked, shared=True)
            line.advance(len(part))
    return found
