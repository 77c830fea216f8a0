"""The decoder of a multimodal model, walked layer by layer through its own submodules.

Rows are padded on the right, so that the causal mask alone keeps tokens from seeing padding: no mask over padding is
made and attention kernels may take their causal path. Every linear map is called as a module on (R, N, d_in), so that
forward hooks fire and see rows. The modules get no position ids beside the position tables: attention kernels would
read repeated ones as several packed sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from .states import gather_positions


@dataclass(slots=True)
class Context:
    """What the layers need beside the residual stream.

    Args:
        position_ids: (R, A, N), int64.
        rotary: cosine and sine tables (R, N, d_head), or None for learned positions.
        masks: attention mask by layer kind ("full_attention", "sliding_attention").
        past: key-value cache of a generation, or None.
    """

    position_ids: Tensor
    rotary: tuple[Tensor, Tensor] | None
    masks: dict[str, Tensor | None]
    past: Any = None


class TextStack(Protocol):
    """A decoder. `index` is a layer number; hidden states are (R, N, d)."""

    root: Any
    config: Any
    layers: nn.ModuleList
    kinds: list[str]
    site_paths: ClassVar[dict[str, str]]

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


def _attention_output(result: Any) -> Tensor:
    """Attention modules return (output, weights); layers return the output alone or in a tuple."""
    output: Tensor = result[0] if isinstance(result, tuple) else result
    return output


def _heads(projected: Tensor, head_dim: int) -> Tensor:
    """(R, N, heads * d_head) to (R, N, heads, d_head)."""
    return projected.view(*projected.shape[:-1], -1, head_dim)


def _rotate(values: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Apply rotary positions to (R, heads, N, d_head) with tables (R, N, d_head); RoFormer, arXiv 2104.09864."""
    first, second = values.chunk(2, dim=-1)
    return values * cosine[:, None] + torch.cat((-second, first), dim=-1) * sine[:, None]


class RotaryStack:
    """Decoders of the LLaMA shape: rotary positions, root-mean-square norms before each block, gated feed-forward."""

    site_paths: ClassVar[dict[str, str]] = {
        "up": "mlp.up_proj",
        "gate": "mlp.gate_proj",
        "down": "mlp.down_proj",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
    }

    def __init__(self, root: Any) -> None:
        self.root = root
        self.config = root.config
        self.layers = root.layers
        self.kinds = layer_kinds(self.config, len(self.layers))

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return word embeddings."""
        embeddings: Tensor = self.root.embed_tokens(input_ids)
        return embeddings

    def enter(self, embeddings: Tensor, position_ids: Tensor) -> Tensor:
        """Return the embeddings: positions enter in the attention."""
        return embeddings

    def rotary(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return cosine and sine tables (R, N, d_head)."""
        axes = position_ids.shape[1]
        places = position_ids[:, 0] if axes == 1 else position_ids.transpose(0, 1)
        tables: tuple[Tensor, Tensor] = self.root.rotary_emb(hidden, places)
        return tables

    def layer(self, index: int, hidden: Tensor, context: Context) -> Tensor:
        """Return the output of the stock layer."""
        return _attention_output(
            self.layers[index](
                hidden,
                attention_mask=context.masks[self.kinds[index]],
                position_embeddings=context.rotary,
                past_key_values=context.past,
                use_cache=context.past is not None,
            )
        )

    def attend(self, index: int, hidden: Tensor, context: Context) -> Tensor:
        """Return the residual stream after the stock attention module."""
        layer: Any = self.layers[index]
        result = layer.self_attn(
            hidden_states=layer.input_layernorm(hidden),
            attention_mask=context.masks[self.kinds[index]],
            position_embeddings=context.rotary,
            past_key_values=context.past,
        )
        return hidden + _attention_output(result)

    def attend_at(self, index: int, hidden: Tensor, positions: Tensor, context: Context) -> Tensor:
        """Return the residual stream after attention at chosen positions."""
        layer: Any = self.layers[index]
        attention = layer.self_attn
        assert context.rotary is not None
        cosine, sine = context.rotary
        normed = layer.input_layernorm(hidden)
        head_dim = attention.head_dim
        query = _heads(attention.q_proj(gather_positions(normed, positions)), head_dim)
        key = _heads(attention.k_proj(normed), head_dim)
        value = _heads(attention.v_proj(normed), head_dim)
        if hasattr(attention, "q_norm"):
            query, key = attention.q_norm(query), attention.k_norm(key)
        query = _rotate(query.transpose(1, 2), gather_positions(cosine, positions), gather_positions(sine, positions))
        key, value = _rotate(key.transpose(1, 2), cosine, sine), value.transpose(1, 2)
        mixed = functional.scaled_dot_product_attention(
            query,
            key.repeat_interleave(attention.num_key_value_groups, dim=1),
            value.repeat_interleave(attention.num_key_value_groups, dim=1),
            attn_mask=allowed_keys(self.config, self.kinds[index], positions, hidden.shape[1]),
            scale=attention.scaling,
        )
        output = attention.o_proj(mixed.transpose(1, 2).flatten(2))
        return gather_positions(hidden, positions) + cast(Tensor, output)

    def feed_forward(self, index: int, hidden: Tensor) -> Tensor:
        """Return the residual stream after the stock feed-forward module."""
        layer: Any = self.layers[index]
        output: Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return output

    def finish(self, hidden: Tensor) -> Tensor:
        """Return the normed hidden states."""
        output: Tensor = self.root.norm(hidden)
        return output


class LearnedPositionStack:
    """Decoders of the OPT shape: learned positions, layer norms before or after each block, plain feed-forward."""

    site_paths: ClassVar[dict[str, str]] = {
        "up": "fc1",
        "down": "fc2",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.out_proj",
    }

    def __init__(self, root: Any) -> None:
        self.root = root
        self.config = root.config
        self.layers = root.layers
        self.kinds = ["full_attention"] * len(self.layers)
        if self.root.project_in is not None:
            sizes = f"word_embed_proj_dim={self.config.word_embed_proj_dim}, hidden_size={self.config.hidden_size}"
            raise ValueError(
                f"word embeddings must be as wide as the decoder, or image features do not fit (got {sizes})"
            )

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return word embeddings."""
        embeddings: Tensor = self.root.embed_tokens(input_ids)
        return embeddings

    def enter(self, embeddings: Tensor, position_ids: Tensor) -> Tensor:
        """Return the sum of word and position embeddings."""
        # With explicit positions the table ignores its mask argument.
        places: Tensor = self.root.embed_positions(None, 0, position_ids=position_ids[:, 0])
        return embeddings + places

    def rotary(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return None: positions entered with the embeddings."""
        return None

    def layer(self, index: int, hidden: Tensor, context: Context) -> Tensor:
        """Return the output of a layer. Block by block: the stock layer flattens rows before its linear maps."""
        return self.feed_forward(index, self.attend(index, hidden, context))

    def attend(self, index: int, hidden: Tensor, context: Context) -> Tensor:
        """Return the residual stream after the stock attention module."""
        layer: Any = self.layers[index]
        normed = layer.self_attn_layer_norm(hidden) if layer.do_layer_norm_before else hidden
        result = layer.self_attn(
            hidden_states=normed,
            attention_mask=context.masks["full_attention"],
            past_key_values=context.past,
        )
        return self._after_attention(layer, hidden + _attention_output(result))

    def attend_at(self, index: int, hidden: Tensor, positions: Tensor, context: Context) -> Tensor:
        """Return the residual stream after attention at chosen positions."""
        layer: Any = self.layers[index]
        attention = layer.self_attn
        normed = layer.self_attn_layer_norm(hidden) if layer.do_layer_norm_before else hidden
        query = attention.q_proj(gather_positions(normed, positions)) * attention.scaling
        mixed = functional.scaled_dot_product_attention(
            _heads(query, attention.head_dim).transpose(1, 2),
            _heads(attention.k_proj(normed), attention.head_dim).transpose(1, 2),
            _heads(attention.v_proj(normed), attention.head_dim).transpose(1, 2),
            attn_mask=allowed_keys(self.config, "full_attention", positions, hidden.shape[1]),
            scale=1.0,
        )
        output = attention.out_proj(mixed.transpose(1, 2).flatten(2))
        return self._after_attention(layer, gather_positions(hidden, positions) + output)

    @staticmethod
    def _after_attention(layer: Any, hidden: Tensor) -> Tensor:
        """Norm after the block, in the variant that has it there."""
        output: Tensor = hidden if layer.do_layer_norm_before else layer.self_attn_layer_norm(hidden)
        return output

    def feed_forward(self, index: int, hidden: Tensor) -> Tensor:
        """Return the residual stream after the feed-forward block, through its own submodules."""
        layer: Any = self.layers[index]
        normed = layer.final_layer_norm(hidden) if layer.do_layer_norm_before else hidden
        output: Tensor = hidden + layer.fc2(layer.activation_fn(layer.fc1(normed)))
        return output if layer.do_layer_norm_before else layer.final_layer_norm(output)

    def finish(self, hidden: Tensor) -> Tensor:
        """Return the normed hidden states; the variant with norms after each block has no final one."""
        if self.root.final_layer_norm is None:
            return hidden
        output: Tensor = self.root.final_layer_norm(hidden)
        return output


#: Text models by the name that their configuration carries.
TEXT_STACKS: dict[str, type[RotaryStack] | type[LearnedPositionStack]] = {
    "llama": RotaryStack,
    "mistral": RotaryStack,
    "qwen2": RotaryStack,
    "qwen3": RotaryStack,
    "qwen2_vl_text": RotaryStack,
    "qwen2_5_vl_text": RotaryStack,
    "qwen3_vl_text": RotaryStack,
    "opt": LearnedPositionStack,
}


def text_stack(root: nn.Module) -> TextStack:
    """Return the stack that walks a text model.

    Raises:
        ValueError: the text model is of a kind that is not known here.
    """
    config: Any = root.config
    kind = str(config.model_type)
    if kind not in TEXT_STACKS:
        known = ", ".join(sorted(TEXT_STACKS))
        raise ValueError(f"the text model must be one of {known} (got model_type={kind!r})")
    return TEXT_STACKS[kind](root)
