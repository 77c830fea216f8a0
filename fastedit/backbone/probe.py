"""What a linear map inside a feed-forward block of the frozen model reads and puts out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .context import scoped_hooks

if TYPE_CHECKING:
    from .model import EditableModel


@torch.no_grad()
def feed_forward_parts(model: EditableModel, layer: int, hidden: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Run one feed-forward block and return what one of its linear maps saw and made of it.

    The weight is never read, so it may be quantized. Deltas that stand there must be paused.

    Args:
        model: frozen.
        layer: 0 <= layer < n_layers.
        hidden: (T, d), the residual stream entering the block.
        name: "up", "gate" or "down".
    Returns:
        Input (T, d_in) and output (T, d_out) of the map.
    """
    (site,) = model.sites([layer], [name])
    if hidden.shape[0] == 0:
        return hidden.new_empty(0, site.d_in), hidden.new_empty(0, site.d_out)
    seen: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.extend((args[0][0], output[0]))

    with scoped_hooks({model.module(site): keep}):
        model.adapter.text.feed_forward(layer, hidden[None])
    return seen[0].to(hidden.device), seen[1].to(hidden.device)
