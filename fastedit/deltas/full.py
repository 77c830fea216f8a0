"""A full-weight change of chosen linear modules (fine-tuning)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastedit.backbone.cpu_linear import choose_linear, onednn_product
from fastedit.deltas.base import DeltaSpec, EditDelta, FlatStack
from fastedit.deltas.nullspace import projected
from fastedit.deltas.rows import Rows, TokenSpans
from fastedit.ops import implementations

#: Layouts of batches whose offsets are kept on a device.
KEPT = 8

T = TypeVar("T")


@dataclass(frozen=True)
class Factored:
    """A step's gradient of all parts, each a sum over an edit's tokens of ``grads_t inputs_t^T``.

    Args:
        inputs: one (T, i) per part. grads: one (T, o) per part. offsets: one (B + 1,) int64 per part, tokens by edit.
    """

    inputs: list[Tensor]
    grads: list[Tensor]
    offsets: list[Tensor]

    def matrices(self, rows: Tensor) -> list[Tensor]:
        """Views (B, o, i) of rows (B, P), one per part."""
        shapes = [(y.shape[1], x.shape[1]) for x, y in zip(self.inputs, self.grads, strict=True)]
        parts = torch.split(rows, [o * i for o, i in shapes], 1)
        return [part.view(len(rows), *shape) for part, shape in zip(parts, shapes, strict=True)]


class FullDelta(FlatStack):
    """One (d_out, d_in) matrix per edit and site, zero at the start: ``y += x @ delta.T``.

    Parts: ``"{layer}.{name}:delta"`` of shape (B, d_out, d_in). An edit has fewer tokens than a matrix has rows, so its
    gradient is kept as the outer products that it is the sum of (``factored``), where an op takes them so.
    """

    #: Whether gradients may stay outer products: not where something reads or changes ``grad`` after the backward pass.
    keeps_outer = True
    #: By site, orthonormal directions (d_in, m) of its input that are not seen while the deltas are fitted; or none.
    kept_inputs: Sequence[Tensor] = ()

    def __init__(
        self, spec: DeltaSpec, size: int, *, dtype: torch.dtype, device: torch.device | str, trainable: bool
    ) -> None:
        shapes = {f"{site.layer}.{site.name}:delta": (site.d_out, site.d_in) for site in spec.sites}
        super().__init__(spec, shapes, size, dtype=dtype, device=device, trainable=trainable)
        self.products = _products(dtype, self.flat.device)
        served = implementations()["adam_step_outer_"].get(self.flat.device.type) not in (None, "reference")
        self._keeps = trainable and self.keeps_outer and served and dtype in (torch.float32, torch.float64)
        self._left_outer = False
        #: Part -> inputs, gradients and offsets of its only use in this step.
        self._outer: dict[str, tuple[Tensor, Tensor, list[int]]] = {}
        self._ends: dict[tuple[int, ...], Tensor] = {}

    def delta(self, site: int, x: Tensor, rows: Rows | TokenSpans, _output: Tensor | None = None) -> Tensor:
        """Change of site number ``site``'s output for x (tokens, d_in), tokens sorted by edit: (tokens, d_out)."""
        name = self.part_names()[site]
        offsets = rows.token_offsets(x.shape[0], self.size)
        x = x.to(self.flat.dtype)
        if self.kept_inputs:
            x = projected(x, self.kept_inputs[site])
        if self.trainable and torch.is_grad_enabled():
            changed: Tensor = _PerEditLinear.apply(self.anchor, x, self, name, offsets)  # type: ignore[no-untyped-call]
            return changed
        return self.products.outputs(x, self.parts[name], offsets)

    def add_outer(self, name: str, inputs: Tensor, grads: Tensor, offsets: list[int]) -> None:
        """Take the gradient of a part from one use of it: inputs (T, i) and the gradients of its outputs (T, o)."""
        if self._left_outer and self._fresh[name]:
            self._fresh[name] = False
            self._outer[name] = (inputs.detach(), grads, offsets)
            return
        first = self.first_gradient(name)
        self.products.outer(grads, inputs, offsets, self.part_grads[name], add=not first)

    def _write_outer(self) -> None:
        """Write what is kept as outer products into ``grad``."""
        for name, (inputs, grads, offsets) in self._outer.items():
            self.products.outer(grads, inputs, offsets, self.part_grads[name], add=False)
        self._outer = {}

    def first_gradient(self, name: str) -> bool:
        """Whether part ``name`` has no gradient in this step yet; the caller must store one if so."""
        self._write_outer()
        return super().first_gradient(name)

    def begin_step(self, *, outer: bool = False) -> None:
        """Forget the gradients of the step before; ``outer``: the step's may be left as outer products."""
        super().begin_step()
        self._outer, self._left_outer = {}, outer and self._keeps

    def end_step(self) -> None:
        """After the backward pass: ``grad`` is complete from here on, unless all of it are outer products."""
        if self._pending or (self._outer and len(self._outer) + sum(self._fresh.values()) < len(self.shapes)):
            self._write_outer()
        if not self._outer:
            super().end_step()

    def factored(self) -> Factored | None:
        """The step's gradient as outer products; None where ``grad`` has it."""
        if not self._outer:
            return None
        parts = []
        for name, (d_out, d_in) in self.shapes.items():
            unused = self.flat.new_empty(0, d_in), self.flat.new_empty(0, d_out), [0] * (self.size + 1)
            inputs, grads, offsets = self._outer.get(name, unused)
            parts.append((inputs, grads, self._on_device(offsets)))
        inputs_of, grads_of, offsets_of = zip(*parts, strict=True)
        return Factored(list(inputs_of), list(grads_of), list(offsets_of))

    def _on_device(self, offsets: list[int]) -> Tensor:
        """Offsets (B + 1,) int64 beside the parameters; those of the last batches are there already."""
        return _kept(self._ends, offsets, lambda: torch.tensor(offsets, device=self.flat.device))


def _kept(cache: dict[tuple[int, ...], T], offsets: list[int], make: Callable[[], T]) -> T:
    """What was made for these offsets; the oldest of ``KEPT`` makes room."""
    key = tuple(offsets)
    if key not in cache:
        while len(cache) >= KEPT:
            del cache[next(iter(cache))]
        cache[key] = make()
    return cache[key]


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


class Padded:
    """The same as batched products of as many tokens for every edit as the largest has, on a GPU.

    How many launches that takes does not depend on the number of edits. ``nn.functional.grouped_mm`` is no help: on
    a GPU torch documents it for bfloat16 alone, and deltas are float32.
    """

    def __init__(self) -> None:
        self._places: dict[tuple[int, ...], tuple[Tensor, int]] = {}

    def _place(self, offsets: list[int], device: torch.device) -> tuple[Tensor, int]:
        """(T,) int64, where each token stands among the padded ones, and how many of those an edit has."""

        def place() -> tuple[Tensor, int]:
            most = max(1, *(end - start for start, end in pairwise(offsets)))
            places = [b * most + t for b, (start, end) in enumerate(pairwise(offsets)) for t in range(end - start)]
            return torch.tensor(places, dtype=torch.long, device=device), most

        return _kept(self._places, offsets, place)

    def _spread(self, x: Tensor, offsets: list[int]) -> Tensor:
        """Tokens (T, d) as (B, n, d), zeros behind an edit's own."""
        if _uniform(offsets):
            return x.view(len(offsets) - 1, -1, x.shape[-1])
        place, most = self._place(offsets, x.device)
        spread = x.new_zeros((len(offsets) - 1) * most, x.shape[-1]).index_copy_(0, place, x)
        return spread.view(len(offsets) - 1, most, x.shape[-1])

    def outputs(self, x: Tensor, matrices: Tensor, offsets: list[int]) -> Tensor:
        """x (T, i) through its edit's matrix: (T, o)."""
        return self.inputs(x, matrices.transpose(1, 2), offsets)

    def inputs(self, y: Tensor, matrices: Tensor, offsets: list[int]) -> Tensor:
        """y (T, o) times its edit's matrix: (T, i)."""
        if offsets[-1] == 0 or _uniform(offsets):
            return _Torch.inputs(y, matrices, offsets)
        product = torch.bmm(self._spread(y, offsets), matrices).flatten(0, 1)
        return product.index_select(0, self._place(offsets, y.device)[0])

    def outer(self, y: Tensor, x: Tensor, offsets: list[int], out: Tensor, *, add: bool) -> None:
        """Sums over an edit's tokens of y_t x_t^T, stored in or added to out (B, o, i)."""
        if offsets[-1] == 0:
            _ = out if add else out.zero_()
            return
        by_edit = self._spread(y, offsets).transpose(1, 2)
        torch.baddbmm(out, by_edit, self._spread(x, offsets), beta=1.0 if add else 0.0, out=out)


def _products(dtype: torch.dtype, device: torch.device) -> type[_Torch] | type[_OneDnn] | Padded:
    """What multiplies on a device. A CPU, which launches nothing, goes edit by edit."""
    if device.type != "cpu":
        return Padded()
    return _OneDnn if choose_linear("auto", dtype, device) == "onednn" else _Torch


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
        stack.add_outer(ctx.name, x, grad, offsets)
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
