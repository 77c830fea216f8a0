"""The edits that are fitted together: prefix once, then the tail at label positions, step after step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fastedit.backbone import EditableModel, Held, PackedState
from fastedit.backbone.walk import hold_constant, packed_prefix, packed_start, packed_tail
from fastedit.deltas import DeltaSpec, EditDelta, Rows, StackedDelta
from fastedit.deltas.install import RowsHolder
from fastedit.engine.timing import PhaseTimer
from fastedit.engine.views import TrainingView
from fastedit.objectives import Losses, Objective, Role, TokenBatch
from fastedit.requests import Query
from fastedit.solver import FitOutcome

FFN_NAMES = frozenset({"up", "gate", "down"})
#: Share of the places that must be free before others enter (they are encoded together), and of the rows that must
#: have ended before they are taken out: both rearrange everything.
WORTH_WHILE = 4


def split_point(spec: DeltaSpec) -> tuple[int, str]:
    """The last point of the model that the delta cannot reach: (layer, "attention" | "ffn").

    Everything before it is constant while the delta is fitted.
    """
    layer = min(site.layer for site in spec.sites)
    names = {site.name for site in spec.sites if site.layer == layer}
    return layer, "ffn" if names <= FFN_NAMES else "attention"


@dataclass
class EditRows:
    """The rows of one edit with all that is constant over its steps.

    Args:
        state: its rows where the delta begins to matter; its wanted tokens carry labels.
        labels: (T,) int64. role: (T,) int64, values of Role.
        reference: (T', V) logits of the unedited model for the tokens of locality roles, or None.
    """

    state: PackedState
    labels: Tensor
    role: Tensor
    reference: Tensor | None


@torch.no_grad()
def prepare(
    model: EditableModel,
    spec: DeltaSpec,
    views: Sequence[Sequence[TrainingView]],
    timer: PhaseTimer,
) -> list[EditRows]:
    """Encode the views of some edits, run the frozen prefix once, keep the unedited logits of the locality views.

    No delta may act meanwhile: the reference is the unedited model.
    """
    caches = model.caches
    flat = [view for vs in views for view in vs]
    point = (*split_point(spec), spec.positions)
    with timer.phase("prefix"):
        states = caches.states.get_all([(point, _key(view.query)) for view in flat])
    missing = [number for number, state in enumerate(states) if state is None]
    if missing:
        with timer.phase("encode"):
            encoded = model.encode([flat[number].query for number in missing], answers=True)
            labels = encoded.labels[encoded.label_mask]
        with timer.phase("prefix"):
            state = packed_prefix(model, packed_start(model, encoded), point[0], point[1])
            if spec.positions == "after_image":
                state = hold_constant(model, state)
            parts = torch.split(labels, list(state.wanted_counts))
            for row, number in enumerate(missing):
                found = (state.of_row(row), parts[row])
                if flat[number].role >= Role.TEXT_LOCALITY:
                    # Drawn from a pool, and so likely to come again. A copy: a slice would keep the batch in memory
                    found = (found[0].map(torch.clone), found[1].clone())
                    caches.states.put((point, _key(flat[number].query)), found)
                states[number] = found
    known = [state for state in states if state is not None]
    out = [number for number, view in enumerate(flat) if view.role >= Role.TEXT_LOCALITY]
    logits = _references(model, flat, known, out, timer)
    rows: list[EditRows] = []
    first = 0
    for vs in views:
        numbers = range(first, first + len(vs))
        first += len(vs)
        own = [logits[number] for number in numbers if number in logits]
        role = [torch.full_like(known[number][1], int(flat[number].role)) for number in numbers]
        rows.append(
            EditRows(
                PackedState.cat([known[number][0] for number in numbers]),
                torch.cat([known[number][1] for number in numbers]),
                torch.cat(role),
                torch.cat(own) if own else None,
            )
        )
    return rows


def _references(
    model: EditableModel,
    flat: Sequence[TrainingView],
    known: Sequence[tuple[PackedState, Tensor]],
    out: Sequence[int],
    timer: PhaseTimer,
) -> dict[int, Tensor]:
    """Unedited logits (T, V) at the labels of the given views, by number of the view."""
    if not out:
        return {}
    caches = model.caches
    with timer.phase("reference"):
        found = dict(zip(out, caches.references.get_all([_key(flat[number].query) for number in out]), strict=True))
        missing = [number for number in out if found[number] is None]
        if missing:
            state = PackedState.cat([known[number][0] for number in missing])
            logits = model.head(packed_tail(model, state))
            for number, part in zip(missing, torch.split(logits, list(state.wanted_counts)), strict=True):
                found[number] = part.clone()
                caches.references.put(_key(flat[number].query), found[number])
    return {number: part for number, part in found.items() if part is not None}


def _key(query: Query) -> tuple[str, str, str]:
    from fastedit.data.images import image_key

    return query.prompt, "" if query.image is None else image_key(query.image), query.answer or ""


class BatchProblem:
    """Losses of the edits in B places at the current deltas (``fastedit.solver.Problem``).

    The deltas must be installed while this is used.

    Args:
        model: frozen.
        stacked: the deltas of the B places.
        holders: of the deltas that act, that of ``stacked`` first; paused while anything unedited is computed.
        held: outputs that are kept between steps.
        objective: per-edit losses.
        waiting: numbers of the edits that are to be fitted; taken from the left.
        make: prepares the rows of edits.
        take: gets every edit that has ended, its delta and its outcome; no delta acts meanwhile.
        timer: seconds by phase.
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
    ) -> None:
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
            return self.objective(batch, steps)

    def ended(self, outcomes: Mapping[int, FitOutcome]) -> None:
        """Hand over the deltas of edits that have ended."""
        for place, outcome in outcomes.items():
            with self.timer.phase("store"):
                delta = self.stacked.unstack(place)
            self._ended.add(place)
            with self.paused():
                self.take(self.working[place][0], delta, outcome)

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
