"""The rows of mmd2's groups laid back to back, less a centre of their group, and how pairs of them are cut into tiles.

What the centre costs: 16-bit features keep every bit. A feature has a centre other than 0 only where all of its group's
values lie between half of it and twice of it; the difference of two such numbers has no more digits than they have
(Sterbenz). Products of 16-bit numbers are exact in float32, so distances carry the rounding of float32 sums alone, as
those of the reference do. float32 features are rounded once.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastedit.kernels._device import processors
from fastedit.kernels._tuning import work_of
from fastedit.reference.mmd2 import mmd2_offsets

CENTRE_ROWS = 256  # rows of a large group that a program of the centre reads at a time
SECTOR = 32  # bytes of such a row that it reads: what a GPU moves at least
SHIFTED = {"BLOCK_T": 16, "BLOCK_D": 256}  # rows and features that are shifted at a time
ROUNDS = 4  # programs a multiprocessor, before the other rows are not split further


@triton.jit
def _bounds(offsets, index, inside, rows):
    # a group's rows, within [0, rows] whatever the offsets say: nobody waits for a GPU to look at them
    start = tl.load(offsets + index, mask=inside, other=0)
    stop = tl.load(offsets + index + 1, mask=inside, other=0)
    start = tl.minimum(tl.maximum(start, 0), rows)
    return start, tl.minimum(tl.maximum(stop, start), rows)


@triton.jit
def _counts(x_offsets, y_offsets, groups, N, M, BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr):
    # index, and tiles of every group
    index = tl.arange(0, BLOCK_G)
    x_start, x_stop = _bounds(x_offsets, index, index < groups, N)
    y_start, y_stop = _bounds(y_offsets, index, index < groups, M)
    return index, (x_stop - x_start + y_stop - y_start + BLOCK_T - 1) // BLOCK_T


@triton.jit
def _tile(x_offsets, y_offsets, groups, N, M, pid, BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr):
    # Tiles are counted group by group; a program finds its group, its first row in it, the group's first rows of x and
    # y and how many it has.
    index, tiles = _counts(x_offsets, y_offsets, groups, N, M, BLOCK_G, BLOCK_T)
    until = tl.cumsum(tiles, axis=0)
    group = tl.sum((until <= pid).to(tl.int32), axis=0).to(tl.int64)
    first = (pid - tl.sum(tl.where(index == group, until - tiles, 0), axis=0)) * BLOCK_T
    x_start, x_stop = _bounds(x_offsets, group, group < groups, N)
    y_start, y_stop = _bounds(y_offsets, group, group < groups, M)
    return group, first, x_start, y_start, x_stop - x_start, y_stop - y_start


@triton.jit
def _column_sums(
    x, x_t, x_k, start, stop, column, inside, state, EXACT: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr
):
    total, least, most = state
    for first in range(start, stop, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        mask = (rows < stop)[:, None] & inside[None, :]
        value = tl.load(x + rows[:, None] * x_t + column[None, :] * x_k, mask=mask, other=0.0).to(ACC)
        total += value
        if EXACT:
            least = tl.minimum(least, tl.where(mask, value, float("inf")))
            most = tl.maximum(most, tl.where(mask, value, float("-inf")))
    return total, least, most


@triton.jit
def _centre_kernel(
    x, y, x_offsets, y_offsets, centre, N, M, d, x_t, x_k, y_t, y_k,
    EXACT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # centre (G, d): mean of a group's rows, where EXACT as one of their own numbers or 0, so that it costs no digit
    group = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < d
    x_start, x_stop = _bounds(x_offsets, group, group >= 0, N)
    y_start, y_stop = _bounds(y_offsets, group, group >= 0, M)
    zero = tl.zeros((BLOCK_N, BLOCK_C), dtype=ACC)
    state = (zero, zero + float("inf"), zero - float("inf"))
    state = _column_sums(x, x_t, x_k, x_start, x_stop, column, inside, state, EXACT, BLOCK_N, ACC)
    state = _column_sums(y, y_t, y_k, y_start, y_stop, column, inside, state, EXACT, BLOCK_N, ACC)
    total, least, most = state
    count = tl.maximum(x_stop - x_start + y_stop - y_start, 1)
    mean = tl.sum(total, axis=0) / count.to(ACC)
    if EXACT:
        mean = mean.to(x.dtype.element_ty).to(ACC)
        least = tl.min(least, axis=0)
        most = tl.max(most, axis=0)
        above = (mean > 0.0) & (0.5 * mean <= least) & (most <= 2.0 * mean)
        below = (mean < 0.0) & (2.0 * mean <= least) & (most <= 0.5 * mean)
        mean = tl.where(above | below, mean, 0.0)
    tl.store(centre + group * d + column, mean, mask=inside)


@triton.jit
def _shift_kernel(
    x, y, x_offsets, y_offsets, centre, z, norm, groups, N, M, d, width, x_t, x_k, y_t, y_k,
    BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # z (N + M, width) and the squared lengths of its rows, norm (N + M,)
    group, first, x_start, y_start, n, m = _tile(x_offsets, y_offsets, groups, N, M, tl.program_id(0), BLOCK_G, BLOCK_T)
    if group >= groups:
        return
    row = first + tl.arange(0, BLOCK_T)
    of_x = row < n
    of_y = (row >= n) & (row < n + m)
    left = x + (x_start + row)[:, None] * x_t
    right = y + (y_start + row - n)[:, None] * y_t
    at = x_start + y_start + row
    total = tl.zeros((BLOCK_T,), dtype=ACC)
    for k in range(0, width, BLOCK_D):
        column = k + tl.arange(0, BLOCK_D)
        inside = (column < d)[None, :]
        mean = tl.load(centre + group * d + column, mask=column < d, other=0.0)
        value = tl.load(left + column[None, :] * x_k, mask=of_x[:, None] & inside, other=0.0).to(ACC)
        other = tl.load(right + column[None, :] * y_k, mask=of_y[:, None] & inside, other=0.0).to(ACC)
        value = tl.where(of_x[:, None], value, other)
        # a mean that is not finite must not enter the padding
        value = tl.where(inside, value - mean[None, :], 0.0)
        total += tl.sum(value * value, axis=1)
        written = (row < n + m)[:, None] & (column < width)[None, :]
        tl.store(z + at[:, None] * width + column[None, :], value.to(z.dtype.element_ty), mask=written)
    tl.store(norm + at, total, mask=row < n + m)


def pair_tiles(x: Tensor, rows: int, groups: int) -> dict[str, Any]:
    """Return constants and warps of the tiles of pairs: as many rows as a group has on average, at most a tile's."""
    wide = {2: 64, 4: 32, 8: 16}[x.dtype.itemsize]
    # larger ones would leave the registers where weights are float32
    most = 128 if x.dtype == torch.bfloat16 else 64
    block = min(most, max(16, triton.next_power_of_2(triton.cdiv(rows, max(groups, 1)))))
    # Triton's interpreter multiplies no bfloat16
    interpreted = x.device.type == "cpu" and x.dtype == torch.bfloat16
    operands = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
    return {
        "BLOCK_G": triton.next_power_of_2(max(groups, 1)),
        "BLOCK_T": block if wide > 16 else 16,
        "BLOCK_D": wide,
        "HALVES": 2 if wide > 16 and block >= 64 else 1,
        "ACC": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "OPERAND": tl.float32 if interpreted else operands.get(x.dtype, tl.float64),
        "PRECISION": "tf32x3" if x.dtype == torch.float32 else "tf32",
        "num_warps": {16: 2, 32: 4, 64: 4, 128: 8}[block],
    }


class Prepared:
    """The rows of all groups, shifted, and what kernels that go over their pairs take.

    Args:
        x, y, x_offsets, y_offsets, bandwidths: as the op's, shapes already checked.
    """

    def __init__(self, x: Tensor, y: Tensor, x_offsets: Tensor, y_offsets: Tensor, bandwidths: Tensor) -> None:
        if x.device.type == "cpu":
            # offsets are looked at where that waits for nobody
            mmd2_offsets(x, y, x_offsets, y_offsets)
        self.offsets = (x_offsets.contiguous(), y_offsets.contiguous())
        self.groups, self.rows, self.d = x_offsets.shape[0] - 1, x.shape[0] + y.shape[0], x.shape[1]
        #: G, N, M
        self.sizes = (self.groups, x.shape[0], y.shape[0])
        self.dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.beta = (0.5 / bandwidths.to(self.dtype).square()).contiguous()
        self.settings = pair_tiles(x, self.rows, self.groups)
        block = self.settings["BLOCK_D"]
        # whole blocks of features: loads need no mask and begin at 16 bytes
        self.width = max(1, triton.cdiv(self.d, block)) * block
        full = triton.cdiv(self.rows, self.settings["BLOCK_T"])
        # every group leaves at most one tile unfilled; programs beyond the last tile return at once
        self.tiles = full + self.groups
        wanted = triton.cdiv(ROUNDS * processors(x.device), max(self.groups, full, 1))
        self.splits = max(1, min(wanted, full))
        #: which kind of shape kernels over pairs are tuned for
        self.work = work_of(self.groups, self.rows, self.width)
        self.z, self.norm = x.new_empty((self.rows, self.width)), x.new_empty(self.rows, dtype=self.dtype)
        if self.rows and self.groups:
            self._shift(x, y)

    def _shift(self, x: Tensor, y: Tensor) -> None:
        centre = x.new_empty((self.groups, self.d), dtype=self.dtype)
        shared = self.constants("BLOCK_G", "ACC")
        # of fewer rows it reads more columns
        rows = min(CENTRE_ROWS, max(16, triton.next_power_of_2(triton.cdiv(self.rows, self.groups))))
        columns = SECTOR // x.dtype.itemsize * (CENTRE_ROWS // rows)
        if self.d:
            _centre_kernel[(self.groups, triton.cdiv(self.d, columns))](
                x, y, *self.offsets, centre, x.shape[0], y.shape[0], self.d, *x.stride(), *y.stride(),
                EXACT=x.dtype.itemsize == 2, BLOCK_N=rows, BLOCK_C=columns, ACC=shared["ACC"],
            )  # fmt: skip
        _shift_kernel[(triton.cdiv(self.rows, SHIFTED["BLOCK_T"]) + self.groups,)](
            x, y, *self.offsets, centre, self.z, self.norm, *self.sizes, self.d, self.width, *x.stride(), *y.stride(),
            **shared, **SHIFTED,
        )  # fmt: skip

    def constants(self, *names: str) -> dict[str, Any]:
        """Return some of the settings."""
        return {name: self.settings[name] for name in names}

    @property
    def pairs(self) -> tuple[Any, ...]:
        """Tensors that a kernel over pairs reads."""
        return (self.z, self.norm, *self.offsets, self.beta)

    @property
    def numbers(self) -> tuple[Any, ...]:
        """Numbers that it takes, behind the tensors that it writes."""
        beta_g = 0 if self.beta.dim() == 1 else self.beta.shape[1]
        return (*self.sizes, self.width, self.splits, self.beta.shape[-1], beta_g, self.work)
