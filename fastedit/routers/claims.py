"""Which of many stored edits claim a prompt, without a score for every pair.

A router that compares vectors looks at a block of stored edits at a time: one matrix product leaves out nearly all of
them by a bound that no claim can miss, rounding included; what is left is scored as ever. So what a question costs is
the product alone, and memory does not grow with the product of questions and stored edits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from fastedit.backbone import PackedState
from fastedit.routers import Router

#: Entries of the product of a block: 16 MB in float32, so that it is read again from the cache of a core.
ENTRIES = 1 << 22


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


def pairs_above(asked: Tensor, stored: Tensor, least: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs (row, edit) whose inner product is at least ``least``, and some that are just below.

    Args:
        asked: (R, d). stored: (B, d), of the same dtype; all of length 1 or less.
    """
    bound = least - 1.01 * _rounding(asked)
    yield from _blocks(len(asked), stored, lambda part, _where: asked @ part.T >= bound)


def pairs_within(asked: Tensor, stored: Tensor, radius: Tensor | float) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs (row, edit) whose distance is at most ``radius``, (B,) or one number, and some that are just beyond.

    Args:
        asked: (R, d). stored: (B, d), of the same dtype.
    """
    slack = _rounding(asked)
    square = asked.square().sum(1)

    def near(part: Tensor, where: slice) -> Tensor:
        known = part.square().sum(1)
        # |a - k|² <= r² as a·k >= (|a|² + |k|² - r²) / 2: what rounds is as large as the squares
        reach = torch.as_tensor(_part(radius, where), dtype=part.dtype, device=part.device).clamp(min=0).square()
        return (
            torch.addmm((reach - known + slack * (known + reach))[None], asked, part.T, beta=0.5)
            >= (0.5 * square * (1 - 2 * slack))[:, None]
        )

    yield from _blocks(len(asked), stored, near)


def _blocks(rows: int, stored: Tensor, test: Callable[[Tensor, slice], Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs that pass a test of blocks of stored vectors: ``test(part, where)`` gives bool (R, len(part))."""
    step = max(1, ENTRIES // max(1, rows))
    for start in range(0, max(1, len(stored)), step):
        row, edit = test(stored[start : start + step], slice(start, start + step)).nonzero(as_tuple=True)
        yield row, edit + start


def _rounding(vectors: Tensor) -> float:
    """How far a sum of so many products may be off, relative to the vectors' lengths."""
    return 4 * vectors.shape[1] * torch.finfo(vectors.dtype).eps


def _part(bound: Tensor | float, where: slice) -> Tensor | float:
    return bound[where] if isinstance(bound, Tensor) and bound.dim() else bound
