"""From final hidden states to logits, with what a stock model does behind its linear head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .cross import reads_encoder
from .decoder import Decoder

#: Largest difference from the stock logits, relative to the largest, by type.
_TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2}


class ScaledHead(nn.Module):
    """A linear head whose logits are scaled or bounded, as the stock model does.

    Args:
        linear: the head. scale: that logits are multiplied by. bound: c of c tanh(logit / c), or None.
    """

    def __init__(self, linear: Any, scale: float, bound: float | None) -> None:
        super().__init__()
        self.linear, self.scale, self.bound = linear, scale, bound

    @property
    def out_features(self) -> int:
        """Number of logits."""
        return int(self.linear.out_features)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits (..., V)."""
        logits: Tensor = self.linear(hidden) * self.scale
        return logits if self.bound is None else torch.tanh(logits / self.bound) * self.bound


@torch.no_grad()
def find_head(hf: Any, decoder: Decoder, hidden: Tensor, logits: Tensor) -> nn.Module:
    """Return the head of a model.

    Args:
        hidden: (1, N, d), final hidden states of a row. logits: (1, N, V), what the stock model makes of them.
    Raises:
        ValueError: there is no head, or none that is known gives the stock logits. Says by how much.
    """
    linear = hf.get_output_embeddings()
    if linear is None:
        raise ValueError(f"load: a model must have a head that gives logits (got {type(hf).__name__})")
    worst = float("inf")
    for head in _heads(linear, hf, decoder.config):
        gap = float((head(hidden).to(logits.device) - logits).abs().max() / logits.abs().max().clamp(min=1e-6))
        if gap <= _TOLERANCE.get(logits.dtype, 1e-5):
            return head
        worst = min(worst, gap)
    raise ValueError(
        f"load: logits must be those of a linear head, scaled or bounded (got a difference of {worst:.1e} in "
        f"{type(hf).__name__})"
    )


def _heads(linear: nn.Module, hf: Any, config: Any) -> Iterator[nn.Module]:
    yield linear
    scales = [1.0]
    for owner in (hf, hf.config, config):
        factor, divisor = getattr(owner, "logit_scale", None), getattr(owner, "logits_scaling", None)
        scales += [float(factor)] if isinstance(factor, (int, float)) else []
        scales += [1 / float(divisor)] if isinstance(divisor, (int, float)) and divisor else []
    # T5 scales what its head reads, where head and embeddings were made to be the same
    scales += [float(config.hidden_size) ** -0.5] if reads_encoder(config) else []
    bound = getattr(config, "final_logit_softcapping", None)
    for scale in dict.fromkeys(scales):
        yield ScaledHead(linear, scale, bound)
