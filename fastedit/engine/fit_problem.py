"""The edits that are fitted together: prefix once, then the tail at label positions, step after step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fastedit.backbone import EditableModel, Held, PackedState
from fastedit.backbone.packed_forward import packed_tail
from fastedit.deltas import EditDelta, Rows, StackedDelta
from fastedit.deltas.base import FlatStack
from fastedit.deltas.install import RowsHolder
from fastedit.deltas.sketch import sketched
from fastedit.engine.profiling.timing import PhaseTimer
from fastedit.fitting.prepared import EditRows
from fastedit.fitting.solver import FitOutcome
from fastedit.objectives import BatchLayout, Losses, Objective, TokenBatch, branch_of
from fastedit.objectives.roles import KL_ROLES

#: Share of the slots that must be free before others enter (they are encoded together), and of the rows that must
#: have ended before they are taken out: both rearrange everything.
REFILL_FRACTION = 0.25

#: Gets an edit that has ended: its number, its delta and its outcome; no delta acts meanwhile.
OnFinished = Callable[[int, EditDelta, FitOutcome], None]


@dataclass
class ActiveDeltas:
    """What acts while edits are fitted.

    Args:
        model: frozen.
        stacked: the deltas of the B slots.
        holders: of the deltas that act, that of ``stacked`` first.
        held: outputs that are kept between steps.
    """

    model: EditableModel
    stacked: StackedDelta
    holders: Sequence[RowsHolder]
    held: Held

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside the block the model is the unedited one."""
        with ExitStack() as entered:
            entered.enter_context(self.held.paused())
            for holder in self.holders:
                entered.enter_context(holder.paused())
            yield


@dataclass
class WaitingEdits:
    """Edits that are to be fitted.

    Args:
        numbers: of the edits; taken from the left.
        prepare: makes their rows.
        start: first values of their deltas, by part; None where the kind's own are.
    """

    numbers: deque[int]
    prepare: Callable[[Sequence[int]], list[EditRows]]
    start: Callable[[Sequence[int], Sequence[EditRows]], Sequence[Mapping[str, Tensor]]] | None = None


class FitProblem:
    """Losses of the edits in B slots at the current deltas (``fastedit.fitting.solver.Problem``).

    The deltas must be installed while this is used.

    Args:
        active: the deltas and what else acts; paused while anything unedited is computed.
        waiting: edits that enter as slots become free.
        objective: per-edit losses.
        timer: seconds by phase.
        on_finished: gets every edit that has ended.
        on_step: gets the steps taken so far by all edits that are at work, before each of them.
    """

    def __init__(
        self,
        active: ActiveDeltas,
        waiting: WaitingEdits,
        objective: Objective,
        timer: PhaseTimer,
        *,
        on_finished: OnFinished,
        on_step: Callable[[int], None] | None = None,
    ) -> None:
        self.active, self.waiting, self.objective, self.timer = active, waiting, objective, timer
        self.on_finished, self.on_step = on_finished, on_step
        #: By slot, the number of its edit and its rows, in order of the slots.
        self.working: dict[int, tuple[int, EditRows]] = {}
        #: By slot, the optimiser steps that its edit has taken, as long as it is at work.
        self._taken: dict[int, int] = {}
        self._ended: set[int] = set()
        #: The same of the step that is made now, without the slots; how often the rows were arranged anew.
        self._taken_now: frozenset[int] = frozenset()
        self._arrangement = 0
        self._tokens: _Tokens | None = None

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Time a part of the loop."""
        return self.timer.phase(name)

    def next_step(self) -> tuple[int, Hashable]:
        """How often the rows were arranged anew, and the branch of the objective."""
        if self.on_step is not None:
            self.on_step(sum(self._taken.values()))
        self._taken_now = frozenset(self._taken.values())
        self._taken = {slot: taken + 1 for slot, taken in self._taken.items()}
        return self._arrangement, branch_of(self.objective, self._taken_now)

    def losses(self, steps: Tensor) -> Losses:
        """Losses of all slots; one without rows has no tokens."""
        model, stacked = self.active.model, self.active.stacked
        with self.timer.phase("tail_forward"):
            if self._tokens is None:
                self._tokens = self._assembled()
            tokens = self._tokens
            hidden = packed_tail(model, tokens.state)
            if tokens.order is not None:
                hidden = hidden.index_select(0, tokens.order)
            logits = model.head(hidden)
        with self.timer.phase("objective"):
            batch = TokenBatch(
                hidden=hidden,
                logits=logits,
                labels=tokens.labels,
                edit=tokens.edit,
                role=tokens.role,
                n_edits=stacked.size,
                reference=tokens.reference,
                flat=stacked.parameters_as_input(),
                sketched=partial(sketched, stacked) if isinstance(stacked, FlatStack) else None,
                layout=tokens.layout,
                taken=self._taken_now,
            )
            losses = self.objective(batch, steps)
            extra = stacked.extra_loss()
            return losses if extra is None else replace(losses, total=losses.total + extra)

    def ended(self, outcomes: Mapping[int, FitOutcome]) -> None:
        """Hand over the deltas of edits that have ended."""
        for slot, outcome in outcomes.items():
            with self.timer.phase("store"):
                delta = self.active.stacked.unstack(slot)
            self._ended.add(slot)
            del self._taken[slot]
            with self.active.paused():
                self.on_finished(self.working[slot][0], delta, outcome)

    def started(self, slots: Sequence[int]) -> None:
        """Give the edits that have entered what their deltas start from."""
        if self.waiting.start is None:
            return
        with self.active.paused():
            entered = [self.working[slot] for slot in slots]
            values = self.waiting.start([number for number, _ in entered], [rows for _, rows in entered])
        for slot, parts in zip(slots, values, strict=True):
            self.active.stacked.set(slot, parts)

    def refill(self, free: Sequence[int], *, idle: bool) -> Sequence[int]:
        """Let waiting edits into free slots once enough are free; take out the rows of those that have ended."""
        numbers = self.waiting.numbers
        entering = min(len(free), len(numbers))
        enough = idle or len(free) >= REFILL_FRACTION * self.active.stacked.size
        if (entering and enough) or len(self._ended) >= REFILL_FRACTION * len(self.working):
            self._drop()
        if not (entering and enough):
            return []
        # Out of the queue only once they are in: what fails on the way is still waiting
        chosen = [numbers[index] for index in range(entering)]
        with self.active.paused():
            prepared = self.waiting.prepare(chosen)
        slots = list(free)[:entering]
        for slot, number, rows in zip(slots, chosen, prepared, strict=True):
            numbers.popleft()
            self.working[slot] = (number, rows)
            self._taken[slot] = 0
        self.working = dict(sorted(self.working.items()))
        self._rearrange()
        return slots

    def _drop(self) -> None:
        for slot in self._ended:
            del self.working[slot]
        if self._ended:
            self._rearrange()
        self._ended = set()

    def _rearrange(self) -> None:
        self._tokens = None
        self._arrangement += 1

    def _assembled(self) -> _Tokens:
        """All rows at work as one batch, in order of the slots."""
        active = self.active
        active.held.clear()
        counts = [0] * active.stacked.size
        for slot, (_, rows) in self.working.items():
            counts[slot] = len(rows.state)
        active.holders[0].rows = Rows(tuple(counts))
        active.stacked.row_roles = tuple(role for _, rows in self.working.values() for role in rows.row_roles)
        parts = [rows for _, rows in self.working.values()]
        references = [rows.reference for rows in parts if rows.reference is not None]
        edit = [slot for slot, (_, rows) in self.working.items() for _ in range(len(rows.labels))]
        role = [
            role
            for rows in parts
            for role, count in zip(rows.row_roles, rows.state.wanted_counts, strict=True)
            for _ in range(count)
        ]
        # What must change before what must stay: their logits are parts of one matrix then, and need no copies
        order = sorted(range(len(role)), key=lambda token: role[token] in KL_ROLES)
        edit, role = ([values[token] for token in order] for values in (edit, role))
        device, labels = active.model.device, torch.cat([rows.labels for rows in parts])
        is_sorted = order == list(range(len(order)))
        numbers = None if is_sorted else torch.tensor(order).to(device)
        return _Tokens(
            state=PackedState.cat([rows.state for rows in parts]),
            labels=labels if numbers is None else labels.index_select(0, numbers),
            role=torch.tensor(role, dtype=torch.long).to(device),
            edit=torch.tensor(edit, dtype=torch.long).to(device),
            reference=torch.cat(references) if references else None,
            order=numbers,
            layout=BatchLayout(edit, role, active.stacked.size, device),
        )


@dataclass
class _Tokens:
    """Everything of a step that the step before had too; ``order`` puts the tail's tokens as these stand."""

    state: PackedState
    labels: Tensor
    role: Tensor
    edit: Tensor
    reference: Tensor | None
    order: Tensor | None
    layout: BatchLayout
