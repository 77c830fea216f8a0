"""low_rank in Triton: one program per block of one edit's tokens, weight gradients per block of one edit's columns."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastedit.reference._checks import check_tensor, offsets_of
from fastedit.reference.arguments import check_low_rank

BLOCK_T = 32  # tokens of one edit that a program works on
BLOCK_K = 64  # columns read or written at a time


@triton.jit
def _product(a, b, acc, USE_DOT: tl.constexpr):
    # (M, K) (K, N) added to acc. Tensor cores have no float64 on every target, so that goes by broadcasting.
    if USE_DOT:
        return tl.dot(a, b, acc, input_precision="ieee")
    else:
        return acc + tl.sum(a[:, :, None] * b[None, :, :], axis=1)


@triton.jit
def _bounds(offsets, index, inside, T):
    # an edit's rows, within [0, T] whatever the offsets say: nobody waits for a GPU to look at them
    start = tl.load(offsets + index, mask=inside, other=0)
    stop = tl.load(offsets + index + 1, mask=inside, other=0)
    start = tl.minimum(tl.maximum(start, 0), T)
    return start, tl.minimum(tl.maximum(stop, start), T)


@triton.jit
def _tile(offsets, edits, T, pid, BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr):
    # Tiles are counted edit by edit; every program finds its own among the cumulated counts: no host, no extra launch.
    index = tl.arange(0, BLOCK_B)
    start, stop = _bounds(offsets, index, index < edits, T)
    tiles = (stop - start + BLOCK_T - 1) // BLOCK_T
    until = tl.cumsum(tiles, axis=0)
    edit = tl.sum((until <= pid).to(tl.int32), axis=0)
    own = index == edit
    before = tl.sum(tl.where(own, until - tiles, 0), axis=0)
    first = tl.sum(tl.where(own, start, 0), axis=0) + (pid - before) * BLOCK_T
    last = tl.sum(tl.where(own, stop, 0), axis=0)
    return edit.to(tl.int64), first, last


@triton.jit
def _code(
    x, x_t, x_k, w, w_k, w_r, rows, live, K, rank, ranks_live,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, ACC: tl.constexpr, OPERAND: tl.constexpr,
    USE_DOT: tl.constexpr,
):  # fmt: skip
    # (BLOCK_T, BLOCK_R): rows of x (T, K) times w (K, r)
    acc = tl.zeros((BLOCK_T, BLOCK_R), dtype=ACC)
    for k in range(0, K, BLOCK_K):
        columns = k + tl.arange(0, BLOCK_K)
        inside = columns < K
        left = tl.load(
            x + rows[:, None] * x_t + columns[None, :] * x_k, mask=live[:, None] & inside[None, :], other=0.0
        )
        right = tl.load(
            w + columns[:, None] * w_k + rank[None, :] * w_r, mask=inside[:, None] & ranks_live[None, :], other=0.0
        )
        acc = _product(left.to(OPERAND), right.to(OPERAND), acc, USE_DOT)
    return acc


@triton.jit
def _expand(
    code, w, w_r, w_k, out, out_t, rows, live, K, rank, ranks_live,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr, USE_DOT: tl.constexpr,
):  # fmt: skip
    # out (T, K) rows = code (BLOCK_T, BLOCK_R) times w (r, K); the code keeps its accumulation precision
    for k in range(0, K, BLOCK_K):
        columns = k + tl.arange(0, BLOCK_K)
        inside = columns < K
        right = tl.load(
            w + rank[:, None] * w_r + columns[None, :] * w_k, mask=ranks_live[:, None] & inside[None, :], other=0.0
        )
        y = _product(code, right.to(ACC), tl.zeros((BLOCK_T, BLOCK_K), dtype=ACC), USE_DOT)
        tl.store(
            out + rows[:, None] * out_t + columns[None, :],
            y.to(out.dtype.element_ty),
            mask=live[:, None] & inside[None, :],
        )


@triton.jit
def _forward_kernel(
    x, down, up, offsets, y, edits, T, d, r, o, x_t, x_k, down_b, down_k, down_r, up_b, up_r, up_k,
    BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    ACC: tl.constexpr, OPERAND: tl.constexpr, USE_DOT: tl.constexpr,
):  # fmt: skip
    edit, first, last = _tile(offsets, edits, T, tl.program_id(0), BLOCK_B, BLOCK_T)
    if edit >= edits:
        return
    rows = first + tl.arange(0, BLOCK_T)
    live = rows < last
    rank = tl.arange(0, BLOCK_R)
    ranks_live = rank < r
    code = _code(
        x, x_t, x_k, down + edit * down_b, down_k, down_r, rows, live, d, rank, ranks_live,
        BLOCK_T, BLOCK_K, BLOCK_R, ACC, OPERAND, USE_DOT,
    )  # fmt: skip
    _expand(code, up + edit * up_b, up_r, up_k, y, o, rows, live, o, rank, ranks_live, BLOCK_T, BLOCK_K, ACC, USE_DOT)


@triton.jit
def _token_gradient_kernel(
    grad, x, down, up, offsets, grad_x, code, code_grad, edits, T, d, r, o,
    grad_t, grad_k, x_t, x_k, down_b, down_k, down_r, up_b, up_r, up_k,
    NEED_X: tl.constexpr, NEED_DOWN: tl.constexpr, NEED_UP: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    ACC: tl.constexpr, OPERAND: tl.constexpr, USE_DOT: tl.constexpr,
):  # fmt: skip
    # code (T, r) = x down and code_grad (T, r) = grad up' for the weight gradients, grad_x = code_grad down'
    edit, first, last = _tile(offsets, edits, T, tl.program_id(0), BLOCK_B, BLOCK_T)
    if edit >= edits:
        return
    rows = first + tl.arange(0, BLOCK_T)
    live = rows < last
    rank = tl.arange(0, BLOCK_R)
    ranks_live = rank < r
    own_down = down + edit * down_b
    place = rows[:, None] * r + rank[None, :]
    written = live[:, None] & ranks_live[None, :]
    if NEED_UP:
        value = _code(
            x, x_t, x_k, own_down, down_k, down_r, rows, live, d, rank, ranks_live,
            BLOCK_T, BLOCK_K, BLOCK_R, ACC, OPERAND, USE_DOT,
        )  # fmt: skip
        tl.store(code + place, value, mask=written)
    if NEED_X or NEED_DOWN:
        value = _code(
            grad, grad_t, grad_k, up + edit * up_b, up_k, up_r, rows, live, o, rank, ranks_live,
            BLOCK_T, BLOCK_K, BLOCK_R, ACC, OPERAND, USE_DOT,
        )  # fmt: skip
        if NEED_DOWN:
            tl.store(code_grad + place, value, mask=written)
        if NEED_X:
            _expand(
                value,
                own_down,
                down_r,
                down_k,
                grad_x,
                d,
                rows,
                live,
                d,
                rank,
                ranks_live,
                BLOCK_T,
                BLOCK_K,
                ACC,
                USE_DOT,
            )


@triton.jit
def _weight_gradient_kernel(
    a, code, offsets, out, T, K, r, a_t, a_k, out_b, out_k, out_r,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, ACC: tl.constexpr, USE_DOT: tl.constexpr,
):  # fmt: skip
    # out[edit] (K, r) = a (T, K) transposed times code (T, r), over the edit's own tokens in order
    edit = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = columns < K
    rank = tl.arange(0, BLOCK_R)
    ranks_live = rank < r
    start, stop = _bounds(offsets, edit, edit >= 0, T)
    acc = tl.zeros((BLOCK_K, BLOCK_R), dtype=ACC)
    for t in range(start, stop, BLOCK_T):
        rows = t + tl.arange(0, BLOCK_T)
        live = rows < stop
        left = tl.load(
            a + rows[None, :] * a_t + columns[:, None] * a_k, mask=live[None, :] & inside[:, None], other=0.0
        )
        right = tl.load(code + rows[:, None] * r + rank[None, :], mask=live[:, None] & ranks_live[None, :], other=0.0)
        acc = _product(left.to(ACC), right, acc, USE_DOT)
    place = out + edit * out_b + columns[:, None] * out_k + rank[None, :] * out_r
    tl.store(place, acc.to(out.dtype.element_ty), mask=inside[:, None] & ranks_live[None, :])


def _settings(x: Tensor, weight: Tensor, edits: int, rank: int) -> dict[str, Any]:
    double = x.dtype == torch.float64
    acc = tl.float64 if double else tl.float32
    # operands of the first product: as stored where both agree, else widened; the interpreter multiplies no bfloat16
    stored = {} if triton.knobs.runtime.interpret else {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    return {
        "BLOCK_B": triton.next_power_of_2(max(edits, 1)),
        "BLOCK_T": 16 if double else BLOCK_T,
        "BLOCK_K": 16 if double else BLOCK_K,
        "BLOCK_R": max(triton.next_power_of_2(rank), 16),
        "ACC": acc,
        "OPERAND": stored.get(x.dtype, acc) if x.dtype == weight.dtype else acc,
        "USE_DOT": not double,
    }


def _tiles(tokens: int, edits: int, block: int) -> int:
    # every edit leaves at most one block unfilled; programs beyond the last tile return at once
    return triton.cdiv(tokens, block) + edits


def _checked(op: str, offsets: Tensor, tokens: int) -> Tensor:
    """Return offsets without gaps, looked at where that waits for nobody."""
    if offsets.device.type == "cpu":
        offsets_of(op, offsets, tokens, what="the number of tokens", rows_name="T")
    return offsets.contiguous()


def low_rank(x: Tensor, down: Tensor, up: Tensor, offsets: Tensor) -> Tensor:
    """Return y (T, o); arguments as the op's; on a GPU offsets are only kept within the tokens."""
    check_low_rank(x, down, up, offsets)
    offsets = _checked("low_rank", offsets, x.shape[0])
    edits, d, r = down.shape
    y = x.new_empty((x.shape[0], up.shape[2]))
    if y.numel() == 0:
        return y
    settings = _settings(x, down, edits, r)
    _forward_kernel[(_tiles(x.shape[0], edits, settings["BLOCK_T"]),)](
        x, down, up, offsets, y, edits, x.shape[0], d, r, up.shape[2],
        *x.stride(), *down.stride(), *up.stride(), **settings,
    )  # fmt: skip
    return y


def low_rank_backward(
    grad: Tensor, x: Tensor, down: Tensor, up: Tensor, offsets: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients by x, down and up; one that is not needed is empty."""
    check_low_rank(x, down, up, offsets)
    check_tensor("low_rank", "grad", grad, x.dtype, (x.shape[0], up.shape[2]), x.device)
    offsets = _checked("low_rank", offsets, x.shape[0])
    tokens, (edits, d, r), o = x.shape[0], down.shape, up.shape[2]
    need_x, need_down, need_up = needs
    settings = _settings(x, down, edits, r)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    grad_x = x.new_empty(x.shape if need_x else 0)
    grad_down = down.new_empty(down.shape if need_down else 0)
    grad_up = up.new_empty(up.shape if need_up else 0)
    code = x.new_empty((tokens if need_up else 0, r), dtype=wide)
    code_grad = x.new_empty((tokens if need_down else 0, r), dtype=wide)
    if tokens and any(needs):
        _token_gradient_kernel[(_tiles(tokens, edits, settings["BLOCK_T"]),)](
            grad, x, down, up, offsets, grad_x, code, code_grad, edits, tokens, d, r, o,
            *grad.stride(), *x.stride(), *down.stride(), *up.stride(), need_x, need_down, need_up, **settings,
        )  # fmt: skip
    per_weight = {name: settings[name] for name in ("BLOCK_T", "BLOCK_K", "BLOCK_R", "ACC", "USE_DOT")}
    if grad_down.numel():
        grid = (edits, triton.cdiv(d, settings["BLOCK_K"]))
        _weight_gradient_kernel[grid](
            x, code_grad, offsets, grad_down, tokens, d, r, *x.stride(), *grad_down.stride(), **per_weight
        )
    if grad_up.numel():
        # grad_up is (B, r, o): rank and columns change places
        by_edit, by_rank, by_column = grad_up.stride()
        grid = (edits, triton.cdiv(o, settings["BLOCK_K"]))
        _weight_gradient_kernel[grid](
            grad, code, offsets, grad_up, tokens, o, r, *grad.stride(), by_edit, by_column, by_rank, **per_weight
        )
    return grad_x, grad_down, grad_up


def ahead_of_time(dtype: str) -> list[tuple[Any, dict[str, str], dict[str, Any]]]:
    """Return (kernel, signature, constants) for compiling every kernel without a GPU; dtype is Triton's name for it."""
    acc = tl.float64 if dtype == "fp64" else tl.float32
    wide = "fp64" if dtype == "fp64" else "fp32"
    operand = {"bf16": tl.bfloat16, "fp16": tl.float16}.get(dtype, acc)
    block = 16 if dtype == "fp64" else 0
    base = {"BLOCK_T": block or BLOCK_T, "BLOCK_K": block or BLOCK_K, "BLOCK_R": 16, "ACC": acc, "USE_DOT": not block}
    full = {**base, "BLOCK_B": 32, "OPERAND": operand}
    pointers = dict.fromkeys(("x", "down", "up", "y", "grad", "grad_x", "a", "out"), f"*{dtype}")
    pointers |= {"offsets": "*i64", "code": f"*{wide}", "code_grad": f"*{wide}"}
    needs = {"NEED_X": True, "NEED_DOWN": True, "NEED_UP": True}
    found = []
    for kernel, constants in (
        (_forward_kernel, full),
        (_token_gradient_kernel, {**full, **needs}),
        (_weight_gradient_kernel, base),
    ):
        signature = {name: pointers.get(name, "constexpr" if name in constants else "i32") for name in kernel.arg_names}
        found.append((kernel, signature, constants))
    return found
