"""Rows of a batch that is fitted: whose they are, where their prompts are, and which belong to an edit's scope."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from fastedit.deltas.rows import Rows, TokenSpans

#: Roles (``fastedit.objectives.Role``) of the edit itself and of its rephrases; all others must not change.
IN_SCOPE = frozenset({0, 1, 2})
#: Tokens of a prompt that count where states of whole prompts are compared.
TOKENS = ("all", "after_image", "last")


@dataclass(frozen=True)
class RowMarks:
    """R rows of T packed tokens.

    Args:
        row: (T,) int64, the row of each token.
        last: (R,) int64, the last token of each prompt.
        owner: (R,) int64, the edit of each row.
        live: (T,) bool, tokens behind an image; None is all.
    """

    row: Tensor
    last: Tensor
    owner: Tensor
    live: Tensor | None

    def counted(self, tokens: str) -> Tensor:
        """(T,) bool: the tokens of prompts that count, by one of ``TOKENS``."""
        end = self.last[self.row]
        here = torch.arange(len(self.row), device=self.row.device)
        if tokens == "last":
            return here == end
        found = here <= end
        if tokens == "all" or self.live is None:
            return found
        behind = found & self.live
        # A prompt that ends with its image has its last token only
        return behind | (here == end)


def row_marks(rows: Rows | TokenSpans, n_edits: int, device: torch.device) -> RowMarks | None:
    """The marks of rows that run through the model, made once per batch; None where they are not known."""
    if not isinstance(rows, TokenSpans) or rows.layout is None or rows.order is not None:
        return None
    layout, known = rows.layout, rows.memory.get("marks")
    if known is None:
        known = rows.memory["marks"] = _marks(layout.counts, layout.prompts, rows.offsets, layout.live, device)
    found: RowMarks = known
    return found


def _marks(
    counts: Sequence[int], prompts: Sequence[int], offsets: Sequence[int], live: Tensor | None, device: torch.device
) -> RowMarks:
    starts = [0, *accumulate(counts)]
    row = [number for number, count in enumerate(counts) for _ in range(count)]
    last = [start + max(prompt - 1, 0) for start, prompt in zip(starts, prompts, strict=False)]
    owner = [bisect_right(offsets, start) - 1 for start in starts[:-1]]
    made = [torch.tensor(part, dtype=torch.long, device=device) for part in (row, last, owner)]
    return RowMarks(made[0], made[1], made[2], live)


def in_scope(row_roles: Sequence[int], rows: Rows | TokenSpans, device: torch.device) -> Tensor:
    """(R,) bool: rows of the edit itself and of its rephrases, made once per batch."""
    memory = rows.memory if isinstance(rows, TokenSpans) else {}
    key = ("scope", tuple(row_roles))
    if key not in memory:
        memory[key] = torch.tensor([role in IN_SCOPE for role in row_roles], dtype=torch.bool, device=device)
    inside: Tensor = memory[key]
    return inside
