"""Parameters of deltas as objectives read them: a count-sketch and a norm, without a copy of the parameters."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

#: Columns of parameters at a time, whatever the number of edits: sums are in the same order in every batch.
COLUMNS = 1 << 18
#: Added to the square of the norm, whose logarithm is taken.
LEAST = 1e-12


class Rows(Protocol):
    """A stack whose rows (B, P) are read, and which takes what is added to their gradient."""

    flat: Tensor
    grad: Tensor
    anchor: Tensor

    def receive_later(self, add: Any) -> None:
        """Call ``add()`` once every part's gradient is there; it adds to ``grad``."""


def sketched(stack: Rows, signs: Tensor, length: int) -> Tensor:
    """Count-sketch of every row and half the logarithm of its squared norm; the gradient is added to the stack's.

    Entry k of the sketch is the sum of ``signs_j flat_j`` over j = k modulo its length (Charikar et al., 2002). Neither
    way makes anything as large as the rows: they are gone through a block of columns at a time.

    Args:
        stack: of B deltas, rows (B, P) floating.
        signs: (P,) int8, 1 or -1.
        length: of the sketch, less than P.
    Returns:
        (B, length + 1), dtype of the rows.
    """
    summary: Tensor = _Sketch.apply(stack.anchor, stack, signs, length)  # type: ignore[no-untyped-call]
    return summary


def sketch_of(flat: Tensor, signs: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The sketch (B, length) of rows (B, P), and their squared norms (B,)."""
    sketch, squares = flat.new_zeros(len(flat), length), flat.new_zeros(len(flat))
    for start, end in _blocks(flat.shape[1], length):
        part = flat[:, start:end]
        squares += part.square().sum(1)
        signed, whole = part * signs[start:end], (end - start) // length * length
        if whole:
            sketch += signed[:, :whole].view(len(flat), -1, length).sum(1)
        if whole < end - start:
            sketch[:, : end - start - whole] += signed[:, whole:]
    return sketch, squares


def _blocks(width: int, length: int) -> list[tuple[int, int]]:
    """Columns by block; each begins at entry 0 of the sketch."""
    step = max(1, COLUMNS // length) * length
    return [(start, min(start + step, width)) for start in range(0, width, step)]


class _Sketch(torch.autograd.Function):
    """See ``sketched``."""

    @staticmethod
    def forward(ctx: Any, _anchor: Tensor, stack: Rows, signs: Tensor, length: int) -> Tensor:
        sketch, squares = sketch_of(stack.flat, signs, length)
        ctx.stack, ctx.length = stack, length
        ctx.save_for_backward(signs, squares)
        return torch.cat([sketch, 0.5 * torch.log(squares + LEAST)[:, None]], 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, None]:
        signs, squares = ctx.saved_tensors
        stack, length = ctx.stack, ctx.length
        by_entry, by_square = grad[:, :length].contiguous(), (grad[:, length] / (squares + LEAST))[:, None]

        def add() -> None:
            for start, end in _blocks(stack.flat.shape[1], length):
                times = -(-(end - start) // length)
                repeated = by_entry.repeat(1, times)[:, : end - start]
                into = stack.grad[:, start:end]
                into.addcmul_(repeated, signs[start:end].to(grad.dtype)).addcmul_(stack.flat[:, start:end], by_square)

        stack.receive_later(add)
        return None, None, None, None
