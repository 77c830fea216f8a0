"""An edit acts on prompts that it moves far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastedit.backbone import EditableModel, PackedState
from fastedit.backbone.packed import token_rows
from fastedit.backbone.probe import feed_forward_parts
from fastedit.routers import Routed


class Moving(Routed, Protocol):
    """Stacked deltas that say how far they move a token (``fastedit.deltas.side.SideDelta``)."""

    def distances_of_all(self, x: Tensor, output: Tensor) -> Tensor:
        """(T, B) distances of tokens with input x (T, d_in) and frozen output (T, d_out) of the site, by each edit."""

    def distances_of_own(self, x: Tensor, output: Tensor, counts: Sequence[int]) -> Tensor:
        """(T,) distances by their own edit of tokens that are sorted by it, ``counts`` of each."""


class DistanceRouter:
    """WISE's routing (arXiv 2405.14768, equations (3) and (4)): an edit acts on what it moves far enough.

    How far is the mean over the prompt's tokens, or over those that the deltas' option ``tokens`` names, of the
    distance between activations with the side memory and without; the score is that over the edit's threshold. Of
    several memories the one with the largest score acts. In the paper it is the one with the largest distance, which
    prefers memories of large entries.
    """

    def __init__(self, model: EditableModel, stacked: Moving) -> None:
        (self.site,) = stacked.spec.sites
        self.prefix = f"{self.site.layer}.{self.site.name}:"
        self.model, self.stacked = model, stacked
        self.tokens = str(stacked.spec.options["tokens"])

    def scores(self, state: PackedState, fixed: Mapping[str, Tensor], own: Tensor | None) -> Tensor:
        """How far R prompts are moved by their edit (R,), or by each of them (R, B)."""
        counted = self._counted(state)
        row = token_rows(state.counts, state.hidden.device)[counted]
        x, output = feed_forward_parts(self.model, self.site.layer, state.hidden[counted], self.site.name)
        threshold = fixed[f"{self.prefix}threshold"][:, 0].clamp(min=torch.finfo(self.dtype).tiny)
        if own is None:
            every = self.stacked.distances_of_all(x, output)
            total = every.new_zeros(len(state), self.size).index_add(0, row, every)
            return total / self._counts(row, len(state))[:, None] / threshold
        edit = own[row]
        # Sorted by edit; rows of one edit mostly are so already
        order = edit.argsort(stable=True)
        counts = torch.bincount(edit, minlength=self.size).tolist()
        distance = x.new_zeros(len(order), dtype=self.dtype)
        distance[order] = self.stacked.distances_of_own(x[order], output[order], counts)
        total = distance.new_zeros(len(state)).index_add(0, row, distance)
        return total / self._counts(row, len(state)) / threshold[own]

    def threshold(self, fixed: Mapping[str, Tensor]) -> Tensor:
        """(B,) 1: scores are distances over what was measured when the edits were fitted."""
        return fixed[f"{self.prefix}threshold"][:, 0].new_ones(self.size)

    @property
    def size(self) -> int:
        """B."""
        return self.stacked.size

    @property
    def dtype(self) -> torch.dtype:
        """Of distances."""
        return next(iter(self.stacked.fixed.values())).dtype

    def _counted(self, state: PackedState) -> Tensor:
        """(T',) the tokens that are averaged over."""
        if self.tokens == "last":
            return state.wanted
        if self.tokens == "all" or state.live is None:
            return torch.arange(state.hidden.shape[0], device=state.hidden.device)
        marks = state.live.clone()
        # A prompt that ends with its image has its last token only
        marks[state.wanted] = True
        return marks.nonzero()[:, 0]

    @staticmethod
    def _counts(row: Tensor, count: int) -> Tensor:
        """(count,) how many tokens each row has, at least 1."""
        return torch.bincount(row, minlength=count).clamp(min=1)
