"""A full-weight change of chosen linear modules (fine-tuning)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastedit.backbone.cpu_linear import choose_linear, onednn_product
from fastedit.deltas.base import DeltaSpec, EditDelta, FlatStack
from fastedit.deltas.rows import Rows, TokenSpans


class FullDelta(FlatStack):
    """One (d_out, d_in) matrix per edit and site, zero at the start: ``y += x @ delta.T``.

    Parts: ``"{layer}.{name}:delta"`` of shape (B, d_out, d_in).
    """

    def __init__(
        self, spec: DeltaSpec, size: int, *, dtype: torch.dtype, device: torch.device | str, trainable: bool
    ) -> None:
        shapes = {f"{site.layer}.{site.name}:delta": (site.d_out, site.d_in) for site in spec.sites}
        super().__init__(spec, shapes, size, dtype=dtype, device=device, trainable=trainable)
        self.products = _OneDnn if choose_linear("auto", dtype, self.flat.device) == "onednn" else _Torch

    def delta(self, site: int, x: Tensor, rows: Rows | TokenSpans, _output: Tensor | None = None) -> Tensor:
        """Change of site number ``site``'s output for x (tokens, d_in), tokens sorted by edit: (tokens, d_out)."""
        name = self.part_names()[site]
        offsets = rows.token_offsets(x.shape[0], self.size)
        x = x.to(self.flat.dtype)
        if self.trainable and torch.is_grad_enabled():
            changed: Tensor = _PerEditLinear.apply(self.anchor, x, self, name, offsets)  # type: ignore[no-untyped-call]
            return changed
        return self.products.outputs(x, self.parts[name], offsets)


class _Torch:
    """Products of tokens (T, ...) with the matrices (B, o, i) of their edits, by torch."""

    @staticmethod
    def outputs(x: Tensor, matrices: Tensor, offsets: list[int]) -> Tensor:
        """x (T, i) through its edit's matrix: (T, o)."""
        return _Torch.inputs(x, matrices.transpose(1, 2), offsets)

    @staticmethod
    def inputs(y: Tensor, matrices: Tensor, offsets: list[int]) -> Tensor:
        """y (T, o) times its edit's matrix: (T, i)."""
        if _uniform(offsets) and offsets[-1] > 0:
            # (B, n, o) x (B, o, i): one batched product
            by_edit = y.view(matrices.shape[0], -1, y.shape[-1])
            if torch.is_grad_enabled():
                return torch.bmm(by_edit, matrices).flatten(0, 1)
            # Into a tensor that is nobody's view: an autograd function may hand it out to be added to
            out = y.new_empty(y.shape[0], matrices.shape[-1])
            torch.bmm(by_edit, matrices, out=out.view(*by_edit.shape[:2], out.shape[-1]))
            return out
        parts = [y[start:end] @ matrices[b] for b, (start, end) in enumerate(pairwise(offsets)) if end > start]
        return torch.cat(parts) if parts else y.new_empty(0, matrices.shape[-1])

    @staticmethod
    def outer(y: Tensor, x: Tensor, offsets: list[int], out: Tensor, *, add: bool) -> None:
        """Sums over an edit's tokens of y_t x_t^T, stored in or added to out (B, o, i)."""
        beta = 1.0 if add else 0.0
        if _uniform(offsets) and offsets[-1] > 0:
            # (B, o, n) x (B, n, i)
            by_edit = y.view(out.shape[0], -1, y.shape[-1]).transpose(1, 2)
            torch.baddbmm(out, by_edit, x.view(out.shape[0], -1, x.shape[-1]), beta=beta, out=out)
            return
        for b, (start, end) in enumerate(pairwise(offsets)):
            if end > start:
                torch.addmm(out[b], y[start:end].T, x[start:end], beta=beta, out=out[b])
            elif not add:
                out[b].zero_()


class _OneDnn:
    """The same edit by edit through oneDNN, where that is faster than torch's own products."""

    @staticmethod
    def outputs(x: Tensor, matrices: Tensor, offsets: list[int]) -> Tensor:
        """x (T, i) through its edit's matrix: (T, o)."""
        parts = [onednn_product(x[s:e], matrices[b]) for b, (s, e) in enumerate(pairwise(offsets)) if e > s]
        return torch.cat(parts) if parts else x.new_empty(0, matrices.shape[1])

    @staticmethod
    def inputs(y: Tensor, matrices: Tensor, offsets: list[int]) -> Tensor:
        """y (T, o) times its edit's matrix: (T, i)."""
        return _OneDnn.outputs(y, matrices.transpose(1, 2), offsets)

    @staticmethod
    def outer(y: Tensor, x: Tensor, offsets: list[int], out: Tensor, *, add: bool) -> None:
        """Sums over an edit's tokens of y_t x_t^T, stored in or added to out (B, o, i)."""
        for b, (start, end) in enumerate(pairwise(offsets)):
            if end > start:
                product = onednn_product(y[start:end].T, x[start:end].T)
                _ = out[b].add_(product) if add else out[b].copy_(product)
            elif not add:
                out[b].zero_()


def _uniform(offsets: list[int]) -> bool:
    return len({end - start for start, end in pairwise(offsets)}) == 1


class _PerEditLinear(torch.autograd.Function):
    """``y_t = W_b x_t`` for tokens t of edit b; the gradient of every W_b is written straight into the stack."""

    @staticmethod
    def forward(ctx: Any, _anchor: Tensor, x: Tensor, stack: FullDelta, name: str, offsets: list[int]) -> Tensor:
        ctx.stack, ctx.name, ctx.offsets = stack, name, offsets
        ctx.save_for_backward(x)
        return stack.products.outputs(x, stack.parts[name], offsets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, None, None, None]:
        (x,) = ctx.saved_tensors
        stack, offsets = ctx.stack, ctx.offsets
        grad = grad.contiguous()
        first = stack.first_gradient(ctx.name)
        stack.products.outer(grad, x, offsets, stack.part_grads[ctx.name], add=not first)
        grad_x = stack.products.inputs(grad, stack.parts[ctx.name], offsets) if ctx.needs_input_grad[1] else None
        return None, grad_x, None, None, None


def accumulate_full(deltas: Sequence[EditDelta]) -> EditDelta:
    """The sum of full deltas."""
    tensors = {}
    for name, first in deltas[0].tensors.items():
        total = first.clone()
        for delta in deltas[1:]:
            total += delta.tensors[name]
        tensors[name] = total
    return replace(deltas[0], tensors=tensors, request_id="+".join(d.request_id for d in deltas))
