"""Text models with an encoder (T5): a prompt is what the encoder reads, a row what the decoder reads and writes.

Nothing of the encoder is edited: its states are constant, made once for every row. Each layer of the decoder reads
them, and adds to the scores among a row's tokens a bias by their distance, which the first layer has learned for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import AttentionPlan, plan_attention
from ..packed import PackedState
from .masks import asked_places

#: Text models with an encoder that are walked.
ENCODER_TEXTS = frozenset({"t5"})
#: Arguments of a layer that carry position biases, which the walk has its own of.
BIASES = ("position_bias", "encoder_decoder_position_bias")


def start_token(hf: Any) -> int:
    """The token that a decoder behind an encoder begins every row with.

    Raises:
        ValueError: neither generation configuration nor configuration names it.
    """
    language = getattr(hf, "language_model", hf)
    owners = (getattr(language, "generation_config", None), language.config, hf.config)
    for owner in owners:
        token = getattr(owner, "decoder_start_token_id", None)
        if isinstance(token, int):
            return token
    raise ValueError(
        "load: a text model with an encoder must name the token that its decoder begins with in "
        f"decoder_start_token_id (got None for model_type={hf.config.model_type!r})"
    )


@torch.no_grad()
def bias_by_distance(layers: nn.ModuleList, places: int) -> Tensor:
    """(heads, places): what a decoder adds to the score of a key so many places back."""
    owner: Any = next(part for part in layers[0].modules() if hasattr(part, "relative_attention_bias"))
    bias: Tensor = owner.compute_bias(places, places)
    return bias[0, :, -1].flip(-1)


def biased_plan(
    layers: nn.ModuleList,
    state: PackedState,
    chosen: Tensor | None,
    counts: Sequence[int],
    capacity: int | None,
    dtype: torch.dtype,
) -> AttentionPlan:
    """Return the plan of causal attention with a bias by distance, as a mask (R, heads, queries, keys) of numbers.

    Args:
        layers: of the decoder. state, chosen, counts, capacity: see `plan_rows`. dtype: of the queries.
    """
    ends = [start + count for start, count in zip(state.starts, state.counts, strict=True)]
    bias = bias_by_distance(layers, max(ends)).to(state.hidden.device, dtype)
    # A window makes the planner lay out queries and keys under a mask, which is then replaced
    plan = plan_attention(state, chosen, counts, window=1, capacity=capacity)
    lowest = torch.finfo(bias.dtype).min
    wide = bias.new_full((plan.rows, bias.shape[0], plan.queries, plan.keys), lowest)
    rows = range(len(state)) if plan.present is None else plan.present.tolist()
    places = asked_places(state, chosen, counts)
    for number, row in enumerate(rows):
        end = int(state.starts[row]) + state.counts[row]
        back = places[row].to(bias.device)[:, None] - torch.arange(end, device=bias.device)
        part = bias[:, back.clamp(min=0)].masked_fill(back < 0, lowest)
        wide[number, :, : len(back), :end] = part
    return replace(plan, mask=wide, packed=None)
