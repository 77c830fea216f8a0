"""Decoders that read by cross-attention: some layers a row's image (Mllama), or all layers an encoder's states (T5).

Rows without an image skip the layers that read images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..packed import PackedState, token_rows

#: The argument of a decoder that holds what layers read of an image: (tiles, patches, d) of one row.
STATES = "cross_attention_states"
#: The argument of a decoder that holds what an encoder makes of a row's prompt and image: (1, K, d).
ENCODED = "encoder_hidden_states"
#: Arguments that say of every token, on this axis, what it sees of those. Text behind a prompt sees what its end sees.
PER_TOKEN = ("cross_attention_mask", "full_text_row_masked_out_mask")
TOKEN_AXIS = 2
#: The axis of tokens, of arguments whose sizes do not tell it.
AXES: dict[str, int | None] = {STATES: None, ENCODED: None, **dict.fromkeys(PER_TOKEN, TOKEN_AXIS)}
#: What a processor says of every token: which tiles of an image it sees, (1, N, images, tiles).
SEEN = "cross_attention_mask"


def cross_layers(config: Any) -> frozenset[int]:
    """Layers of a decoder that read images, by its configuration."""
    return frozenset(getattr(config, "cross_attention_layers", None) or ())


def reads_encoder(config: Any) -> bool:
    """Whether a text model has an encoder, by its configuration."""
    return bool(getattr(config, "is_encoder_decoder", False))


def followed(values: dict[str, Any], count: int) -> dict[str, Any]:
    """What some tokens of text behind a prompt are handed, by the prompt's arguments."""
    going = {name: values[name] for name in (STATES, ENCODED) if name in values}
    for name in PER_TOKEN:
        if name in values:
            last = values[name].narrow(TOKEN_AXIS, values[name].shape[TOKEN_AXIS] - 1, 1)
            going[name] = last.expand(*[count if axis == TOKEN_AXIS else -1 for axis in range(last.dim())])
    return going


def read_keys(state: PackedState) -> list[int]:
    """By row with tokens here, how many keys there are to read; 0 without any."""
    sizes = []
    for entry, count in zip(state.entries, state.counts, strict=True):
        values = {} if entry is None or not count else entry.values
        states = values.get(STATES, values.get(ENCODED))
        sizes.append(0 if states is None else states.shape[0] * states.shape[1])
    return sizes


def seeing_tokens(state: PackedState) -> Tensor | None:
    """(T,), bool: the tokens of rows with an image; None where no row has one."""
    sizes = read_keys(state)
    if not any(sizes):
        return None
    device = state.hidden.device
    return torch.tensor([size > 0 for size in sizes], device=device)[token_rows(state.counts, device)]


def attend_read(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    tokens: Sequence[int],
    keys: Sequence[int],
    scale: float,
) -> Tensor:
    """Attention of every row's tokens over what it reads: (1, T, heads, d_head).

    Args:
        query: (1, heads, T, d_head). key, value: (1, groups, sum(keys), d_head).
        mask: (1, 1, T, K), what is added to scores; None is nothing.
        tokens, keys: of every row. Tokens of a row without keys get zeros.
    """
    share = query.shape[1] // key.shape[1]
    rows = []
    first = begun = 0
    for count, size in zip(tokens, keys, strict=True):
        asked = query[:, :, first : first + count]
        if size:
            k, v = (part[:, :, begun : begun + size].repeat_interleave(share, 1) for part in (key, value))
            seen = None if mask is None else mask[:, :, first : first + count, :size]
            rows.append(torch.nn.functional.scaled_dot_product_attention(asked, k, v, attn_mask=seen, scale=scale))
        else:
            rows.append(torch.zeros_like(asked))
        first, begun = first + count, begun + size
    return torch.cat(rows, 2).transpose(1, 2)
