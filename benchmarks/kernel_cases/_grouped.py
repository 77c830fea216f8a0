"""What the ops on tokens sorted by edit share: a backward through all inputs, and tokens padded to equal counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor


def step(forward: Callable[[], Tensor], leaves: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """Return the output and its gradients by all leaves."""
    y = forward()
    return y.detach(), *torch.autograd.grad(y, leaves, grad)


def rows(offsets: Tensor) -> list[slice]:
    """Return the rows of every edit."""
    return [slice(start, stop) for start, stop in pairwise(offsets.tolist())]


def padded(x: Tensor, offsets: Tensor) -> Tensor:
    """Return tokens (B, N, d), those an edit lacks being 0."""
    return torch.nn.utils.rnn.pad_sequence([x[own] for own in rows(offsets)], batch_first=True)


def unpadded(y: Tensor, offsets: Tensor) -> Tensor:
    """Return (T, o) of padded (B, N, o)."""
    counts = offsets.diff()
    return y[torch.arange(y.shape[1], device=y.device)[None] < counts[:, None]]


def touched(tokens: int, edits: int, d: int, d_out: int, parameters: int) -> int:
    """Return the bytes of float32 that forward and backward cannot do without: every input and output once."""
    # x, its gradient; the output, its gradient; the parameters of every edit and theirs, the few biases left out
    return 4 * 2 * (tokens * (d + d_out) + edits * parameters)


def assert_equal(ours: Sequence[Tensor], theirs: Sequence[Tensor], *, tolerance: float = 1e-4) -> None:
    """Compare tensor by tensor, relative to the largest entry."""
    for place, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        error = float((one.double() - other.double()).abs().max())
        bound = tolerance * max(float(other.abs().max()), 1e-30)
        if not error <= bound:
            raise AssertionError(f"result {place}: error {error:.3e} exceeds {bound:.3e}")
