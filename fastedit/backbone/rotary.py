"""Decoders of the LLaMA shape, which several text models share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from .stacks import StockStack, split_heads

if TYPE_CHECKING:
    from .packed_forward import Attention


def _rotate(values: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Apply rotary positions to (..., heads, d_head) with tables (..., d_head); RoFormer, arXiv 2104.09864."""
    first, second = values.chunk(2, dim=-1)
    return values * cosine[..., None, :] + torch.cat((-second, first), dim=-1) * sine[..., None, :]


class RotaryStack(StockStack):
    """Decoders of the LLaMA shape: rotary positions, root-mean-square norms before each block, gated feed-forward."""

    site_paths: dict[str, str] = {  # noqa: RUF012 (never written)
        "up": "mlp.up_proj",
        "gate": "mlp.gate_proj",
        "down": "mlp.down_proj",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
    }

    def enter(self, embeddings: Tensor, position_ids: Tensor) -> Tensor:
        """Return the embeddings: positions enter in the attention."""
        return embeddings

    def rotary(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return cosine and sine tables (R, N, d_head)."""
        axes = position_ids.shape[1]
        places = position_ids[:, 0] if axes == 1 else position_ids.transpose(0, 1)
        cosine, sine = self.root.rotary_emb(hidden, places)
        return cosine.to(hidden.device), sine.to(hidden.device)

    def attend_packed(self, index: int, hidden: Tensor, attention: Attention) -> Tensor:
        """Return the residual stream (Tq, d) of the query tokens, after attention over packed tokens (T, d)."""
        layer: Any = self.layers[index]
        module = layer.self_attn
        assert attention.rotary is not None
        cosine, sine = attention.rotary
        normed = layer.input_layernorm(hidden[None])
        asking = normed if attention.queries is None else normed[:, attention.queries]
        query = split_heads(module.q_proj(asking)[0], module.head_dim)
        key = split_heads(module.k_proj(normed)[0], module.head_dim)
        value = split_heads(module.v_proj(normed)[0], module.head_dim)
        if hasattr(module, "q_norm"):
            query, key = module.q_norm(query), module.k_norm(key)
        query = _rotate(query, attention.at_queries(cosine), attention.at_queries(sine))
        mixed = attention.mix(index, query, _rotate(key, cosine, sine), value, module.scaling)
        return attention.at_queries(hidden) + cast(Tensor, module.o_proj(mixed[None])[0])

    def feed_forward_entry(self, index: int) -> nn.Module:
        """Return the module that reads the residual stream where the feed-forward block begins."""
        module: nn.Module = self.layers[index].post_attention_layernorm
        return module

    def feed_forward(self, index: int, hidden: Tensor) -> Tensor:
        """Return the residual stream after the stock feed-forward module."""
        layer: Any = self.layers[index]
        output: Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden)).to(hidden.device)
        return output

    def finish(self, hidden: Tensor) -> Tensor:
        """Return the normed hidden states."""
        output: Tensor = self.root.norm(hidden)
        return output
