"""One batch of edits in the optimiser loop: prefix once, then the tail at label positions, step after step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from fastedit.backbone import EditableModel, Encoded, Held, PrefixState
from fastedit.deltas import DeltaSpec, Rows, StackedDelta
from fastedit.deltas.install import RowsHolder
from fastedit.engine.timing import PhaseTimer
from fastedit.engine.views import TrainingView
from fastedit.objectives import Losses, Objective, Role, TokenBatch

FFN_NAMES = frozenset({"up", "gate", "down"})


def split_point(spec: DeltaSpec) -> tuple[int, str]:
    """The last point of the model that the delta cannot reach: (layer, "attention" | "ffn").

    Everything before it is constant while the delta is fitted.
    """
    layer = min(site.layer for site in spec.sites)
    names = {site.name for site in spec.sites if site.layer == layer}
    return layer, "ffn" if names <= FFN_NAMES else "attention"


@dataclass
class Layout:
    """Where the label tokens of a batch of rows are, and what they are for.

    Args:
        positions: (R, M) int64, positions whose next token is a label, in order; -1 pads.
        labels: (T,) int64, T = number of valid positions, row after row.
        row_of_token: (T,) int64.
    """

    positions: Tensor
    labels: Tensor
    row_of_token: Tensor

    @classmethod
    def of(cls, encoded: Encoded) -> Layout:
        """Read it off encoded rows."""
        mask = encoded.label_mask
        return cls(encoded.label_positions(), encoded.labels[mask], torch.nonzero(mask)[:, 0])

    @property
    def valid(self) -> Tensor:
        """(R, M) bool."""
        return self.positions >= 0

    def select(self, rows: Tensor) -> Layout:
        """Only the given rows (n,) int64, renumbered."""
        number = torch.full((self.positions.shape[0],), -1, dtype=torch.long, device=rows.device)
        number[rows] = torch.arange(len(rows), device=rows.device)
        new_row = number[self.row_of_token]
        kept = new_row >= 0
        return Layout(self.positions[rows], self.labels[kept], new_row[kept])


def head_at(model: EditableModel, state: PrefixState, layout: Layout) -> tuple[Tensor, Tensor]:
    """Final hidden states (T, d) and logits (T, V) at the layout's positions, from a prefix state."""
    hidden = model.tail(state, positions=None if state.gathered else layout.positions)[layout.valid]
    return hidden, model.head(hidden)


class BatchProblem:
    """Losses of B edits at the current deltas (``fastedit.solver.Problem``).

    The deltas must be installed while this is used, with ``holder`` as their rows.

    Args:
        model: frozen.
        stacked: the deltas of the B edits.
        holder: the rows of the installed hooks.
        objective: per-edit losses.
        views: of each edit, sorted by role.
        timer: seconds by phase.
        prepared: what is constant over the steps.
        held: outputs that are kept between steps, forgotten when rows leave.
    """

    def __init__(
        self,
        model: EditableModel,
        stacked: StackedDelta,
        holder: RowsHolder,
        objective: Objective,
        views: Sequence[Sequence[TrainingView]],
        timer: PhaseTimer,
        prepared: PreparedRows,
        held: Held,
    ) -> None:
        self.model, self.stacked, self.holder, self.objective, self.timer = model, stacked, holder, objective, timer
        self.held = held
        self.state, self.layout, self.reference = prepared.state, prepared.layout, prepared.reference
        device = self.layout.labels.device
        self.edit_of_row = torch.tensor([b for b, vs in enumerate(views) for _ in vs], device=device)
        self.role_of_row = torch.tensor([int(v.role) for vs in views for v in vs], device=device)
        self._renumber()

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Time a part of the loop."""
        return self.timer.phase(name)

    def losses(self, step: int) -> Losses:
        """Losses of all B edits; a finished edit has no tokens."""
        with self.timer.phase("tail_forward"):
            hidden, logits = head_at(self.model, self.state, self.layout)
        with self.timer.phase("objective"):
            tokens = TokenBatch(
                hidden=hidden,
                logits=logits,
                labels=self.layout.labels,
                edit=self.edit_of_row[self.layout.row_of_token],
                role=self.role_of_row[self.layout.row_of_token],
                n_edits=self.stacked.size,
                reference=self.reference,
                flat=self.stacked.parameters_as_input(),
            )
            return self.objective(tokens, step)

    def keep(self, active: Tensor) -> None:
        """Drop the rows of finished edits."""
        rows = torch.nonzero(active[self.edit_of_row]).flatten()
        if len(rows) == len(self.edit_of_row):
            return
        if self.reference is not None:
            out = self._is_out(self.role_of_row)[self.layout.row_of_token]
            kept = active[self.edit_of_row][self.layout.row_of_token]
            self.reference = self.reference[kept[out]]
        self.held.clear()
        self.state, self.layout = self.state.select(rows), self.layout.select(rows)
        self.edit_of_row, self.role_of_row = self.edit_of_row[rows], self.role_of_row[rows]
        self._renumber()

    def _renumber(self) -> None:
        counts = torch.bincount(self.edit_of_row, minlength=self.stacked.size)
        self.holder.rows = Rows(tuple(counts.tolist()))

    @staticmethod
    def _is_out(role: Tensor) -> Tensor:
        return role >= int(Role.TEXT_LOCALITY)


@dataclass
class PreparedRows:
    """What is constant over the steps of a batch: prefix state, label layout, reference logits of locality rows."""

    state: PrefixState
    layout: Layout
    reference: Tensor | None


@torch.no_grad()
def prepare(
    model: EditableModel, spec: DeltaSpec, views: Sequence[Sequence[TrainingView]], timer: PhaseTimer
) -> PreparedRows:
    """Encode the views, run the frozen prefix once, and keep the unedited logits of the locality views.

    No delta may be installed: the reference is the unedited model.
    """
    flat = [view for vs in views for view in vs]
    with timer.phase("encode"):
        encoded = model.encode([view.query for view in flat], answers=True)
        layout = Layout.of(encoded)
    with timer.phase("prefix"):
        layer, stage = split_point(spec)
        state = model.prefix(encoded, layer, stage)
        if stage == "ffn" and layer == model.n_layers - 1:
            # No position sees another any more: keep those that carry labels
            state = state.at(layout.positions)
    reference = None
    out = torch.tensor([i for i, v in enumerate(flat) if v.role >= Role.TEXT_LOCALITY], device=layout.labels.device)
    if len(out):
        with timer.phase("reference"):
            reference = head_at(model, state.select(out), layout.select(out))[1]
    return PreparedRows(state, layout, reference)
