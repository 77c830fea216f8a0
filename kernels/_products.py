"""What kernels on tokens sorted by edit share: whose tokens a program has, and products of tiles on tensor cores."""

from typing import Any

import torch
import triton
import triton.language as tl

#: How a product of float32 tiles is computed. Tensor cores round operands to 11 bits ("tf32"), which is exact for
#: features of 16 bits; three products keep what that rounds off ("tf32x3"). float64 goes by broadcasting.
NARROW, WIDE, DOUBLE = "tf32", "tf32x3", "none"


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """Return (M, K) (K, N) added to acc."""
    if PRECISION == "none":
        return acc + tl.sum(a[:, :, None] * b[None, :, :], axis=1)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def bounds(offsets, index, inside, T):
    """Return an edit's first row and the one behind its last, within [0, T] whatever the offsets say."""
    # nobody waits for a GPU to look at them
    start = tl.load(offsets + index, mask=inside, other=0)
    stop = tl.load(offsets + index + 1, mask=inside, other=0)
    start = tl.minimum(tl.maximum(start, 0), T)
    return start, tl.minimum(tl.maximum(stop, start), T)


@triton.jit
def tile(offsets, edits, T, pid, BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr):
    """Return tile number ``pid``: its edit, its first row, and the row behind the edit's last."""
    # Tiles are counted edit by edit; every program finds its own among the cumulated counts: no host, no extra launch.
    index = tl.arange(0, BLOCK_B)
    start, stop = bounds(offsets, index, index < edits, T)
    tiles = (stop - start + BLOCK_T - 1) // BLOCK_T
    until = tl.cumsum(tiles, axis=0)
    edit = tl.sum((until <= pid).to(tl.int32), axis=0)
    chosen = index == edit
    before = tl.sum(tl.where(chosen, until - tiles, 0), axis=0)
    first = tl.sum(tl.where(chosen, start, 0), axis=0) + (pid - before) * BLOCK_T
    last = tl.sum(tl.where(chosen, stop, 0), axis=0)
    return edit.to(tl.int64), first, last


def tiles_of(tokens: int, edits: int, block: int) -> int:
    """Return how many tiles there are at most: every edit leaves one unfilled. Programs without one return at once."""
    return int(triton.cdiv(tokens, block)) + edits


def precision_of(dtype: torch.dtype) -> str:
    """Return how products with features of this dtype are computed."""
    if dtype == torch.float64:
        return DOUBLE
    return WIDE if dtype == torch.float32 else NARROW


def operand_of(features: torch.dtype, parameters: torch.dtype) -> Any:
    """Return the dtype of both operands: as stored where they agree on 16 bits, else the one that sums are kept in."""
    if features == torch.float64:
        return tl.float64
    # the interpreter multiplies no bfloat16
    same = features == parameters and not triton.knobs.runtime.interpret
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(features, tl.float32) if same else tl.float32
