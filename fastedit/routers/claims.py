"""Which of many stored edits claim a prompt, without a score for every pair.

A router that compares vectors looks at a block of stored edits at a time: one matrix product leaves out nearly all of
them by a bound that no claim can miss, rounding included; what is left is scored as ever. So what a question costs is
the product alone, and memory does not grow with the product of questions and stored edits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from fastedit.backbone import PackedState
from fastedit.routers import Router
from fastedit.routers.reduced import Reduced

#: Entries of the product of a block: 16 MB in float32, so that it is read again from the cache of a core.
ENTRIES = 1 << 22
#: Of so many pairs of reduced vectors one may pass before the whole ones of all are compared: gathering costs more.
FEW = 64

#: From a block of stored vectors and where it lies to which pairs pass, bool (R, block).
Test: TypeAlias = Callable[[Tensor, slice], Tensor]


class Claims(NamedTuple):
    """Edits whose score of a prompt reaches their threshold.

    Args:
        row: (n,) int64, the prompt. edit: (n,) int64. score: (n,), as ``Router.scores`` has it.
    """

    row: Tensor
    edit: Tensor
    score: Tensor

    @staticmethod
    def cat(parts: list[Claims]) -> Claims:
        """The claims of all parts, at least one."""
        return Claims(*(torch.cat(each) for each in zip(*parts, strict=True)))

    @staticmethod
    def reaching(scores: Tensor, threshold: Tensor) -> Claims:
        """Those of scores (R, B) that reach the thresholds (B,)."""
        row, edit = (scores >= threshold).nonzero(as_tuple=True)
        return Claims(row, edit, scores[row, edit])

    def best(self, rows: int, later: Tensor) -> Tensor:
        """(rows,) int64, the edit with the largest score, the latest of equal ones; -1 where none claims the row.

        Args:
            later: (B,) int64, the edit that answers where each is chosen (``fastedit.deltas.questions.answering``).
        """
        largest = self.score.new_full((rows,), -torch.inf)
        largest.scatter_reduce_(0, self.row, self.score, "amax")
        chosen = torch.full((rows,), -1, dtype=torch.long, device=self.row.device)
        ties = torch.where(self.score == largest[self.row], self.edit, -1)
        chosen.scatter_reduce_(0, self.row, ties, "amax")
        return torch.where(chosen >= 0, later.to(chosen.device)[chosen], -1)


@runtime_checkable
class Claiming(Protocol):
    """A router that finds claims without all scores."""

    def claims(self, state: PackedState, fixed: Mapping[str, Tensor]) -> Claims:
        """The claims on R prompts by all of the edits; arguments as for ``Router.scores``."""


def claims_of(router: Router, state: PackedState, fixed: Mapping[str, Tensor]) -> Claims:
    """The claims on R prompts by all of the edits."""
    if isinstance(router, Claiming):
        return router.claims(state, fixed)
    return Claims.reaching(router.scores(state, fixed, None), router.threshold(fixed))


def pairs_above(
    asked: Tensor, stored: Tensor, least: float, reduced: Reduced | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs (row, edit) whose inner product is at least ``least``, and some that are just below.

    Args:
        asked: (R, d). stored: (B, d), of the same dtype; all of length 1 or less.
        reduced: of the stored ones, for a first pass: more pairs just below are among what it gives.
    """
    slack = 1.01 * _rounding(asked)

    def above(queries: Tensor, slack: float) -> Test:
        return lambda part, _where: queries @ part.T >= least - slack

    exact = above(asked, slack)
    if reduced is None:
        yield from _blocks(len(asked), stored, exact)
    else:
        # bfloat16 rounds both vectors and their product
        slack = 4 * slack + (0 if reduced.dtype == asked.dtype else 4 * torch.finfo(reduced.dtype).eps)
        yield from _blocks(len(asked), stored, exact, reduced.rows(stored), above(reduced.of(asked), slack))


def pairs_within(
    asked: Tensor, stored: Tensor, radius: Tensor | float, reduced: Reduced | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs (row, edit) whose distance is at most ``radius``, (B,) or one number, and some that are just beyond.

    Args:
        asked: (R, d). stored: (B, d), of the same dtype. reduced: see ``pairs_above``; of the same dtype.
    """

    def within(queries: Tensor, slack: float) -> Test:
        square = queries.square().sum(1)

        def near(part: Tensor, where: slice) -> Tensor:
            known = part.square().sum(1)
            # |a - k|² <= r² as a·k >= (|a|² + |k|² - r²) / 2: what rounds is as large as the squares
            reach = torch.as_tensor(_part(radius, where), dtype=part.dtype, device=part.device).clamp(min=0).square()
            return (
                torch.addmm((reach - known + slack * (known + reach))[None], queries, part.T, beta=0.5)
                >= (0.5 * square * (1 - 2 * slack))[:, None]
            )

        return near

    slack = _rounding(asked)
    exact = within(asked, slack)
    if reduced is None:
        yield from _blocks(len(asked), stored, exact)
    else:
        yield from _blocks(len(asked), stored, exact, reduced.rows(stored), within(reduced.of(asked), 4 * slack))


def _blocks(
    rows: int, stored: Tensor, exact: Test, reduced: Tensor | None = None, coarse: Test | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs that pass a test of blocks of stored vectors: ``exact(part, where)`` gives bool (R, len(part)).

    With reduced vectors those that pass ``coarse``; where that leaves many, those that pass both.
    """
    step = max(1, ENTRIES // max(1, rows))
    for start in range(0, max(1, len(stored)), step):
        where = slice(start, start + step)
        passed = exact(stored[where], where) if reduced is None or coarse is None else coarse(reduced[where], where)
        row, edit = passed.nonzero(as_tuple=True)
        if reduced is not None and len(row) * FEW > passed.numel():
            row, edit = (passed & exact(stored[where], where)).nonzero(as_tuple=True)
        yield row, edit + start


def _rounding(vectors: Tensor) -> float:
    """How far a sum of so many products may be off, relative to the vectors' lengths."""
    return 4 * vectors.shape[1] * torch.finfo(vectors.dtype).eps


def _part(bound: Tensor | float, where: slice) -> Tensor | float:
    return bound[where] if isinstance(bound, Tensor) and bound.dim() else bound
