"""The decoder of a multimodal model, walked layer by layer through its own submodules.

Every linear map is called as a module, so that forward hooks fire.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

if TYPE_CHECKING:
    from .packed_forward import Attention


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

    def attend_packed(self, index: int, hidden: Tensor, attention: Attention) -> Tensor:
        """Return the residual stream (Tq, d) of the query tokens, after attention over packed tokens (T, d)."""

    def feed_forward_entry(self, index: int) -> nn.Module:
        """Return the module that reads the residual stream where the feed-forward block begins."""

    def feed_forward(self, index: int, hidden: Tensor) -> Tensor:
        """Return the residual stream after the feed-forward block of a layer."""

    def finish(self, hidden: Tensor) -> Tensor:
        """Return the final hidden states that the head reads."""


class StockStack:
    """What stacks that are written for a shape of decoder share: layers in a list beside the word embeddings.

    Args:
        root: the stock decoder.
    """

    site_paths: dict[str, str]
    #: Numbers that attention keeps of a token in all layers; None is twice what a "k" puts out in each.
    stored: int | None = None

    def __init__(self, root: Any) -> None:
        self.root = root
        self.config = root.config
        self.layers = root.layers
        self.kinds = layer_kinds(self.config, len(self.layers))

    def paths_of(self, index: int) -> dict[str, str]:
        """Return paths of the linear maps of a layer by name."""
        return self.site_paths

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return word embeddings."""
        embeddings: Tensor = self.root.embed_tokens(input_ids)
        return embeddings.to(input_ids.device)


def layer_kinds(config: Any, n_layers: int) -> list[str]:
    """Name the mask that each layer uses."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return list(kinds)
    # A stack that has a window and names no layer kinds uses it everywhere.
    kind = "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
    return [kind] * n_layers


def split_heads(projected: Tensor, head_dim: int) -> Tensor:
    """(R, N, heads * d_head) to (R, N, heads, d_head)."""
    return projected.view(*projected.shape[:-1], -1, head_dim)
