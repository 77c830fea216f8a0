"""mmd2 in Triton: Gram tiles and weights of pairs on tensor cores, then the weighted sums of the others' features.

All pairs of a group are one symmetric matrix, of which the tiles on and above the diagonal are computed. Products of
float32 features are three of tf32 ("tf32x3"); those of 16-bit features are exact.

What weights cost: those of bfloat16 features are bfloat16, at most 2^-8 of each; a row's total is of the same rounded
numbers, so the gradient is that of weights 2^-8 off, no more than its own rounding on the way out. Held in registers
they would cost a Gram matrix for every block of columns, d / 128 times the work; they are held in memory, of WEIGHTS at
a time.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastedit.kernels._mmd2_rows import Prepared, _counts, _tile
from fastedit.kernels._tuning import tuned
from fastedit.reference.arguments import check_mmd2, check_mmd2_upstream

COLUMNS = (128, 64)  # columns of a program of the gradient
WEIGHTS = 2**26  # weights of pairs held at a time, at least a tile's
PARTS = 256  # parts of a group added up at a time


def _stages(*numbers: int, **constants: int) -> list[triton.Config]:
    # the launcher says how many warps hold a tile; blocks of features, which order the sums of three products, stay
    return [triton.Config(dict(constants), num_warps=None, num_stages=number) for number in numbers]


def _pairs_shared(BLOCK_T: int, BLOCK_D: int, OPERAND: Any, num_stages: int, **_: Any) -> int:
    # both sides of the tile in stages
    return num_stages * 2 * BLOCK_T * BLOCK_D * (OPERAND.primitive_bitwidth // 8)


def _gradient_shared(BLOCK_T: int, BLOCK_K: int, COLUMNS: int, OPERAND: Any, num_stages: int, **_: Any) -> int:
    size = OPERAND.primitive_bitwidth // 8
    # and the halves of float32 columns once more
    return BLOCK_K * size * (num_stages * (BLOCK_T + COLUMNS) + size // 4 * 2 * COLUMNS)


@triton.jit
def _product(a, b, acc, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    # (M, K) (K, N) added to acc. Tensor cores have no float64 on every target, so that goes by broadcasting.
    if acc.dtype.primitive_bitwidth == 64:
        return acc + tl.sum(a[:, :, None] * b[None, :, :], axis=1)
    else:
        return tl.dot(a.to(OPERAND), b.to(OPERAND), acc, input_precision=PRECISION)


@triton.jit
def _gram(
    z, row_at, other_at, width,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # (BLOCK_T, BLOCK_T) inner products of rows of z
    column = tl.arange(0, BLOCK_D)
    left = z + row_at[:, None] * width + column[None, :]
    right = z + other_at[None, :] * width + column[:, None]
    acc = tl.zeros((BLOCK_T, BLOCK_T), dtype=ACC)
    for _ in range(0, width, BLOCK_D):
        acc = _product(tl.load(left), tl.load(right), acc, OPERAND, PRECISION)
        left += BLOCK_D
        right += BLOCK_D
    return acc


@triton.jit
def _halves(tile, BLOCK_T: tl.constexpr):
    # the left and the right columns, which stay in the threads that have them: what follows needs half the registers
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_T, 2, BLOCK_T // 2)), (0, 2, 1)))


@triton.jit
def _distances(norm, gram, row_at, row, base, other, count):
    # squared distances; rows behind a group are its last, so nothing is masked
    other_at = base + tl.minimum(other, count - 1)
    D = tl.load(norm + row_at)[:, None] + tl.load(norm + other_at)[None, :] - 2.0 * gram
    # a NaN is not below 0: it stays
    return tl.where((D < 0.0) | (row[:, None] == other[None, :]), 0.0, D)


@triton.jit
def _within(count, UNBIASED: tl.constexpr, ACC: tl.constexpr):
    # weight of one ordered pair; an unbiased sample of one row has no pairs
    rows = count.to(ACC)
    if UNBIASED:
        return tl.where(count > 1, 1.0 / tl.maximum(rows * (rows - 1.0), 1.0), 0.0)
    else:
        return 1.0 / tl.maximum(rows * rows, 1.0)


@triton.jit
def _shares(row, other, n, m, UNBIASED: tl.constexpr, ACC: tl.constexpr):
    # (BLOCK_T, BLOCK_T): what ordered pairs weigh in the group's value
    same = tl.where(row < n, _within(n, UNBIASED, ACC), _within(m, UNBIASED, ACC))
    cross = -1.0 / tl.maximum(n.to(ACC) * m.to(ACC), 1.0)
    return tl.where((row < n)[:, None] == (other < n)[None, :], same[:, None], cross)


@triton.jit
def _add_pairs(
    state, norm, gram, row_at, row, base, other, n, m, beta, scales, twice, UNBIASED: tl.constexpr, ACC: tl.constexpr
):
    value, env = state
    count = n + m
    D = _distances(norm, gram, row_at, row, base, other, count)
    pair = (row < count)[:, None] & (other < count)[None, :]
    if UNBIASED:
        pair = pair & (row[:, None] != other[None, :])
    share = tl.where(pair, twice * _shares(row, other, n, m, UNBIASED, ACC), 0.0)
    for q in range(scales):
        coefficient = tl.load(beta + q)
        term = share * tl.exp(-coefficient * D)
        value += tl.sum(term, axis=1)
        env -= 2.0 * coefficient * tl.sum(D * term, axis=1)
    return value, env


@tuned(_stages(3, 2, 4), _pairs_shared, _stages(3)[0])
@triton.jit(do_not_specialize=["work"])
def _sums_kernel(
    z, norm, x_offsets, y_offsets, beta, values, envs, groups, N, M, width, splits, scales, beta_g, work,
    UNBIASED: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, HALVES: tl.constexpr,
    ACC: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # values, envs (tiles, splits): parts of a group's value and derivative, every splits-th tile from the diagonal on
    pid = tl.program_id(0)
    group, first, x_start, y_start, n, m = _tile(x_offsets, y_offsets, groups, N, M, pid, BLOCK_G, BLOCK_T)
    if group >= groups:
        return
    count = n + m
    base = x_start + y_start
    beta += group * beta_g
    row = first + tl.arange(0, BLOCK_T)
    row_at = base + tl.minimum(row, count - 1)
    zero = tl.zeros((BLOCK_T,), dtype=ACC)
    state = (zero, zero)
    for start in range(first + tl.program_id(1) * BLOCK_T, count, splits * BLOCK_T):
        other_at = base + tl.minimum(start + tl.arange(0, BLOCK_T), count - 1)
        gram = _gram(z, row_at, other_at, width, BLOCK_T, BLOCK_D, ACC, OPERAND, PRECISION)
        twice = tl.where(start > first, 2.0, 1.0)
        parts = _halves(gram, BLOCK_T) if HALVES == 2 else (gram,)
        for half in tl.static_range(HALVES):
            other = start + half * (BLOCK_T // HALVES) + tl.arange(0, BLOCK_T // HALVES)
            state = _add_pairs(
                state, norm, parts[half], row_at, row, base, other, n, m, beta, scales, twice, UNBIASED, ACC
            )
    value, env = state
    some = (n > 0) & (m > 0)
    at = pid * splits + tl.program_id(1)
    tl.store(values + at, tl.where(some, tl.sum(value, axis=0), 0.0))
    tl.store(envs + at, tl.where(some, tl.sum(env, axis=0), 0.0))


@triton.jit
def _group_kernel(
    values, envs, x_offsets, y_offsets, value, env, groups, N, M, splits, parts,
    BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # value (G,), env (G,): sums of the tiles' parts, in order
    group = tl.program_id(0)
    index, tiles = _counts(x_offsets, y_offsets, groups, N, M, BLOCK_G, BLOCK_T)
    start = tl.sum(tl.where(index < group, tiles, 0), axis=0) * splits
    stop = tl.minimum(start + tl.sum(tl.where(index == group, tiles, 0), axis=0) * splits, parts)
    total = tl.zeros((BLOCK_N,), dtype=ACC)
    slope = tl.zeros((BLOCK_N,), dtype=ACC)
    for first in range(start, stop, BLOCK_N):
        part = first + tl.arange(0, BLOCK_N)
        total += tl.load(values + part, mask=part < stop, other=0.0)
        slope += tl.load(envs + part, mask=part < stop, other=0.0)
    tl.store(value + group, tl.sum(total, axis=0))
    tl.store(env + group, tl.sum(slope, axis=0))


@triton.jit
def _held(row, held):
    # within the rows that are held whatever the offsets say
    return tl.minimum(tl.maximum(row, 0), held - 1)


@triton.jit
def _weights(
    norm, gram, row_at, row, base, other, n, m, beta, scales, bend, slope, UNBIASED: tl.constexpr, ACC: tl.constexpr
):
    # of pairs in a gradient
    count = n + m
    D = _distances(norm, gram, row_at, row, base, other, count)
    W = tl.zeros_like(D)
    for q in range(scales):
        coefficient = tl.load(beta + q)
        W += coefficient * tl.exp(-coefficient * D) * (bend * coefficient * D - slope)
    pair = (row < count)[:, None] & (other < count)[None, :] & (row[:, None] != other[None, :])
    return tl.where(pair, 4.0 * _shares(row, other, n, m, UNBIASED, ACC) * W, 0.0)


@tuned(_stages(3, 2, 4), _pairs_shared, _stages(3)[0])
@triton.jit(do_not_specialize=["work"])
def _weights_kernel(
    z, norm, x_offsets, y_offsets, beta, on_value, on_env, weights, totals, groups, N, M, width, splits, scales, beta_g,
    work, ahead, held, stride,
    UNBIASED: tl.constexpr, SYMMETRIC: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr, HALVES: tl.constexpr, ACC: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # weights (held, stride), a column for every place in the group, rows from those of tile `ahead` on; their sums by
    # parts of the columns, totals (parts, held). A whole symmetric matrix is computed by half.
    _, origin, x_start, y_start, _, _ = _tile(x_offsets, y_offsets, groups, N, M, ahead, BLOCK_G, BLOCK_T)
    origin += x_start + y_start
    pid = ahead + tl.program_id(0)
    group, first, x_start, y_start, n, m = _tile(x_offsets, y_offsets, groups, N, M, pid, BLOCK_G, BLOCK_T)
    if group >= groups:
        return
    count = n + m
    base = x_start + y_start
    beta += group * beta_g
    row = first + tl.arange(0, BLOCK_T)
    row_at = base + tl.minimum(row, count - 1)
    at = _held(base - origin + row, held)
    bend = 2.0 * tl.load(on_env + group)
    slope = tl.load(on_value + group) + bend
    PART: tl.constexpr = BLOCK_T // HALVES
    # of int64, as the first row is
    begin = first if SYMMETRIC else first - first
    for start in range(begin + tl.program_id(1) * BLOCK_T, count, splits * BLOCK_T):
        other_at = base + tl.minimum(start + tl.arange(0, BLOCK_T), count - 1)
        gram = _gram(z, row_at, other_at, width, BLOCK_T, BLOCK_D, ACC, OPERAND, PRECISION)
        parts = _halves(gram, BLOCK_T) if HALVES == 2 else (gram,)
        for half in tl.static_range(HALVES):
            other = start + half * PART + tl.arange(0, PART)
            W = _weights(
                norm, parts[half], row_at, row, base, other, n, m, beta, scales, bend, slope, UNBIASED, ACC
            ).to(weights.dtype.element_ty)
            tl.store(weights + at[:, None] * stride + other[None, :], W, mask=(row < count)[:, None])
            # of the rounded weights, as the gradient's product is
            place = totals + (start // PART + half) * held
            tl.store(place + at, tl.sum(W.to(ACC), axis=1), mask=row < count)
            if SYMMETRIC and start > first:
                mirrored = _held(base - origin + other, held)
                tl.store(weights + mirrored[None, :] * stride + row[:, None], W, mask=(other < count)[None, :])
                place = totals + first // PART * held
                tl.store(place + mirrored, tl.sum(W.to(ACC), axis=0), mask=other < count)
                if HALVES == 2:
                    tl.store(place + held + mirrored, tl.zeros((PART,), dtype=ACC), mask=other < count)


@tuned(
    [config for stages in (3, 4) for columns in COLUMNS for config in _stages(stages, COLUMNS=columns)],
    _gradient_shared, _stages(3, COLUMNS=16)[0],
)  # fmt: skip
@triton.jit(do_not_specialize=["work"])
def _gradient_kernel(
    z, weights, totals, x_offsets, y_offsets, grad_x, grad_y, groups, N, M, d, width, ahead, held, stride, work,
    BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, HALVES: tl.constexpr, COLUMNS: tl.constexpr,
    ACC: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # A block of a tile's rows and COLUMNS: sum_j W_ij (z_i - z_j) over all rows of the group.
    _, origin, x_start, y_start, _, _ = _tile(x_offsets, y_offsets, groups, N, M, ahead, BLOCK_G, BLOCK_T)
    origin += x_start + y_start
    pid = ahead + tl.program_id(0)
    group, first, x_start, y_start, n, m = _tile(x_offsets, y_offsets, groups, N, M, pid, BLOCK_G, BLOCK_T)
    if group >= groups:
        return
    count = n + m
    base = x_start + y_start
    row = first + tl.arange(0, BLOCK_T)
    # rows behind a group are its last
    at = _held(base - origin + tl.minimum(row, count - 1), held)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    total = tl.zeros((BLOCK_T,), dtype=ACC)
    for start in range(0, HALVES * tl.cdiv(count, BLOCK_T), 16):
        tile = start + tl.arange(0, 16)
        there = (tile < HALVES * tl.cdiv(count, BLOCK_T))[:, None]
        place = totals + tile.to(tl.int64)[:, None] * held + at[None, :]
        total += tl.sum(tl.load(place, mask=there, other=0.0), axis=0)
    acc = tl.zeros((BLOCK_T, COLUMNS), dtype=ACC)
    other = tl.arange(0, BLOCK_K)
    left = weights + at[:, None] * stride + other[None, :]
    for start in range(0, count, BLOCK_K):
        # weights of rows behind a group are 0
        other_at = base + tl.minimum(start + other, count - 1)
        right = tl.load(z + other_at[:, None] * width + column[None, :], mask=inside[None, :], other=0.0)
        W = tl.load(left)
        acc = _product(W, right, acc, OPERAND, PRECISION)
        left += BLOCK_K
    value = tl.load(
        z + (base + tl.minimum(row, count - 1))[:, None] * width + column[None, :], mask=inside[None, :], other=0.0
    )
    grad = tl.where((n > 0) & (m > 0), total[:, None] * value.to(ACC) - acc, 0.0).to(grad_x.dtype.element_ty)
    used = (column < d)[None, :]
    tl.store(grad_x + (x_start + row)[:, None] * d + column[None, :], grad, mask=(row < n)[:, None] & used)
    of_y = (row >= n) & (row < count)
    tl.store(grad_y + (y_start + row - n)[:, None] * d + column[None, :], grad, mask=of_y[:, None] & used)


def mmd2(
    x: Tensor, y: Tensor, x_offsets: Tensor, y_offsets: Tensor, bandwidths: Tensor, unbiased: bool
) -> tuple[Tensor, Tensor]:
    """Return value (G,) and env_grad (G,); arguments as the op's, on a GPU offsets are only kept within the rows."""
    check_mmd2(x, y, x_offsets, y_offsets, bandwidths)
    prepared = Prepared(x, y, x_offsets, y_offsets, bandwidths)
    value, env = (x.new_empty(prepared.groups, dtype=prepared.dtype) for _ in range(2))
    grid = (prepared.tiles, prepared.splits)
    values, envs = (x.new_empty(grid, dtype=prepared.dtype) for _ in range(2))
    if prepared.rows and prepared.groups:
        _sums_kernel[grid](*prepared.pairs, values, envs, *prepared.numbers, UNBIASED=unbiased, **prepared.settings)
    if prepared.groups:
        _group_kernel[(prepared.groups,)](
            values, envs, *prepared.offsets, value, env, *prepared.sizes, prepared.splits, values.numel(),
            BLOCK_N=PARTS, **prepared.constants("BLOCK_G", "BLOCK_T", "ACC"),
        )  # fmt: skip
    return value, env


def mmd2_backward(
    grad_value: Tensor, grad_env: Tensor, x: Tensor, y: Tensor, x_offsets: Tensor, y_offsets: Tensor,
    bandwidths: Tensor, unbiased: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradients by x and y of ``<grad_value, value> + <grad_env, env_grad>``."""
    check_mmd2(x, y, x_offsets, y_offsets, bandwidths)
    check_mmd2_upstream(grad_value, grad_env, x, x_offsets)
    prepared = Prepared(x, y, x_offsets, y_offsets, bandwidths)
    grads = x.new_empty(x.shape), y.new_empty(y.shape)
    settings, block, rows = prepared.settings, prepared.settings["BLOCK_T"], prepared.rows
    if not (rows and prepared.groups and prepared.d):
        return grads
    on = [t.to(prepared.dtype).contiguous() for t in (grad_value, grad_env)]
    # whole tiles
    stride = triton.cdiv(rows, block) * block
    whole = rows * stride <= WEIGHTS
    band = prepared.tiles if whole else max(1, WEIGHTS // (stride * block))
    halved = x.dtype == torch.bfloat16
    held = min(rows, band * block)
    weights = x.new_empty((held, stride), dtype=x.dtype if halved else prepared.dtype)
    totals = x.new_empty((settings["HALVES"] * stride // block, held), dtype=prepared.dtype)
    constants = prepared.constants("BLOCK_G", "BLOCK_T", "HALVES", "ACC", "PRECISION", "num_warps")
    constants["BLOCK_K"] = min(block, 64 if halved else 32)
    # float16 holds no weight of a pair among thousands
    constants["OPERAND"] = settings["OPERAND"] if halved or prepared.dtype == torch.float64 else tl.float32
    for ahead in range(0, prepared.tiles, band):
        tiles = min(band, prepared.tiles - ahead)
        _weights_kernel[(tiles, prepared.splits)](
            *prepared.pairs, *on, weights, totals, *prepared.numbers, ahead, held, stride,
            UNBIASED=unbiased, SYMMETRIC=whole, **settings,
        )  # fmt: skip
        _gradient_kernel[lambda meta, tiles=tiles: (tiles, triton.cdiv(prepared.width, meta["COLUMNS"]))](
            prepared.z, weights, totals, *prepared.offsets, *grads, *prepared.sizes, prepared.d, prepared.width, ahead,
            held, stride, prepared.work, **constants,
        )  # fmt: skip
    return grads
