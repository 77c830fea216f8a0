"""The edits that are fitted together: prefix once, then the tail at label positions, step after step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastedit.backbone import EditableModel, Held, PackedState
from fastedit.backbone.packed_forward import packed_tail
from fastedit.deltas import EditDelta, Rows, StackedDelta
from fastedit.deltas.install import RowsHolder
from fastedit.engine.profiling.timing import PhaseTimer
from fastedit.fitting.prepared import EditRows
from fastedit.fitting.solver import FitOutcome
from fastedit.objectives import Losses, Objective, TokenBatch

#: Share of the places that must be free before others enter (they are encoded together), and of the rows that must
#: have ended before they are taken out: both rearrange everything.
WORTH_WHILE = 4


#: Numbers and rows of edits to the values that parts of their deltas start from.
Begin = Callable[[Sequence[int], Sequence[EditRows]], Sequence[Mapping[str, Tensor]]]


class BatchProblem:
    """Losses of the edits in B places at the current deltas (``fastedit.fitting.solver.Problem``).

    The deltas must be installed while this is used.

    Args:
        model: frozen.
        stacked: the deltas of the B places.
        holders: of the deltas that act, that of ``stacked`` first; paused while anything unedited is computed.
        held: outputs that are kept between steps.
        objective: per-edit losses.
        waiting: numbers of the edits that are to be fitted; taken from the left.
        make: prepares the rows of edits.
        begin: first values of the deltas of edits that enter, where the method has any of its own.
        take: gets every edit that has ended, its delta and its outcome; no delta acts meanwhile.
        timer: seconds by phase.
        on_step: gets the steps taken so far by all edits that are at work, before each of them.
    """

    def __init__(
        self,
        model: EditableModel,
        stacked: StackedDelta,
        holders: Sequence[RowsHolder],
        held: Held,
        objective: Objective,
        waiting: deque[int],
        make: Callable[[Sequence[int]], list[EditRows]],
        take: Callable[[int, EditDelta, FitOutcome], None],
        timer: PhaseTimer,
        begin: Begin | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> None:
        self.begin, self.on_step = begin, on_step
        self.model, self.stacked, self.holders, self.held = model, stacked, holders, held
        self.objective, self.waiting, self.make, self.take, self.timer = objective, waiting, make, take, timer
        #: By place, the number of its edit and its rows, in order of the places.
        self.working: dict[int, tuple[int, EditRows]] = {}
        self._ended: set[int] = set()
        self._tokens: _Tokens | None = None

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Time a part of the loop."""
        return self.timer.phase(name)

    def losses(self, steps: Tensor) -> Losses:
        """Losses of all places; one without rows has no tokens."""
        if self.on_step is not None:
            self.on_step(sum(int(steps[place]) for place in self.working if place not in self._ended))
        with self.timer.phase("tail_forward"):
            if self._tokens is None:
                self._tokens = self._assembled()
            tokens = self._tokens
            hidden = packed_tail(self.model, tokens.state)
            logits = self.model.head(hidden)
        with self.timer.phase("objective"):
            batch = TokenBatch(
                hidden=hidden,
                logits=logits,
                labels=tokens.labels,
                edit=tokens.edit,
                role=tokens.role,
                n_edits=self.stacked.size,
                reference=tokens.reference,
                flat=self.stacked.parameters_as_input(),
            )
            losses = self.objective(batch, steps)
            own = self.stacked.extra_loss()
            return losses if own is None else replace(losses, total=losses.total + own)

    def ended(self, outcomes: Mapping[int, FitOutcome]) -> None:
        """Hand over the deltas of edits that have ended."""
        for place, outcome in outcomes.items():
            with self.timer.phase("store"):
                delta = self.stacked.unstack(place)
            self._ended.add(place)
            with self.paused():
                self.take(self.working[place][0], delta, outcome)

    def started(self, places: Sequence[int]) -> None:
        """Give the edits that have entered what their deltas start from."""
        if self.begin is None:
            return
        with self.paused():
            found = [self.working[place] for place in places]
            values = self.begin([number for number, _ in found], [rows for _, rows in found])
        for place, own in zip(places, values, strict=True):
            self.stacked.set(place, own)

    def refill(self, free: Sequence[int], *, idle: bool) -> Sequence[int]:
        """Let waiting edits into free places once enough are free; take out the rows of those that have ended."""
        entering = min(len(free), len(self.waiting))
        enough = idle or len(free) * WORTH_WHILE >= self.stacked.size
        if (entering and enough) or len(self._ended) * WORTH_WHILE >= len(self.working):
            self._drop()
        if not (entering and enough):
            return []
        # Out of the queue only once they are in: what fails on the way is still waiting
        chosen = [self.waiting[number] for number in range(entering)]
        with self.paused():
            rows = self.make(chosen)
        places = list(free)[:entering]
        for place, number, own in zip(places, chosen, rows, strict=True):
            self.waiting.popleft()
            self.working[place] = (number, own)
        self.working = dict(sorted(self.working.items()))
        self._tokens = None
        return places

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside the block the model is the unedited one."""
        with ExitStack() as entered:
            entered.enter_context(self.held.paused())
            for holder in self.holders:
                entered.enter_context(holder.paused())
            yield

    def _drop(self) -> None:
        for place in self._ended:
            del self.working[place]
        if self._ended:
            self._tokens = None
        self._ended = set()

    def _assembled(self) -> _Tokens:
        """All rows at work as one batch, in order of the places."""
        self.held.clear()
        counts = [0] * self.stacked.size
        for place, (_, rows) in self.working.items():
            counts[place] = len(rows.state)
        self.holders[0].rows = Rows(tuple(counts))
        self.stacked.row_roles = tuple(role for _, rows in self.working.values() for role in rows.row_roles)
        parts = [rows for _, rows in self.working.values()]
        references = [rows.reference for rows in parts if rows.reference is not None]
        sizes = torch.tensor([len(rows.labels) for rows in parts])
        edit = torch.repeat_interleave(torch.tensor(list(self.working)), sizes)
        return _Tokens(
            state=PackedState.cat([rows.state for rows in parts]),
            labels=torch.cat([rows.labels for rows in parts]),
            role=torch.cat([rows.role for rows in parts]),
            edit=edit.to(self.model.device),
            reference=torch.cat(references) if references else None,
        )


@dataclass
class _Tokens:
    """Everything of a step that the step before had too."""

    state: PackedState
    labels: Tensor
    role: Tensor
    edit: Tensor
    reference: Tensor | None
