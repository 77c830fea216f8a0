"""Keys and values of constant tokens, written once; those of the others are put behind them in place at every step."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from .attention import AttentionPlan
from .packed import KeyValue, PackedState, first_tokens, token_rows


class ConstantPast:
    """Constant tokens that come first in every row; gradients pass to the others.

    A layer's buffers serve every step. A step whose backward pass is still to come keeps them, and one that begins
    meanwhile works on copies.
    """

    def __init__(self, state: PackedState) -> None:
        self._state = state
        self._laid_out: dict[tuple[int, int], _Buffers] = {}

    def extend(self, layer: int, plan: AttentionPlan, key: Tensor, value: Tensor) -> KeyValue:
        """See `Past`."""
        if plan.key_slots is None:
            raise ValueError("ConstantPast: a plan with places for keys is needed (got key_slots=None)")
        buffers = self._laid_out.get((layer, plan.capacity))
        if buffers is None:
            buffers = self._laid_out[layer, plan.capacity] = self._of_layer(layer, plan, key.device)
        shape = (plan.rows, plan.capacity, *key.shape[1:])
        if buffers.is_kept:
            return (
                buffers.key.index_copy(0, plan.key_slots, key).view(shape),
                buffers.value.index_copy(0, plan.key_slots, value).view(shape),
            )
        written: KeyValue = _Written.apply(key, value, plan.key_slots, buffers)  # type: ignore[no-untyped-call]
        return written[0].view(shape), written[1].view(shape)

    def _of_layer(self, layer: int, plan: AttentionPlan, device: torch.device) -> _Buffers:
        starts = self._state.starts
        key, value = (part.to(device) for part in self._state.constant[layer])
        row = token_rows(starts, key.device)
        slots = row * plan.capacity + torch.arange(len(row), device=key.device) - first_tokens(starts, key.device)[row]
        empty = key.new_zeros(plan.rows * plan.capacity, *key.shape[1:])
        return _Buffers(empty.index_copy(0, slots, key), empty.index_copy(0, slots, value))


class _Buffers:
    """Keys and values (R * capacity, heads, d_head) of a layer, and whether a graph still needs them as they are."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.key, self.value = key, value
        self._graph: weakref.ref[Any] | None = None

    @property
    def is_kept(self) -> bool:
        """Whether a step has read them that may yet go back through what it read."""
        return self._graph is not None and self._graph() is not None

    def keep_for(self, graph: Any) -> None:
        """Leave them as they are until this node has run backward, or is gone."""
        self._graph = weakref.ref(graph)

    def release(self) -> None:
        """The step has gone back."""
        self._graph = None


class _Written(torch.autograd.Function):
    """New keys and values (T, heads, d_head) in their slots of the buffers."""

    @staticmethod
    def forward(ctx: Any, key: Tensor, value: Tensor, slots: Tensor, buffers: _Buffers) -> KeyValue:
        buffers.key.index_copy_(0, slots, key)
        buffers.value.index_copy_(0, slots, value)
        ctx.buffers = buffers
        ctx.save_for_backward(slots)
        if any(ctx.needs_input_grad):
            buffers.keep_for(ctx)
        return buffers.key.detach(), buffers.value.detach()

    @staticmethod
    def backward(ctx: Any, on_key: Tensor, on_value: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (slots,) = ctx.saved_tensors
        ctx.buffers.release()
        return on_key.index_select(0, slots), on_value.index_select(0, slots), None, None
