"""Which edit the rows and tokens of a running batch belong to."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastedit.backbone.token_layout import TokenLayout


@dataclass(frozen=True)
class Rows:
    """Which edit each row of a running batch belongs to.

    Args:
        counts: rows per edit; rows are sorted by edit, so edit b owns ``counts[b]`` consecutive rows (0 is allowed).
            None means that every row belongs to the only edit of a stack of one.
    """

    counts: tuple[int, ...] | None = None

    @property
    def total(self) -> int | None:
        """Number of rows, or None when any number will do."""
        return None if self.counts is None else sum(self.counts)

    def tokens_per_row(self, tokens: int, n_edits: int) -> int:
        """How many tokens of a (tokens, d) activation one row holds.

        Raises:
            ValueError: the rows do not fit the stack or the activation.
        """
        if self.counts is None:
            if n_edits != 1:
                raise ValueError(f"rows: a map is needed for more than one edit (got edits={n_edits})")
            return tokens
        if len(self.counts) != n_edits:
            raise ValueError(f"rows: one count per edit (got counts={len(self.counts)}, edits={n_edits})")
        total = sum(self.counts)
        if total == 0 or tokens % total:
            raise ValueError(f"rows: tokens must divide into rows (got tokens={tokens}, rows={total})")
        return tokens // total

    def token_offsets(self, tokens: int, n_edits: int) -> list[int]:
        """Token offsets (n_edits + 1,) of each edit's consecutive tokens in a (tokens, d) activation."""
        if self.counts is None:
            self.tokens_per_row(tokens, n_edits)
            return [0, tokens]
        per_row = self.tokens_per_row(tokens, n_edits)
        offsets = [0]
        for count in self.counts:
            offsets.append(offsets[-1] + count * per_row)
        return offsets

    def offsets_tensor(self, tokens: int, n_edits: int, device: torch.device) -> Tensor:
        """The same as (n_edits + 1,) int64 on a device."""
        return torch.tensor(self.token_offsets(tokens, n_edits), device=device)


def slices_of(edits: Sequence[int]) -> list[slice]:
    """Rows as few slices: what is written to some rows of a device needs no list of them there."""
    found: list[slice] = []
    for edit in sorted(edits):
        if found and found[-1].stop == edit:
            found[-1] = slice(found[-1].start, edit + 1)
        else:
            found.append(slice(edit, edit + 1))
    return found


class TokenSpans:
    """Which packed tokens belong to which edit: what rows are to padded activations.

    Args:
        offsets: edit b owns tokens ``offsets[b]`` to ``offsets[b + 1]``.
        live: (tokens,) bool, where a delta that leaves some tokens alone acts; None is everywhere.
        order: (tokens,) int64, which of the packed tokens these are, sorted by edit; None is all of them as they stand.
        layout: rows and prompts of all packed tokens.
        edits: the numbers of the edits that offsets are of, rising; None is all of a stack's.
    """

    def __init__(
        self,
        offsets: Sequence[int],
        live: Tensor | None = None,
        order: Tensor | None = None,
        layout: TokenLayout | None = None,
        edits: tuple[int, ...] | None = None,
    ) -> None:
        self.edits = edits
        self.offsets, self.live, self.order, self.layout = list(offsets), live, order, layout
        #: For the deltas: what they worked out of the layout.
        self.memory: dict[Any, Any] = {}
        self._on_device: Tensor | None = None

    @staticmethod
    def of(rows: Rows, counts: Sequence[int], n_edits: int, live: Tensor | None = None) -> TokenSpans:
        """Spans of rows that hold ``counts`` tokens each.

        Raises:
            ValueError: other rows than the map has.
        """
        per_edit = (len(counts),) if rows.counts is None else rows.counts
        if rows.counts is None and n_edits != 1:
            raise ValueError(f"rows: a map is needed for more than one edit (got edits={n_edits})")
        if sum(per_edit) != len(counts) or len(per_edit) != n_edits:
            got = f"rows={len(counts)}, edits={n_edits}, map={per_edit}"
            raise ValueError(f"rows: a map has every row once and a count for every edit (got {got})")
        ends = [0, *itertools.accumulate(counts)]
        return TokenSpans([ends[row] for row in itertools.accumulate(per_edit, initial=0)], live)

    @staticmethod
    def chosen(
        choice: Sequence[int], counts: Sequence[int], n_edits: int, live: Tensor | None, *, alone: bool = False
    ) -> TokenSpans:
        """Spans of rows of which each goes to the edit that was chosen for it, -1 for none.

        Args:
            alone: offsets are of the edits that were chosen (``edits``), not of all.
        Raises:
            ValueError: other rows than were chosen for.
        """
        if len(choice) != len(counts):
            got = f"rows={len(counts)}, chosen for={len(choice)}"
            raise ValueError(f"rows: what acts is decided when prompts are read, for as many rows ({got})")
        starts = [0, *itertools.accumulate(counts)]
        by_edit: dict[int, list[int]] = {}
        for row, edit in enumerate(choice):
            if edit >= 0:
                by_edit.setdefault(edit, []).append(row)
        edits = tuple(sorted(by_edit))
        order: list[int] = []
        offsets = [0]
        for edit in edits:
            # Edits between the chosen ones have no tokens
            offsets += [] if alone else [len(order)] * (edit + 1 - len(offsets))
            for row in by_edit[edit]:
                order += range(starts[row], starts[row + 1])
            offsets.append(len(order))
        offsets += [] if alone else [len(order)] * (n_edits + 1 - len(offsets))
        marks = None if live is None else live[order]
        return TokenSpans(offsets, marks, torch.tensor(order, dtype=torch.long), edits=edits if alone else None)

    def token_offsets(self, tokens: int, n_edits: int) -> list[int]:
        """The offsets, once they are seen to fit.

        Raises:
            ValueError: another number of tokens or edits.
        """
        if len(self.offsets) != n_edits + 1 or self.offsets[-1] != tokens:
            raise ValueError(f"spans: of {tokens} tokens and {n_edits} edits (got offsets={self.offsets})")
        return self.offsets

    def steps(self, device: torch.device) -> Tensor | None:
        """(tokens,) int64, how far each token is behind the last one of its prompt; None where that is not known."""
        if self.layout is None:
            return None
        if self.layout.steps_now is not None:
            # Another at every token: not remembered
            now = self.layout.steps_now.to(device)
            return now if self.order is None else now[self.order.to(device)]
        if "steps" not in self.memory:
            found = torch.tensor(self.layout.steps, dtype=torch.long)
            self.memory["steps"] = (found if self.order is None else found[self.order]).to(device)
        made: Tensor = self.memory["steps"]
        return made

    def offsets_tensor(self, tokens: int, n_edits: int, device: torch.device) -> Tensor:
        """(n_edits + 1,) int64 on a device, made once."""
        if self._on_device is None:
            self._on_device = torch.tensor(self.token_offsets(tokens, n_edits), device=device)
        return self._on_device
