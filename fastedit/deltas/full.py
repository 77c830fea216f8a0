"""A full-weight change of chosen linear modules (fine-tuning)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastedit.deltas.base import DeltaSpec, EditDelta, FlatStack, Rows


class FullDelta(FlatStack):
    """One (d_out, d_in) matrix per edit and site, zero at the start: ``y += x @ delta.T``.

    Parts: ``"{layer}.{name}:delta"`` of shape (B, d_out, d_in).
    """

    def __init__(
        self, spec: DeltaSpec, size: int, *, dtype: torch.dtype, device: torch.device | str, trainable: bool
    ) -> None:
        shapes = {f"{site.layer}.{site.name}:delta": (site.d_out, site.d_in) for site in spec.sites}
        super().__init__(spec, shapes, size, dtype=dtype, device=device, trainable=trainable)

    def delta(self, site: int, x: Tensor, rows: Rows) -> Tensor:
        """Change of site number ``site``'s output for x (tokens, d_in), tokens sorted by edit: (tokens, d_out)."""
        name = self.part_names()[site]
        offsets = rows.token_offsets(x.shape[0], self.size)
        x = x.to(self.flat.dtype)
        if self.trainable and torch.is_grad_enabled():
            changed: Tensor = _PerEditLinear.apply(self.anchor, x, self, name, offsets)  # type: ignore[no-untyped-call]
            return changed
        return _per_edit_product(x, self.parts[name].transpose(1, 2), offsets)


def _per_edit_product(x: Tensor, matrices: Tensor, offsets: list[int]) -> Tensor:
    """x (T, i) times the matrix (B, i, o) of its edit: (T, o)."""
    if _uniform(offsets):
        # (B, n, i) x (B, i, o): one batched product
        return torch.bmm(x.view(matrices.shape[0], -1, x.shape[-1]), matrices).view(x.shape[0], -1)
    out = x.new_empty(x.shape[0], matrices.shape[-1])
    for b, (start, end) in enumerate(pairwise(offsets)):
        if end > start:
            torch.mm(x[start:end], matrices[b], out=out[start:end])
    return out


def _uniform(offsets: list[int]) -> bool:
    return len({end - start for start, end in pairwise(offsets)}) == 1


class _PerEditLinear(torch.autograd.Function):
    """``y_t = W_b x_t`` for tokens t of edit b; the gradient of every W_b is written straight into the stack."""

    @staticmethod
    def forward(ctx: Any, _anchor: Tensor, x: Tensor, stack: FullDelta, name: str, offsets: list[int]) -> Tensor:
        ctx.stack, ctx.name, ctx.offsets = stack, name, offsets
        ctx.save_for_backward(x)
        return _per_edit_product(x, stack.parts[name].transpose(1, 2), offsets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, None, None, None]:
        (x,) = ctx.saved_tensors
        stack, offsets = ctx.stack, ctx.offsets
        grad = grad.contiguous()
        target, first = stack.part_grads[ctx.name], stack.first_gradient(ctx.name)
        if _uniform(offsets) and offsets[-1] > 0:
            # (B, o, n) x (B, n, i)
            g = grad.view(stack.size, -1, grad.shape[-1]).transpose(1, 2)
            xs = x.view(stack.size, -1, x.shape[-1])
            torch.baddbmm(target, g, xs, beta=0.0 if first else 1.0, out=target)
        else:
            for b, (start, end) in enumerate(pairwise(offsets)):
                if end > start:
                    torch.addmm(target[b], grad[start:end].T, x[start:end], beta=0.0 if first else 1.0, out=target[b])
                elif first:
                    target[b].zero_()
        grad_x = _per_edit_product(grad, stack.parts[ctx.name], offsets) if ctx.needs_input_grad[1] else None
        return None, grad_x, None, None, None


def accumulate_full(deltas: Sequence[EditDelta]) -> EditDelta:
    """The sum of full deltas."""
    tensors = {name: torch.stack([d.tensors[name] for d in deltas]).sum(0) for name in deltas[0].tensors}
    return replace(deltas[0], tensors=tensors, request_id="+".join(d.request_id for d in deltas))
