"""The decoder walked over right-padded rows, through its stock modules: the measure of the packed walk.

Rows are padded on the right, so that the causal mask alone keeps tokens from seeing padding: no mask over padding is
made. The modules get no position ids beside the position tables: attention kernels would read repeated ones as several
packed sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from fastedit.backbone import EditableModel, Encoded
from fastedit.backbone.packed_forward import padded_start
from fastedit.backbone.rotary import RotaryStack, _rotate
from fastedit.backbone.stacks import split_heads


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


@dataclass(slots=True)
class PrefixState:
    """Everything that the decoder needs from one point on: rows, right-padded.

    Args:
        hidden: (R, N, d). The residual stream entering layer `layer` (stage "attention") or entering the
            feed-forward block of that layer (stage "ffn").
        position_ids: (R, A, N), int64. A = 1, or 3 where positions have a time, a height and a width.
        lengths: (R,), int64. Tokens of each row.
        layer, stage: where the decoder continues.
        deep: visual features (R, N, d), zero at other tokens, by the layer whose output they are added to;
            only layers from `layer` on.
        gathered: True when `hidden` holds chosen positions instead of whole rows (see `at`).
    """

    hidden: Tensor
    position_ids: Tensor
    lengths: Tensor
    layer: int
    stage: str
    deep: dict[int, Tensor] = field(default_factory=dict)
    gathered: bool = False
    # Masks and rotary tables: made by the model at the first use, dropped by select, cat and to.
    cache: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return self.hidden.shape[0]

    @property
    def attention_mask(self) -> Tensor:
        """(R, N), bool: True at tokens."""
        return torch.arange(self.hidden.shape[1], device=self.lengths.device)[None, :] < self.lengths[:, None]

    def select(self, rows: Sequence[int] | Tensor) -> PrefixState:
        """Return these rows, in this order, trimmed to the longest of them."""
        index = torch.as_tensor(rows, device=self.hidden.device)
        kept = self.hidden.shape[1]
        if not self.gathered:
            kept = max(int(self.lengths[index].max()), 1) if index.numel() else 0
        return replace(
            self,
            hidden=self.hidden[index, :kept],
            position_ids=self.position_ids[index, :, :kept],
            lengths=self.lengths[index],
            deep={layer: part[index, :kept] for layer, part in self.deep.items()},
            cache={},
        )

    def at(self, positions: Tensor) -> PrefixState:
        """Return the state at chosen positions only, for a stage after which no position sees another.

        Args:
            positions: (R, M), int64; -1 is padding and yields zeros.
        Raises:
            ValueError: the stage is "attention", where other positions are still needed.
        """
        if self.stage != "ffn":
            raise ValueError(f"PrefixState.at: only the stage 'ffn' can drop positions (got stage={self.stage!r})")
        return replace(
            self,
            hidden=gather_positions(self.hidden, positions),
            position_ids=self.position_ids.gather(
                2, positions.clamp(min=0)[:, None, :].expand(-1, self.position_ids.shape[1], -1)
            ),
            deep={layer: gather_positions(part, positions) for layer, part in self.deep.items()},
            gathered=True,
            cache={},
        )


def gather_positions(values: Tensor, positions: Tensor) -> Tensor:
    """Return values (R, N, d) at positions (R, M), zeros where a position is -1: (R, M, d)."""
    index = positions.clamp(min=0)[:, :, None].expand(-1, -1, values.shape[-1])
    return values.gather(1, index) * (positions >= 0)[:, :, None].to(values.dtype)


def start(model: EditableModel, encoded: Encoded) -> PrefixState:
    """The state entering layer 0."""
    entering = padded_start(model, encoded)
    return PrefixState(entering.hidden, entering.position_ids, encoded.lengths, 0, "attention", entering.deep)


@torch.no_grad()
def prefix(model: EditableModel, encoded: Encoded, layer: int, stage: str = "attention") -> PrefixState:
    """Return the state entering a decoder layer, or entering its feed-forward block.

    Args:
        encoded: R rows.
        layer: 0 <= layer < n_layers.
        stage: "attention" (entering the layer) or "ffn" (the residual stream after its attention block).
    Raises:
        ValueError: no such layer.
    """
    model.check_layer(layer)
    text = model.adapter.text
    state = start(model, encoded)
    masks = context(model, state)
    hidden = state.hidden
    for index in range(layer):
        hidden = _add_deep(layer_output(text, index, hidden, masks), state, index)
    if stage == "ffn":
        hidden = attend(text, layer, hidden, masks)
    deep = {index: part for index, part in state.deep.items() if index >= layer}
    return PrefixState(hidden, state.position_ids, state.lengths, layer, stage, deep)


def tail(model: EditableModel, state: PrefixState, *, positions: Tensor | None = None) -> Tensor:
    """Return final hidden states after the final norm, differentiable in whatever is hooked onto submodules.

    Args:
        state: from `prefix`, R rows of N positions.
        positions: (R, M), int64; -1 is padding. The last layer then computes queries, feed-forward and final norm
            at these positions only.
    Returns:
        (R, N, d), or (R, M, d) at the positions. Padding yields unspecified finite values.
    """
    text = model.adapter.text
    last = model.n_layers - 1
    if state.gathered:
        if state.layer != last or positions is not None:
            got = f"layer={state.layer} of 0..{last}, positions {'given' if positions is not None else 'not given'}"
            raise ValueError(f"tail: a gathered state must be of the last layer, without positions (got {got})")
        return text.finish(_add_deep(text.feed_forward(last, state.hidden), state, last))
    if state.stage == "ffn" and state.layer == last and positions is not None:
        # Nothing mixes positions any more.
        return tail(model, state.at(positions))
    hidden, first = state.hidden, state.layer
    if state.stage == "ffn":
        hidden = _add_deep(text.feed_forward(first, hidden), state, first)
        first += 1
    masks = context(model, state)
    for index in range(first, last if positions is not None else last + 1):
        hidden = _add_deep(layer_output(text, index, hidden, masks), state, index)
    if positions is not None:
        hidden = text.feed_forward(last, attend_at(text, last, hidden, positions, masks))
        if last in state.deep:
            hidden = hidden + gather_positions(state.deep[last], positions)
    return text.finish(hidden)


def context(model: EditableModel, state: PrefixState) -> Context:
    """Return masks and position tables of a state, made once and kept with it."""
    known = state.cache.get("context")
    if isinstance(known, Context):
        return known
    text = model.adapter.text
    with torch.no_grad():
        made = Context(
            position_ids=state.position_ids,
            rotary=text.rotary(state.hidden, state.position_ids),
            masks=causal_masks(text.config, set(text.kinds), state.hidden),
        )
    state.cache["context"] = made
    return made


def _add_deep(hidden: Tensor, state: PrefixState, layer: int) -> Tensor:
    return hidden + state.deep[layer] if layer in state.deep else hidden


def layer_output(stack: Any, index: int, hidden: Tensor, context: Context) -> Tensor:
    """Output of a whole layer."""
    chosen = _layer_rotary if isinstance(stack, RotaryStack) else _layer_opt
    return chosen(stack, index, hidden, context)


def attend(stack: Any, index: int, hidden: Tensor, context: Context) -> Tensor:
    """Residual stream after the attention block of a layer."""
    chosen = _attend_rotary if isinstance(stack, RotaryStack) else _attend_opt
    return chosen(stack, index, hidden, context)


def attend_at(stack: Any, index: int, hidden: Tensor, positions: Tensor, context: Context) -> Tensor:
    """The same at (R, M) positions: queries there, keys and values everywhere."""
    chosen = _attend_at_rotary if isinstance(stack, RotaryStack) else _attend_at_opt
    return chosen(stack, index, hidden, positions, context)


def _layer_rotary(stack: Any, index: int, hidden: Tensor, context: Context) -> Tensor:
    """Return the output of the stock layer."""
    return attention_output(
        stack.layers[index](
            hidden,
            attention_mask=context.masks[stack.kinds[index]],
            position_embeddings=context.rotary,
        )
    )


def _attend_rotary(stack: Any, index: int, hidden: Tensor, context: Context) -> Tensor:
    """Return the residual stream after the stock attention module."""
    layer: Any = stack.layers[index]
    result = layer.self_attn(
        hidden_states=layer.input_layernorm(hidden),
        attention_mask=context.masks[stack.kinds[index]],
        position_embeddings=context.rotary,
    )
    return hidden + attention_output(result)


def _attend_at_rotary(stack: Any, index: int, hidden: Tensor, positions: Tensor, context: Context) -> Tensor:
    """Return the residual stream after attention at chosen positions."""
    layer: Any = stack.layers[index]
    attention = layer.self_attn
    assert context.rotary is not None
    cosine, sine = context.rotary
    normed = layer.input_layernorm(hidden)
    head_dim = attention.head_dim
    query = split_heads(attention.q_proj(gather_positions(normed, positions)), head_dim)
    key = split_heads(attention.k_proj(normed), head_dim)
    value = split_heads(attention.v_proj(normed), head_dim)
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    query = _rotate(query, gather_positions(cosine, positions), gather_positions(sine, positions))
    key, value = _rotate(key, cosine, sine).transpose(1, 2), value.transpose(1, 2)
    mixed = functional.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.repeat_interleave(attention.num_key_value_groups, dim=1),
        value.repeat_interleave(attention.num_key_value_groups, dim=1),
        attn_mask=allowed_keys(stack.config, stack.kinds[index], positions, hidden.shape[1]),
        scale=attention.scaling,
    )
    output = attention.o_proj(mixed.transpose(1, 2).flatten(2))
    return gather_positions(hidden, positions) + cast(Tensor, output)


def _layer_opt(stack: Any, index: int, hidden: Tensor, context: Context) -> Tensor:
    """Return the output of a layer. Block by block: the stock layer flattens rows before its linear maps."""
    return stack.feed_forward(index, _attend_opt(stack, index, hidden, context))


def _attend_opt(stack: Any, index: int, hidden: Tensor, context: Context) -> Tensor:
    """Return the residual stream after the stock attention module."""
    layer: Any = stack.layers[index]
    normed = layer.self_attn_layer_norm(hidden) if layer.do_layer_norm_before else hidden
    result = layer.self_attn(
        hidden_states=normed,
        attention_mask=context.masks["full_attention"],
    )
    return stack._after_attention(layer, hidden + attention_output(result))


def _attend_at_opt(stack: Any, index: int, hidden: Tensor, positions: Tensor, context: Context) -> Tensor:
    """Return the residual stream after attention at chosen positions."""
    layer: Any = stack.layers[index]
    attention = layer.self_attn
    normed = layer.self_attn_layer_norm(hidden) if layer.do_layer_norm_before else hidden
    query = attention.q_proj(gather_positions(normed, positions)) * attention.scaling
    mixed = functional.scaled_dot_product_attention(
        split_heads(query, attention.head_dim).transpose(1, 2),
        split_heads(attention.k_proj(normed), attention.head_dim).transpose(1, 2),
        split_heads(attention.v_proj(normed), attention.head_dim).transpose(1, 2),
        attn_mask=allowed_keys(stack.config, "full_attention", positions, hidden.shape[1]),
        scale=1.0,
    )
    output = attention.out_proj(mixed.transpose(1, 2).flatten(2))
    return stack._after_attention(layer, gather_positions(hidden, positions) + output)


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
