"""Modules that mix tokens without the attention function, called on rows that are padded on the right.

A recurrence, a convolution, positions that are counted inside: each is causal, so nothing sees the padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..packed import PackedState, first_tokens, token_rows
from ..token_layout import Running, TokenLayout, token_layout
from .context import Forward, walking
from .door import map_tensors
from .masks import RowMask, plan_rows


class Padding:
    """Where packed tokens stand in rows that are padded on the right; rows without tokens are left out.

    Args:
        state: whose rows begin with their first token.
    """

    def __init__(self, state: PackedState) -> None:
        self.counts = [count for count in state.counts if count]
        self.rows, self.width = len(self.counts), max(self.counts)
        device = state.hidden.device
        row = token_rows(self.counts, device)
        place = torch.arange(len(row), device=device) - first_tokens(self.counts, device)[row]
        #: (T,), int64: index of a token in the padded rows.
        self.slots = row * self.width + place

    def spread(self, value: Any) -> Any:
        """Tensors with an axis of packed tokens, (1, T, ...) and the like, as (R, N, ...); others as they are."""
        return map_tensors(value, self._spread)

    def gather(self, value: Tensor) -> Tensor:
        """(R, N, d) as (1, T, d)."""
        return value.reshape(-1, value.shape[-1])[self.slots.to(value.device)][None]

    def _spread(self, value: Tensor) -> Tensor:
        axis = token_axis(value, len(self.slots))
        if axis is None or axis == 0:
            return value
        flat = value.movedim(axis, 0)
        rest = flat.shape[1:]
        wide = flat.new_zeros(self.rows * self.width, *rest).index_copy(0, self.slots.to(flat.device), flat)
        # The axis of rows, which was 1 and stood before the tokens, is now the second of what is left
        wide = wide.view(self.rows, self.width, *rest).squeeze(axis + 1)
        return wide if axis == 1 else wide.movedim((0, 1), (axis - 1, axis))


def token_axis(value: Tensor, tokens: int) -> int | None:
    """The axis of a tensor that counts packed tokens: behind one of length 1, or the first."""
    for axis in range(value.dim()):
        if value.shape[axis] == tokens and (axis == 0 or value.shape[axis - 1] == 1):
            return axis
    return None


def taken(value: Any, index: Tensor, tokens: int) -> Any:
    """Chosen tokens of whatever has packed tokens in it."""

    def take(part: Tensor) -> Tensor:
        axis = token_axis(part, tokens)
        return part if axis is None else part.index_select(axis, index.to(part.device))

    return map_tensors(value, take)


def call_padded(
    stock: Forward,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    state: PackedState,
    masks: Sequence[RowMask],
) -> Any:
    """Call a mixer on padded rows and pack what it returns first."""
    padding = state.remembered("padding", lambda: Padding(state))
    wide = state.remembered(("padded mask", tuple(map(id, masks))), lambda: _mask(state, masks))
    given = {name: padding.spread(value) for name, value in kwargs.items()}
    if "attention_mask" in given:
        # A recurrence takes a mask over padding, which is not needed; attention one over pairs
        given["attention_mask"] = wide if "position_embeddings" in given else None
    with walking(None):
        output = stock(*padding.spread(args), **given)
    if isinstance(output, tuple):
        return (padding.gather(output[0]), *output[1:])
    return padding.gather(output)


def _mask(state: PackedState, masks: Sequence[RowMask]) -> Tensor:
    plan = plan_rows(state, masks, None, state.counts, None)
    if plan.mask is not None and plan.mask.shape[-2] == plan.mask.shape[-1]:
        return plan.mask[torch.tensor([n for n, count in enumerate(state.counts) if count], device=plan.mask.device)]
    rows = sum(1 for count in state.counts if count)
    causal = torch.ones(plan.keys, plan.keys, dtype=torch.bool, device=state.hidden.device).tril()
    return causal.expand(rows, 1, -1, -1)


def layouts_of(state: PackedState, *, padded: bool) -> Running:
    """Whose tokens linear maps see in a walk: all of a state's, those that are wanted, and ``padded`` those of rows."""
    layouts = {sum(state.counts): token_layout(state)}
    if len(state.wanted) != sum(state.counts):
        live = None if state.live is None else state.live[state.wanted]
        layouts[len(state.wanted)] = TokenLayout(state.wanted_counts, live, behind=state.behind)
    if padded:
        wide = _padded_layout(state)
        layouts.setdefault(sum(wide.counts), wide)
    return Running(layouts)


def _padded_layout(state: PackedState) -> TokenLayout:
    """Whose tokens those of padded rows are."""
    padding: Padding = state.remembered("padding", lambda: Padding(state))
    live = None
    if state.live is not None:
        live = torch.zeros(padding.rows * padding.width, dtype=torch.bool, device=state.hidden.device)
        live[padding.slots] = state.live
    counts = tuple(padding.width if count else 0 for count in state.counts)
    return TokenLayout(counts, live, padding.slots[state.wanted], state.wanted_counts, state.behind)
