"""The decoder of a multimodal model, walked layer by layer through its own submodules.

Rows are padded on the right, so that the causal mask alone keeps tokens from seeing padding: no mask over padding is
made and attention kernels may take their causal path. Every linear map is called as a module on (R, N, d_in), so that
forward hooks fire and see rows. The modules get no position ids beside the position tables: attention kernels would
read repeated ones as several packed sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .packed_forward import Attention


@dataclass(slots=True)
class Context:
    """What the layers need beside the residual stream.

    Args:
        position_ids: (R, A, N), int64.
        rotary: cosine and sine tables (R, N, d_head), or None for learned positions.
        masks: attention mask by layer kind ("full_attention", "sliding_attention").
    """

    position_ids: Tensor
    rotary: tuple[Tensor, Tensor] | None
    masks: dict[str, Tensor | None]


class TextStack(Protocol):
    """A decoder. `index` is a layer number; hidden states are (R, N, d)."""

    root: Any
    config: Any
    layers: nn.ModuleList
    kinds: list[str]
    site_paths: dict[str, str]
    stored: int | None

    def paths_of(self, index: int) -> dict[str, str]:
        """Return paths of the linear maps of a layer by name."""

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return word embeddings of (R, N) tokens."""

    def enter(self, embeddings: Tensor, position_ids: Tensor) -> Tensor:
        """Return the residual stream entering layer 0."""

    def rotary(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the position tables that all layers share, or None."""

    def layer(self, index: int, hidden: Tensor, context: Context) -> Tensor:
        """Return the output of a whole layer."""

    def attend(self, index: int, hidden: Tensor, context: Context) -> Tensor:
        """Return the residual stream after the attention block of a layer."""

    def attend_at(self, index: int, hidden: Tensor, positions: Tensor, context: Context) -> Tensor:
        """Return the same at (R, M) positions: queries there, keys and values everywhere."""

    def attend_packed(self, index: int, hidden: Tensor, attention: Attention) -> Tensor:
        """Return the residual stream (Tq, d) of the tokens that ask, after attention over packed tokens (T, d)."""

    def feed_forward_entry(self, index: int) -> nn.Module:
        """Return the module that reads the residual stream where the feed-forward block begins."""

    def feed_forward(self, index: int, hidden: Tensor) -> Tensor:
        """Return the residual stream after the feed-forward block of a layer."""

    def finish(self, hidden: Tensor) -> Tensor:
        """Return the final hidden states that the head reads."""


def layer_kinds(config: Any, n_layers: int) -> list[str]:
    """Name the mask that each layer uses."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return list(kinds)
    # A stack that has a window and names no layer kinds uses it everywhere.
    kind = "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
    return [kind] * n_layers


def causal_masks(config: Any, kinds: set[str], hidden: Tensor) -> dict[str, Tensor | None]:
    """Return the causal mask of each layer kind, in the form that the model's attention implementation takes."""
    from transformers import masking_utils

    makers = {
        "full_attention": masking_utils.create_causal_mask,
        "sliding_attention": masking_utils.create_sliding_window_causal_mask,
    }
    unknown = kinds - set(makers)
    if unknown:
        raise ValueError(f"layer kinds must be among {', '.join(sorted(makers))} (got {', '.join(sorted(unknown))})")
    return {
        kind: makers[kind](
            config=config, inputs_embeds=hidden, attention_mask=None, past_key_values=None, position_ids=None
        )
        for kind in kinds
    }


def allowed_keys(config: Any, kind: str, queries: Tensor, n_keys: int) -> Tensor:
    """Return (R, 1, M, N), bool: which keys the queries at positions (R, M) may see; padding (-1) sees key 0."""
    keys = torch.arange(n_keys, device=queries.device)
    places = queries.clamp(min=0)[:, None, :, None]
    allowed = keys <= places
    if kind == "sliding_attention":
        allowed = allowed & (keys > places - config.sliding_window)
    return allowed


def attention_output(result: Any) -> Tensor:
    """Attention modules return (output, weights); layers return the output alone or in a tuple."""
    output: Tensor = result[0] if isinstance(result, tuple) else result
    return output


def split_heads(projected: Tensor, head_dim: int) -> Tensor:
    """(R, N, heads * d_head) to (R, N, heads, d_head)."""
    return projected.view(*projected.shape[:-1], -1, head_dim)
