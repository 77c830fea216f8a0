"""Decoders of the OPT shape (arXiv 2205.01068): learned positions and plain feed-forward blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .stacks import StockStack, split_heads

if TYPE_CHECKING:
    from .packed_forward import Attention


class LearnedPositionStack(StockStack):
    """Decoders of the OPT shape: learned positions, layer norms before or after each block, plain feed-forward."""

    site_paths: dict[str, str] = {  # noqa: RUF012 (never written)
        "up": "fc1",
        "down": "fc2",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.out_proj",
    }

    def __init__(self, root: Any) -> None:
        super().__init__(root)
        if self.root.project_in is not None:
            sizes = f"word_embed_proj_dim={self.config.word_embed_proj_dim}, hidden_size={self.config.hidden_size}"
            raise ValueError(
                f"word embeddings must be as wide as the decoder, or image features do not fit (got {sizes})"
            )

    def enter(self, embeddings: Tensor, position_ids: Tensor) -> Tensor:
        """Return the sum of word and position embeddings."""
        # With explicit positions the table ignores its mask argument.
        positions: Tensor = self.root.embed_positions(None, 0, position_ids=position_ids[:, 0])
        return embeddings + positions.to(embeddings.device)

    def rotary(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return None: positions entered with the embeddings."""
        return None

    def attend_packed(self, index: int, hidden: Tensor, attention: Attention) -> Tensor:
        """Return the residual stream (Tq, d) of the query tokens, after attention over packed tokens (T, d)."""
        layer: Any = self.layers[index]
        module = layer.self_attn
        normed = layer.self_attn_layer_norm(hidden[None]) if layer.do_layer_norm_before else hidden[None]
        asking = normed if attention.queries is None else normed[:, attention.queries]
        query = split_heads(module.q_proj(asking)[0] * module.scaling, module.head_dim)
        key = split_heads(module.k_proj(normed)[0], module.head_dim)
        value = split_heads(module.v_proj(normed)[0], module.head_dim)
        mixed = attention.mix(index, query, key, value, 1.0)
        return self._after_attention(layer, attention.at_queries(hidden) + module.out_proj(mixed[None])[0])

    @staticmethod
    def _after_attention(layer: Any, hidden: Tensor) -> Tensor:
        """Norm after the block, in the variant that has it there."""
        output: Tensor = hidden if layer.do_layer_norm_before else layer.self_attn_layer_norm(hidden)
        return output

    def feed_forward_entry(self, index: int) -> nn.Module:
        """Return the module that reads the residual stream where the feed-forward block begins."""
        layer: Any = self.layers[index]
        module: nn.Module = layer.final_layer_norm if layer.do_layer_norm_before else layer.fc1
        return module

    def feed_forward(self, index: int, hidden: Tensor) -> Tensor:
        """Return the residual stream after the feed-forward block, through its own submodules."""
        layer: Any = self.layers[index]
        normed = layer.final_layer_norm(hidden) if layer.do_layer_norm_before else hidden
        output: Tensor = hidden + layer.fc2(layer.activation_fn(layer.fc1(normed))).to(hidden.device)
        return output if layer.do_layer_norm_before else layer.final_layer_norm(output).to(hidden.device)

    def finish(self, hidden: Tensor) -> Tensor:
        """Return the normed hidden states; the variant with norms after each block has no final one."""
        if self.root.final_layer_norm is None:
            return hidden
        output: Tensor = self.root.final_layer_norm(hidden)
        return output
