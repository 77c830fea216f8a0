"""How the edits of a run follow one another: each alone on the base model, or in sequence."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Any

from fastedit.deltas import EditDelta, accumulate, company, stack
from fastedit.deltas.growing import Beneath, GrowingSum, grows
from fastedit.engine.checks import question_of
from fastedit.engine.evaluate import Evaluator
from fastedit.engine.fitting import make_deltas
from fastedit.engine.leaving import Fitted
from fastedit.engine.memory.oom import Halving, once_more, peak_memory_mib
from fastedit.engine.retention import Retention
from fastedit.engine.run_state import RunState
from fastedit.evaluation import EditScores, summarise
from fastedit.methods.base import Method
from fastedit.progress import ProgressLine, progress

#: Of an edit's time, what its fit takes and not its scoring, before any is known.
FIT_SHARE = 0.7


#: The state in which single edits are scored: each alone on the base model.
ALONE = "alone"


def run_single(
    run: RunState, batch_size: int, evaluate: bool, show: bool | None, numbers: Sequence[int] | None = None
) -> None:
    """Every edit alone on the base model; where memory runs out, half as many together. ``numbers``: only these."""
    if run.workers is not None:
        run.workers.single(run, batch_size, evaluate, show)
        return
    ended, every = run.ended, range(len(run.job.edits)) if numbers is None else numbers
    waiting = deque(number for number in every if number not in ended.outcomes)
    room = Halving(run.job.model, batch_size, "in a batch of {}", "batches of {}")
    with progress("editing", len(every), show, unit="edits") as line:
        scored = Scoring(run, batch_size, line) if evaluate else None
        run.on_step = line.underway if scored is None else scored.fitting

        def take(number: int, fitted: Fitted) -> None:
            room.done += 1
            note_outcomes(run, line)
            if scored is None:
                line.advance()
            else:
                scored.add(number, fitted)

        if scored is None:
            line.skip(len(every) - len(waiting))
        else:
            scored.recall()
        while waiting:
            with room.trial(min(room.size, len(waiting))):
                make_deltas(run, waiting, room.trying, Beneath(), take)
            # Those that were at work begin anew
            waiting = deque(number for number in every if number not in ended.outcomes)
        if scored is not None:
            scored.flush()


def note_outcomes(run: RunState, line: ProgressLine) -> None:
    """Tell a progress line how many edits have failed and the memory that the run has used."""
    line.note(failed=run.ended.failed, memory_mib=peak_memory_mib(run.job.model.device))


class Scoring:
    """Scores edits that have ended, a batch at a time."""

    def __init__(self, run: RunState, batch_size: int, line: ProgressLine) -> None:
        self.run, self.line = run, line
        self._room = Halving(run.job.model, batch_size, "scoring {} edits")
        self._evaluator = Evaluator(run.job.model, run.job.spec, run.timer)
        self._ended: dict[int, Fitted] = {}
        self._share = FIT_SHARE

    def recall(self) -> None:
        """Take over the scores of edits that had ended before; those that have none are scored first."""
        ended = self.run.ended
        known = ended.known_scores(ALONE)
        ended.scores.update({number: known[number] for number in ended.outcomes if number in known})
        self.line.skip(len(ended.scores))
        missing = [number for number in sorted(ended.outcomes) if number not in known]
        for number, delta in zip(missing, ended.deltas_of(missing), strict=True):
            self.add(number, Fitted(None, delta))

    def add(self, number: int, fitted: Fitted) -> None:
        """One more has ended."""
        self._ended[number] = fitted
        if len(self._ended) >= self._room.size:
            self.flush()

    def fitting(self, edits: float) -> None:
        """The steps of the edits at work amount to so many edits."""
        self.line.underway(self._share * (edits + len(self._ended)))

    def flush(self) -> None:
        """Score those that wait for it."""
        # Scores are of edits that are kept: one that could not be is fitted again
        self.run.leaving.land()
        self._ended = {number: each for number, each in self._ended.items() if number in self.run.ended.outcomes}
        # What memory has no room for beside a batch stays here until there is room
        while self._ended:
            part = dict(islice(self._ended.items(), self._room.size))
            with self._room.trial(len(part)):
                try:
                    stacked = stack([fitted.nearest for fitted in part.values()], device=self.run.job.model.device)
                    found = self._evaluator.scores([self.run.job.edits[number] for number in part], stacked)
                except BaseException:
                    # Room may be short
                    self.run.leaving.release()
                    raise
                scores = dict(zip(part, found, strict=True))
                self.run.ended.keep_scores(ALONE, scores)
                self.run.ended.scores.update(scores)
                self._room.done += len(part)
                self.line.advance(len(part))
                self._ended = {number: each for number, each in self._ended.items() if number not in part}
                spent = self.run.timer.total()
                self._share = self.run.timer.total(without=("evaluation",)) / spent if spent else FIT_SHARE


def run_sequential(run: RunState, batch_size: int, evaluate: bool, show: bool | None, score_at: Sequence[int]) -> None:
    """Edits in order; scores of all edits so far after so many (``run.ended.checkpoints``), and after the last.

    Edits that a router keeps apart are fitted together, as they do not see each other; those that add up are fitted one
    after another, each on top of the earlier ones. Where a store has earlier edits, all begins with those.
    """
    apart = run.job.plan.method.sequence == "route"
    if apart:
        run_single(run, batch_size, False, show)
    run.retention = Retention.of(run.job, run.timer)
    sequence = InSequence(run, batch_size, show)
    label = "scoring in sequence" if apart else "editing in sequence"

    def score() -> list[EditScores]:
        found = sequence.scores()
        return [found[number] for number in sorted(found)]

    with progress(label, len(run.job.edits), show, unit="edits") as line:
        run.on_step = line.underway
        timeline = list(run.ended.timeline())
        before = run.ended.deltas_of(range(len(timeline))) if run.ended.store is None else run.ended.store.acting()
        ended = {**run.ended.outcomes, **run.ended.set_aside}
        waiting = [number for number in range(len(run.job.edits)) if number not in ended]
        for place, number in enumerate([*timeline, *waiting]):
            if place >= len(timeline):
                assert number is not None
                sequence.add(number, _next(run, number, sequence))
            else:
                # Not read where it stays in the store
                sequence.add(number, None if sequence.is_stored else Fitted(None, before[place]))
            if number is None:
                continue
            note_outcomes(run, line)
            line.advance()
            if evaluate and len(sequence.numbers) in score_at:
                run.ended.checkpoints[len(sequence.numbers)] = summarise(score(), seed=run.job.seed)
    if evaluate:
        run.ended.scores.update(sequence.scores())


class InSequence:
    """What acts of a sequence as it grows, and the scores of its edits.

    Where edits simply add up, their sum stays on the device and takes up one after another; the deltas are put together
    on the host only where they cannot be added up there, or when they are scored.

    Args:
        run: that the edits belong to. batch_size: edits that are scored together. show: progress lines.
    """

    def __init__(self, run: RunState, batch_size: int, show: bool | None) -> None:
        self.run, self.batch_size, self.show = run, batch_size, show
        #: Deltas that act, where they are held as such.
        self.committed: list[EditDelta] = []
        #: Of the run's edits, in the order in which they were made.
        self.numbers: list[int] = []
        method = run.job.plan.method
        plain = method.combine is Method.combine
        self._is_plain = method.sequence == "route" and plain
        #: Whether what acts is what the store has, one delta an edit: none of it is held in memory then.
        self.is_stored = self._is_plain and run.ended.store is not None
        #: What acts beneath the next edit, and whether that is all that acts; None where edits do not simply add up.
        self._sum = GrowingSum(run.job.model.device) if method.sequence == "accumulate" and plain else None
        self._sum_is_all = True
        self._places = 0

    def add(self, number: int | None, new: Fitted | None) -> None:
        """One more edit acts, of this run or of another one; its delta is None where the store has it."""
        self._places += 1
        if number is not None:
            self.numbers.append(number)
        if new is not None:
            once_more(self.run.job.model, partial(self._take_up, new), "adding up {} edit")
        if self.run.retention is not None and number is not None:
            self.run.retention.take_up(number, self.beneath(number).stacks)

    def _take_up(self, fitted: Fitted) -> None:
        job, new = self.run.job, fitted.in_memory
        assert new is not None
        if self._is_plain:
            # In place: a copy for every edit would make a long sequence quadratic
            self.committed.append(new)
            return
        if self._sum is not None and not self.committed:
            # The sum takes up what has not left its device yet
            near = fitted.nearest
            beneath = job.plan.method.active_while_fitting(job.plan.config, [near], "")
            # One that does not add up with those before it is refused there
            if all(grows(delta) for delta in beneath) or len(self._sum):
                self._sum_is_all = self._sum_is_all and len(beneath) == 1 and beneath[0] is near
                for delta in beneath:
                    self._sum.add(delta, new.id)
                return
        self.committed = job.plan.method.combine(job.plan.config, self.committed, new)

    def beneath(self, number: int) -> Beneath:
        """What acts while an edit of the run is made (closed memories of a method do not)."""
        job = self.run.job
        if self._sum is not None and not self.committed:
            return Beneath((self._sum,), self._sum.company) if len(self._sum) else Beneath()
        question = question_of(job.edits[number])
        acting = job.plan.method.active_while_fitting(job.plan.config, self.committed, question)
        return Beneath([stack([delta], device=job.model.device) for delta in acting], company(acting))

    def _acting(self) -> Any:
        """All that acts, stacked."""
        if self._sum is not None and not self.committed and self._sum_is_all:
            return self._sum
        return stack(self._acting_deltas(), device=self.run.job.model.device)

    def _acting_deltas(self) -> Sequence[EditDelta]:
        """All that acts."""
        ended, store = self.run.ended, self.run.ended.store
        if self._sum is not None and not self.committed:
            made = ended.deltas_of(self.numbers) if store is None else store.acting(self._places)
            return [accumulate(list(made))]
        return self.committed if store is None or not self.is_stored else store.acting(self._places)

    def _scored(self) -> list[int]:
        """The edits so far that are scored: all, or as many of them as are wanted, drawn for this length."""
        most = self.run.score_sample
        if most is None or len(self.numbers) <= most:
            return self.numbers
        rng = random.Random(f"{self.run.job.seed}|{len(self.numbers)}|scored")
        return sorted(rng.sample(self.numbers, most))

    def scores(self) -> dict[int, EditScores]:
        """Scores of the edits so far, or of a sample of them, with what acts now."""
        run, store, model, wanted = self.run, self.run.ended.store, self.run.job.model, self._scored()
        state = "" if store is None else store.state(self._places)
        known = run.ended.known_scores(state)
        found = {number: known[number] for number in wanted if number in known}
        missing = [number for number in wanted if number not in known]
        if not missing:
            return found
        if run.workers is not None:
            made = run.workers.together(run, self._acting_deltas(), missing, state, self.batch_size, self.show)
            return found | made
        with run.timer.phase("evaluation"):
            stacked = once_more(model, self._acting, f"stacking {self._places} deltas")
        label = f"scoring after edit {len(self.numbers)}"
        return found | score_together(run, stacked, missing, state, self.batch_size, label, self.show)


def score_together(
    run: RunState,
    stacked: Any,
    numbers: Sequence[int],
    state: str,
    batch_size: int,
    label: str,
    show: bool | None,
) -> dict[int, EditScores]:
    """Score edits here while all stacked deltas act, and keep the scores as those of a state."""
    evaluator = Evaluator(run.job.model, run.job.spec, run.timer)
    found: dict[int, EditScores] = {}
    with progress(label, len(numbers), show) as line:
        for start in range(0, len(numbers), batch_size):
            part = numbers[start : start + batch_size]
            scored = evaluator.scores([run.job.edits[number] for number in part], stacked, shared=True)
            scores = dict(zip(part, scored, strict=True))
            run.ended.keep_scores(state, scores)
            found |= scores
            line.advance(len(part))
    return found


def _next(run: RunState, number: int, sequence: InSequence) -> Fitted:
    """The delta of one edit, made on top of those before it."""
    made: list[Fitted] = []

    def take(_number: int, fitted: Fitted) -> None:
        made.append(fitted)

    beneath = once_more(run.job.model, lambda: sequence.beneath(number), "stacking what acts")
    once_more(run.job.model, lambda: make_deltas(run, deque([number]), 1, beneath, take), "in a sequence")
    return made[-1]
