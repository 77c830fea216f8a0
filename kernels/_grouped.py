"""The three products behind deltas that act through a thin middle, as kernels: tokens in, tokens out, and by weights.

A token of an edit becomes a code (T, r), and a code becomes a token: ``code = x w`` with w (d, r), ``y = code w'`` with
w' (r, o), and a weight's gradient is ``x' code``. Each is a product of its own, tiled in all directions, so neither
rank nor width is bounded. Tiles are transposed: an edit's tokens, which are few, stand where tensor cores take any
count, the weights' side, 64 and more, where they take none below 64.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastedit.kernels._products import bounds, operand_of, precision_of, product, tile, tiles_of
from fastedit.kernels._tuning import tuned, work_of
from fastedit.reference._checks import offsets_of

CHUNK = 1024  # columns whose products are summed before they are added to other sums
FEW = 264  # programs below which the chunks of a code are shared out, two for each multiprocessor


def _configs(name: str, *settings: tuple[int, int, int]) -> list[Any]:
    # (tokens or 0, columns or 0, warps)
    return [
        triton.Config({"BLOCK_T": tokens, **({name: columns} if columns else {})}, num_warps=warps, num_stages=3)
        for tokens, columns, warps in settings
    ]


@triton.jit
def _multiple(number, ALIGN: tl.constexpr):
    # the number, which ALIGN divides: so the compiler sees it
    return number // ALIGN * ALIGN


@triton.jit
def _transposed(w, row_stride, column_stride, rows, rows_inside, columns, inside, BY_ROW: tl.constexpr):
    # (rows, columns) of w, read along what lies side by side: copies to shared memory are then 16 bytes wide
    if BY_ROW:
        place = w + columns[:, None] * column_stride + rows[None, :] * row_stride
        return tl.trans(tl.load(place, mask=inside[:, None] & rows_inside[None, :], other=0.0))
    else:
        place = w + rows[:, None] * row_stride + columns[None, :] * column_stride
        return tl.load(place, mask=rows_inside[:, None] & inside[None, :], other=0.0)


def _code_shared(BLOCK_T: int, BLOCK_K: int, BLOCK_R: int, num_stages: int, **_: Any) -> int:
    # both operands in stages as float32, and the tokens once more in halves for three products
    return 4 * BLOCK_K * (num_stages * (BLOCK_T + BLOCK_R) + 2 * BLOCK_T)


@tuned(_configs("", (32, 0, 4), (16, 0, 4), (64, 0, 4)), _code_shared, triton.Config({"BLOCK_T": 16}, num_warps=4))
@triton.jit(do_not_specialize=["work"])
def _code_kernel(
    x, w, offsets, code, edits, T, K, r, c, chunks, x_t, x_k, w_b, w_k, w_r, work,
    BY_ROW: tl.constexpr, ALIGN: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, CHUNK: tl.constexpr, ACC: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # code (splits, T, r) in rows of c, this program's chunks of x (T, K) times w[edit] (K, r), one sum for every chunk
    edit, first, last = tile(offsets, edits, T, tl.program_id(0), BLOCK_B, BLOCK_T)
    if edit >= edits:
        return
    rows = first + tl.arange(0, BLOCK_T)
    live = rows < last
    rank = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    ranks_live = rank < _multiple(r, ALIGN)
    if BY_ROW:
        w_k = _multiple(w_k, ALIGN)
    begin = tl.program_id(2) * chunks * CHUNK
    total = tl.zeros((BLOCK_R, BLOCK_T), dtype=ACC)
    for start in range(begin, tl.minimum(begin + chunks * CHUNK, K), CHUNK):
        acc = tl.zeros((BLOCK_R, BLOCK_T), dtype=ACC)
        for k in range(start, tl.minimum(start + CHUNK, K), BLOCK_K):
            columns = k + tl.arange(0, BLOCK_K)
            inside = columns < K
            left = _transposed(w + edit * w_b, w_r, w_k, rank, ranks_live, columns, inside, BY_ROW)
            right = tl.load(
                x + columns[:, None] * x_k + rows[None, :] * x_t, mask=inside[:, None] & live[None, :], other=0.0
            )
            acc = product(left.to(OPERAND), right.to(OPERAND), acc, PRECISION)
        total += acc
    place = code + (tl.program_id(2) * T + rows[None, :]) * c + rank[:, None]
    tl.store(place, total, mask=ranks_live[:, None] & live[None, :])


@triton.jit
def sum_of(code, splits, T, c, rows, rank, inside):
    """Return the splits of a code, in rows of c, added in order as one program would have; rows and rank broadcast."""
    total = tl.load(code + rows * c + rank, mask=inside, other=0.0)
    for split in range(1, splits):
        total += tl.load(code + (split * T + rows) * c + rank, mask=inside, other=0.0)
    return total


@triton.jit
def _expanded(
    code, w, splits, T, r, c, rows, live, columns, inside, w_r, w_k, acc,
    BY_ROW: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # acc (columns, rows) with w (r, K) transposed times code (T, r) transposed added
    if not BY_ROW:
        w_k = _multiple(w_k, ALIGN)
    for start in range(0, r, BLOCK_R):
        rank = start + tl.arange(0, BLOCK_R)
        ranks_live = rank < _multiple(r, ALIGN)
        left = _transposed(w, w_k, w_r, columns, inside, rank, ranks_live, BY_ROW)
        right = sum_of(code, splits, T, c, rows[None, :], rank[:, None], live[None, :] & ranks_live[:, None])
        acc = product(left.to(ACC), right, acc, PRECISION)
    return acc


def _expand_shared(BLOCK_T: int, BLOCK_K: int, BLOCK_R: int, num_stages: int, **_: Any) -> int:
    return 4 * BLOCK_R * (num_stages * (BLOCK_T + BLOCK_K) + 2 * BLOCK_T)


@tuned(
    _configs("BLOCK_K", (32, 64, 4), (16, 128, 4), (64, 64, 4), (64, 128, 8)),
    _expand_shared, triton.Config({"BLOCK_T": 16, "BLOCK_K": 16}, num_warps=4),
)  # fmt: skip
@triton.jit(do_not_specialize=["work"])
def _expand_kernel(
    code, w, more_code, more_w, offsets, out, edits, T, r, c, K, splits, w_b, w_r, w_k, more_b, more_r, more_k, work,
    BY_ROW: tl.constexpr, ALIGN: tl.constexpr, MORE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # out (T, K) = code (T, r) times w[edit] (r, K), and where MORE the product of another pair added
    edit, first, last = tile(offsets, edits, T, tl.program_id(0), BLOCK_B, BLOCK_T)
    if edit >= edits:
        return
    rows = first + tl.arange(0, BLOCK_T)
    live = rows < last
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = columns < K
    acc = tl.zeros((BLOCK_K, BLOCK_T), dtype=ACC)
    acc = _expanded(
        code, w + edit * w_b, splits, T, r, c, rows, live, columns, inside, w_r, w_k, acc,
        BY_ROW, ALIGN, BLOCK_R, ACC, PRECISION,
    )  # fmt: skip
    if MORE:
        acc = _expanded(
            more_code, more_w + edit * more_b, splits, T, r, c, rows, live, columns, inside, more_r, more_k, acc,
            BY_ROW, ALIGN, BLOCK_R, ACC, PRECISION,
        )  # fmt: skip
    place = out + rows[None, :] * K + columns[:, None]
    tl.store(place, acc.to(out.dtype.element_ty), mask=inside[:, None] & live[None, :])


def _weight_shared(BLOCK_T: int, BLOCK_K: int, BLOCK_R: int, num_stages: int, **_: Any) -> int:
    return 4 * BLOCK_T * (num_stages * (BLOCK_K + BLOCK_R) + 2 * BLOCK_R)


@tuned(
    _configs("BLOCK_K", (32, 64, 4), (32, 128, 4)), _weight_shared,
    triton.Config({"BLOCK_T": 16, "BLOCK_K": 16}, num_warps=4),
)  # fmt: skip
@triton.jit(do_not_specialize=["work"])
def _weight_kernel(
    x, code, offsets, out, T, K, r, c, splits, x_t, x_k, out_b, out_k, out_r, work,
    BY_ROW: tl.constexpr, ALIGN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # out[edit] (K, r) = x (T, K) transposed times code (T, r), over the edit's own tokens in order
    edit = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = columns < K
    rank = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    ranks_live = rank < _multiple(r, ALIGN)
    if BY_ROW:
        out_k = _multiple(out_k, ALIGN)
    start, stop = bounds(offsets, edit, edit >= 0, T)
    acc = tl.zeros((BLOCK_K, BLOCK_R), dtype=ACC)
    for t in range(start, stop, BLOCK_T):
        rows = t + tl.arange(0, BLOCK_T)
        live = rows < stop
        left = tl.load(
            x + rows[None, :] * x_t + columns[:, None] * x_k, mask=live[None, :] & inside[:, None], other=0.0
        )
        right = sum_of(code, splits, T, c, rows[:, None], rank[None, :], live[:, None] & ranks_live[None, :])
        acc = product(left.to(ACC), right, acc, PRECISION)
    place = out + edit * out_b + columns[:, None] * out_k + rank[None, :] * out_r
    tl.store(place, acc.to(out.dtype.element_ty), mask=inside[:, None] & ranks_live[None, :])


def _constants(dtype: torch.dtype, rank: int) -> dict[str, Any]:
    double = dtype == torch.float64
    return {
        "BLOCK_R": 16 if double else min(max(triton.next_power_of_2(rank), 16), 64),
        "ACC": tl.float64 if double else tl.float32,
        "PRECISION": precision_of(dtype),
    }


def _align(*weights: Tensor) -> int:
    # the power of 2, at most 16, that divides the rank and the strides of weights (B, K, r): a row of 8 ranks is no
    # multiple of 16, which is all that Triton looks for, but may be read 16 bytes at a time
    numbers = [number for w in weights for number in w.stride() if number > 1]
    numbers += [w.shape[2] for w in weights]
    return min([16, *(number & -number for number in numbers)])


def new_code(x: Tensor, splits: int, rank: int) -> Tensor:
    """Return room for a code (splits, T, r) of x (T, d), in the dtype of sums, whose rows begin at multiples of 16."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((splits, x.shape[0], -(-rank // 16) * 16), dtype=wide)[..., :rank]


def code_of(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """Return x[t] @ w[b] for every token t of edit b, in parts that add up to it.

    Args:
        x: (T, d). w: (B, d, r), of any strides. offsets: (B + 1,), int64.
    Returns:
        (splits, T, r), float32 (float64 for float64): one part where tokens are many, else one a chunk of columns.
    """
    (tokens, width), (edits, _, rank) = x.shape, w.shape
    constants = _constants(x.dtype, rank)
    ranks, chunks = triton.cdiv(rank, constants["BLOCK_R"]), triton.cdiv(width, CHUNK)
    splits = chunks if tiles_of(tokens, edits, 32) * ranks < FEW else 1
    code = new_code(x, splits, rank)
    _code_kernel[lambda meta: (tiles_of(tokens, edits, meta["BLOCK_T"]), ranks, splits)](
        x, w, offsets, code, edits, tokens, width, rank, code.stride(1), 1 if splits > 1 else chunks,
        *x.stride(), *w.stride(),
        work_of(triton.cdiv(tokens, edits), tokens, rank, width), BY_ROW=w.stride(2) == 1, ALIGN=_align(w),
        BLOCK_B=triton.next_power_of_2(edits), BLOCK_K={torch.float64: 16, torch.float32: 32}.get(x.dtype, 64),
        CHUNK=CHUNK, OPERAND=operand_of(x.dtype, w.dtype), **constants,
    )  # fmt: skip
    return code


def expand(code: Tensor, w: Tensor, offsets: Tensor, out: Tensor, more: tuple[Tensor, Tensor] | None = None) -> None:
    """Fill out (T, o) with code @ w[b], and the product of ``more``, another such pair, where there is one.

    Args:
        code: (splits, T, r), as ``code_of`` gives it. w: (B, r, o), of any strides. offsets: (B + 1,), int64.
        out: (T, o), rows without gaps.
    """
    (splits, tokens, rank), (edits, _, width) = code.shape, w.shape
    more_code, more_w = more or (code, w)
    grid = lambda meta: (tiles_of(tokens, edits, meta["BLOCK_T"]), triton.cdiv(width, meta["BLOCK_K"]))  # noqa: E731
    _expand_kernel[grid](
        code, w, more_code, more_w, offsets, out, edits, tokens, rank, code.stride(1), width, splits,
        *w.stride(), *more_w.stride(),
        work_of(triton.cdiv(tokens, edits), tokens, rank, width), BY_ROW=w.stride(2) == 1,
        ALIGN=_align(w.transpose(1, 2), more_w.transpose(1, 2)), MORE=more is not None,
        BLOCK_B=triton.next_power_of_2(edits), **_constants(out.dtype, rank),
    )  # fmt: skip


def weight_gradient(x: Tensor, code: Tensor, offsets: Tensor, out: Tensor) -> None:
    """Fill out (B, d, r), of any strides, with the product of every edit's x transposed and its code.

    Args:
        x: (T, d). code: (splits, T, r), as ``code_of`` gives it. offsets: (B + 1,), int64.
    """
    (tokens, width), (splits, _, rank), edits = x.shape, code.shape, out.shape[0]
    constants = _constants(x.dtype, rank)
    ranks = triton.cdiv(rank, constants["BLOCK_R"])
    _weight_kernel[lambda meta: (edits, triton.cdiv(width, meta["BLOCK_K"]), ranks)](
        x, code, offsets, out, tokens, width, rank, code.stride(1), splits, *x.stride(), *out.stride(),
        work_of(triton.cdiv(tokens, edits), edits, rank, width), BY_ROW=out.stride(2) == 1, ALIGN=_align(out),
        **constants,
    )  # fmt: skip


def checked_offsets(op: str, offsets: Tensor, tokens: int) -> Tensor:
    """Return offsets without gaps, looked at where that waits for nobody."""
    if offsets.device.type == "cpu":
        offsets_of(op, offsets, tokens, what="the number of tokens", rows_name="T")
    return offsets.contiguous()
