"""Rows of a stock forward as prompts: padded, on either side, with answers behind them or not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .packed import PackedState
from .token_layout import TokenLayout


@dataclass(frozen=True)
class Prompts:
    """Rows of a stock forward.

    Args:
        inside: (R, N), bool, tokens of the prompts. last: (R,), int64, the last of each row.
        image: (R, N), bool, tokens of images, or None without any. real: (R, N), bool, no padding.
    """

    inside: Tensor
    last: Tensor
    image: Tensor | None
    real: Tensor

    def behind(self) -> tuple[int, ...]:
        """By row, tokens behind the prompt: of its answer."""
        place = torch.arange(self.real.shape[1], device=self.real.device)
        return tuple((self.real & (place > self.last[:, None])).sum(1).tolist())

    def layout(self, length: int) -> TokenLayout:
        """Whose the padded tokens are, row after row."""
        rows = len(self.last)
        starts = torch.arange(rows, device=self.last.device) * length
        live = None if self.image is None else self._behind_image().flatten()
        return TokenLayout((length,) * rows, live, self.last + starts, (1,) * rows)

    def state(self, hidden: Tensor, layer: int, stage: str) -> PackedState:
        """The prompts alone, packed, of the padded residual stream (R * N, d)."""
        kept, hidden = self.inside.flatten(), hidden.to(self.inside.device)
        counts = tuple(self.inside.sum(1).tolist())
        ends = torch.tensor(counts, device=hidden.device).cumsum(0) - 1
        image = None if self.image is None else self.image.flatten()[kept]
        return PackedState(
            hidden=hidden[kept],
            position_ids=torch.zeros(1, int(kept.sum()), dtype=torch.long, device=hidden.device),
            rotary=None,
            counts=counts,
            starts=(0,) * len(counts),
            wanted=ends,
            wanted_counts=(1,) * len(counts),
            layer=layer,
            stage=stage,
            live=None if self.image is None else self._behind_image().flatten()[kept],
            image=image,
        )

    def _behind_image(self) -> Tensor:
        assert self.image is not None
        place = torch.arange(self.image.shape[1], device=self.image.device)
        return place > torch.where(self.image, place, -1).amax(1, keepdim=True)
