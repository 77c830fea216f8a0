"""mmd2 in Triton: distances, kernel and weighted sums of one block of rows against its group, tile by tile."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastedit.kernels.low_rank import _bounds, _product, _tile, _tiles
from fastedit.reference.arguments import check_mmd2, check_mmd2_upstream
from fastedit.reference.mmd2 import mmd2_offsets

BLOCK_T = 16  # rows of one sample that a program works on, and rows they are compared with at a time
BLOCK_D = 32  # features read at a time


@triton.jit
def _within(count, UNBIASED: tl.constexpr, ACC: tl.constexpr):
    # weight of one ordered pair; an unbiased sample of one row has no pairs
    rows = count.to(ACC)
    if UNBIASED:
        return tl.where(count > 1, 1.0 / tl.maximum(rows * (rows - 1.0), 1.0), 0.0)
    else:
        return 1.0 / tl.maximum(rows * rows, 1.0)


@triton.jit
def _distances(
    a, a_t, a_k, rows, live, b, b_t, b_k, others, there, centre, d,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr, USE_DOT: tl.constexpr,
):  # fmt: skip
    # (BLOCK_T, BLOCK_T) squared distances; features less their group's mean, which costs no distance any digits
    acc = tl.zeros((BLOCK_T, BLOCK_T), dtype=ACC)
    a_square = tl.zeros((BLOCK_T,), dtype=ACC)
    b_square = tl.zeros((BLOCK_T,), dtype=ACC)
    for k in range(0, d, BLOCK_D):
        column = k + tl.arange(0, BLOCK_D)
        inside = column < d
        mean = tl.load(centre + column, mask=inside, other=0.0)
        left_in = live[:, None] & inside[None, :]
        right_in = there[None, :] & inside[:, None]
        left = tl.load(a + rows[:, None] * a_t + column[None, :] * a_k, mask=left_in, other=0.0).to(ACC)
        right = tl.load(b + others[None, :] * b_t + column[:, None] * b_k, mask=right_in, other=0.0).to(ACC)
        left = tl.where(left_in, left - mean[None, :], 0.0)
        right = tl.where(right_in, right - mean[:, None], 0.0)
        acc = _product(left, right, acc, USE_DOT)
        a_square += tl.sum(left * left, axis=1)
        b_square += tl.sum(right * right, axis=0)
    D = a_square[:, None] + b_square[None, :] - 2.0 * acc
    # a NaN is not below 0: it stays
    return tl.where(D < 0.0, 0.0, D)


@triton.jit
def _centre_kernel(
    x, y, x_offsets, y_offsets, centre, N, M, d, x_t, x_k, y_t, y_k,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # centre (G, d): mean of a group's rows of x and y
    group = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < d
    acc = tl.zeros((BLOCK_D,), dtype=ACC)
    x_start, x_stop = _bounds(x_offsets, group, group >= 0, N)
    for first in range(x_start, x_stop, BLOCK_T):
        rows = first + tl.arange(0, BLOCK_T)
        mask = (rows < x_stop)[:, None] & inside[None, :]
        value = tl.load(x + rows[:, None] * x_t + column[None, :] * x_k, mask=mask, other=0.0)
        acc += tl.sum(value.to(ACC), axis=0)
    y_start, y_stop = _bounds(y_offsets, group, group >= 0, M)
    for first in range(y_start, y_stop, BLOCK_T):
        rows = first + tl.arange(0, BLOCK_T)
        mask = (rows < y_stop)[:, None] & inside[None, :]
        value = tl.load(y + rows[:, None] * y_t + column[None, :] * y_k, mask=mask, other=0.0)
        acc += tl.sum(value.to(ACC), axis=0)
    count = tl.maximum(x_stop - x_start + y_stop - y_start, 1)
    tl.store(centre + group * d + column, acc / count.to(ACC), mask=inside)


@triton.jit
def _sums_kernel(
    a, b, a_offsets, b_offsets, centre, beta, values, envs, groups, N, M, d, scales, beta_g, a_t, a_k, b_t, b_k,
    CROSS: tl.constexpr, UNBIASED: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr, ACC: tl.constexpr, USE_DOT: tl.constexpr,
):  # fmt: skip
    # Per row of a: its part of the group's value and derivative, pairs within a and, where CROSS, with b.
    group, first, last = _tile(a_offsets, groups, N, tl.program_id(0), BLOCK_B, BLOCK_T)
    if group >= groups:
        return
    rows = first + tl.arange(0, BLOCK_T)
    live = rows < last
    a_start, a_stop = _bounds(a_offsets, group, group >= 0, N)
    count_a = a_stop - a_start
    b_start, b_stop = _bounds(b_offsets, group, group >= 0, M)
    value = tl.zeros((BLOCK_T,), dtype=ACC)
    env = tl.zeros((BLOCK_T,), dtype=ACC)
    for side in tl.static_range(2 if CROSS else 1):
        start = b_start if side else last - count_a
        stop = b_stop if side else last
        cross = -2.0 / tl.maximum(count_a.to(ACC) * (b_stop - b_start).to(ACC), 1.0)
        weight = cross if side else _within(count_a, UNBIASED, ACC)
        for at in range(start, stop, BLOCK_T):
            others = at + tl.arange(0, BLOCK_T)
            there = others < stop
            if side:
                D = _distances(
                    a, a_t, a_k, rows, live, b, b_t, b_k, others, there, centre + group * d, d,
                    BLOCK_T, BLOCK_D, ACC, USE_DOT,
                )  # fmt: skip
            else:
                D = _distances(
                    a, a_t, a_k, rows, live, a, a_t, a_k, others, there, centre + group * d, d,
                    BLOCK_T, BLOCK_D, ACC, USE_DOT,
                )  # fmt: skip
                D = tl.where(rows[:, None] == others[None, :], 0.0, D)
            kappa = tl.zeros((BLOCK_T, BLOCK_T), dtype=ACC)
            slope = tl.zeros((BLOCK_T, BLOCK_T), dtype=ACC)
            for q in range(scales):
                own = tl.load(beta + group * beta_g + q)
                term = tl.exp(-own * D)
                kappa += term
                slope += own * term
            pair = live[:, None] & there[None, :]
            if UNBIASED and not side:
                counted = pair & (rows[:, None] != others[None, :])
            else:
                counted = pair
            value += weight * tl.sum(tl.where(counted, kappa, 0.0), axis=1)
            env -= weight * tl.sum(tl.where(pair, 2.0 * D * slope, 0.0), axis=1)
    some = b_stop > b_start
    tl.store(values + rows, tl.where(some, value, 0.0), mask=live)
    tl.store(envs + rows, tl.where(some, env, 0.0), mask=live)


@triton.jit
def _group_kernel(
    x_values, x_envs, y_values, y_envs, x_offsets, y_offsets, value, env, N, M,
    BLOCK_T: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # sums of the rows' parts, in order
    group = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK_T,), dtype=ACC)
    slope = tl.zeros((BLOCK_T,), dtype=ACC)
    start, stop = _bounds(x_offsets, group, group >= 0, N)
    for first in range(start, stop, BLOCK_T):
        rows = first + tl.arange(0, BLOCK_T)
        total += tl.load(x_values + rows, mask=rows < stop, other=0.0)
        slope += tl.load(x_envs + rows, mask=rows < stop, other=0.0)
    start, stop = _bounds(y_offsets, group, group >= 0, M)
    for first in range(start, stop, BLOCK_T):
        rows = first + tl.arange(0, BLOCK_T)
        total += tl.load(y_values + rows, mask=rows < stop, other=0.0)
        slope += tl.load(y_envs + rows, mask=rows < stop, other=0.0)
    tl.store(value + group, tl.sum(total, axis=0))
    tl.store(env + group, tl.sum(slope, axis=0))


@triton.jit
def _gradient_kernel(
    a, b, a_offsets, b_offsets, centre, beta, on_value, on_env, space, grad, groups, N, M, d, scales, beta_g,
    a_t, a_k, b_t, b_k,
    UNBIASED: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    ACC: tl.constexpr, USE_DOT: tl.constexpr,
):  # fmt: skip
    # Gradient of rows of a: sum_j W(D_ij) (a_i - b_j) over both samples. Weighted sums of the others' features are
    # collected in space (N, d), which only this program touches for its rows.
    group, first, last = _tile(a_offsets, groups, N, tl.program_id(0), BLOCK_B, BLOCK_T)
    if group >= groups:
        return
    rows = first + tl.arange(0, BLOCK_T)
    live = rows < last
    mine = space + rows[:, None] * d
    a_start, a_stop = _bounds(a_offsets, group, group >= 0, N)
    count_a = a_stop - a_start
    b_start, b_stop = _bounds(b_offsets, group, group >= 0, M)
    some = b_stop > b_start
    slope = tl.load(on_value + group) + 2.0 * tl.load(on_env + group)
    bend = 2.0 * tl.load(on_env + group)
    total = tl.zeros((BLOCK_T,), dtype=ACC)
    own_centre = centre + group * d
    for side in tl.static_range(2):
        start = b_start if side else last - count_a
        stop = b_stop if side else tl.where(some, last, start)
        cross = -4.0 / tl.maximum(count_a.to(ACC) * (b_stop - b_start).to(ACC), 1.0)
        weight = cross if side else 4.0 * _within(count_a, UNBIASED, ACC)
        for at in range(start, stop, BLOCK_T):
            others = at + tl.arange(0, BLOCK_T)
            there = others < stop
            if side:
                D = _distances(
                    a, a_t, a_k, rows, live, b, b_t, b_k, others, there, own_centre, d, BLOCK_T, BLOCK_D, ACC, USE_DOT
                )
            else:
                D = _distances(
                    a, a_t, a_k, rows, live, a, a_t, a_k, others, there, own_centre, d, BLOCK_T, BLOCK_D, ACC, USE_DOT
                )
            s1 = tl.zeros((BLOCK_T, BLOCK_T), dtype=ACC)
            s2 = tl.zeros((BLOCK_T, BLOCK_T), dtype=ACC)
            for q in range(scales):
                own = tl.load(beta + group * beta_g + q)
                term = own * tl.exp(-own * D)
                s1 += term
                s2 += own * term
            W = weight * (bend * D * s2 - slope * s1)
            pair = live[:, None] & there[None, :]
            if side:
                counted = pair
            else:
                counted = pair & (rows[:, None] != others[None, :])
            W = tl.where(counted, W, 0.0)
            total += tl.sum(W, axis=1)
            for k in range(0, d, BLOCK_D):
                column = k + tl.arange(0, BLOCK_D)
                inside = column < d
                mask = there[:, None] & inside[None, :]
                mean = tl.load(own_centre + column, mask=inside, other=0.0)
                if side:
                    right = tl.load(b + others[:, None] * b_t + column[None, :] * b_k, mask=mask, other=0.0).to(ACC)
                else:
                    right = tl.load(a + others[:, None] * a_t + column[None, :] * a_k, mask=mask, other=0.0).to(ACC)
                right = tl.where(mask, right - mean[None, :], 0.0)
                place = mine + column[None, :]
                written = live[:, None] & inside[None, :]
                sums = tl.load(place, mask=written, other=0.0)
                tl.store(place, _product(W, right, sums, USE_DOT), mask=written)
    for k in range(0, d, BLOCK_D):
        column = k + tl.arange(0, BLOCK_D)
        inside = column < d
        written = live[:, None] & inside[None, :]
        mean = tl.load(own_centre + column, mask=inside, other=0.0)
        left = tl.load(a + rows[:, None] * a_t + column[None, :] * a_k, mask=written, other=0.0).to(ACC)
        sums = tl.load(mine + column[None, :], mask=written, other=0.0)
        value = total[:, None] * (left - mean[None, :]) - sums
        tl.store(
            grad + rows[:, None] * d + column[None, :],
            tl.where(some, value, 0.0).to(grad.dtype.element_ty),
            mask=written,
        )


def _constants(double: bool, groups: int, unbiased: bool) -> dict[str, Any]:
    return {
        "UNBIASED": unbiased,
        "BLOCK_B": triton.next_power_of_2(max(groups, 1)),
        "BLOCK_T": 16 if double else BLOCK_T,
        "BLOCK_D": 16 if double else BLOCK_D,
        "ACC": tl.float64 if double else tl.float32,
        "USE_DOT": not double,
    }


def _prepare(
    x: Tensor, y: Tensor, x_offsets: Tensor, y_offsets: Tensor, bandwidths: Tensor, unbiased: bool
) -> tuple[Tensor, Tensor, int, dict[str, Any]]:
    """Return centre (G, d), beta, the stride of beta by group and the kernels' constants."""
    groups, d = x_offsets.shape[0] - 1, x.shape[1]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    beta = (0.5 / bandwidths.to(wide).square()).contiguous()
    settings = _constants(wide == torch.float64, groups, unbiased)
    centre = x.new_empty((groups, d), dtype=wide)
    shared = {name: settings[name] for name in ("BLOCK_T", "BLOCK_D", "ACC")}
    if centre.numel():
        grid = (groups, triton.cdiv(d, settings["BLOCK_D"]))
        _centre_kernel[grid](
            x, y, x_offsets, y_offsets, centre, x.shape[0], y.shape[0], d, *x.stride(), *y.stride(), **shared
        )  # fmt: skip
    return centre, beta, 0 if beta.dim() == 1 else beta.shape[1], settings


def _checked(x: Tensor, y: Tensor, x_offsets: Tensor, y_offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Return offsets without gaps, looked at where that waits for nobody."""
    if x.device.type == "cpu":
        mmd2_offsets(x, y, x_offsets, y_offsets)
    return x_offsets.contiguous(), y_offsets.contiguous()


def mmd2(
    x: Tensor, y: Tensor, x_offsets: Tensor, y_offsets: Tensor, bandwidths: Tensor, unbiased: bool
) -> tuple[Tensor, Tensor]:
    """Return value (G,) and env_grad (G,); arguments as the op's, on a GPU offsets are only kept within the rows."""
    check_mmd2(x, y, x_offsets, y_offsets, bandwidths)
    x_offsets, y_offsets = _checked(x, y, x_offsets, y_offsets)
    centre, beta, beta_g, settings = _prepare(x, y, x_offsets, y_offsets, bandwidths, unbiased)
    groups, scales = centre.shape[0], beta.shape[-1]
    value, env = (x.new_empty(groups, dtype=centre.dtype) for _ in range(2))
    parts = []
    sides = ((x, y, x_offsets, y_offsets, True), (y, x, y_offsets, x_offsets, False))
    for a, b, a_offsets, b_offsets, cross in sides:
        values, envs = (x.new_empty(a.shape[0], dtype=centre.dtype) for _ in range(2))
        if a.shape[0]:
            _sums_kernel[(_tiles(a.shape[0], groups, settings["BLOCK_T"]),)](
                a, b, a_offsets, b_offsets, centre, beta, values, envs, groups, a.shape[0],
                b.shape[0], x.shape[1], scales, beta_g,
                *a.stride(), *b.stride(), CROSS=cross, **settings,
            )  # fmt: skip
        parts += [values, envs]
    if groups:
        _group_kernel[(groups,)](
            *parts, x_offsets, y_offsets, value, env, x.shape[0], y.shape[0],
            BLOCK_T=settings["BLOCK_T"], ACC=settings["ACC"],
        )  # fmt: skip
    return value, env


def mmd2_backward(
    grad_value: Tensor, grad_env: Tensor, x: Tensor, y: Tensor, x_offsets: Tensor, y_offsets: Tensor,
    bandwidths: Tensor, unbiased: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradients by x and y of ``<grad_value, value> + <grad_env, env_grad>``."""
    check_mmd2(x, y, x_offsets, y_offsets, bandwidths)
    check_mmd2_upstream(grad_value, grad_env, x, x_offsets)
    x_offsets, y_offsets = _checked(x, y, x_offsets, y_offsets)
    centre, beta, beta_g, settings = _prepare(x, y, x_offsets, y_offsets, bandwidths, unbiased)
    on = [t.to(centre.dtype).contiguous() for t in (grad_value, grad_env)]
    grads = []
    for a, b, a_offsets, b_offsets in ((x, y, x_offsets, y_offsets), (y, x, y_offsets, x_offsets)):
        grad = a.new_empty(a.shape)
        space = a.new_zeros(a.shape, dtype=centre.dtype).contiguous()
        if grad.numel():
            _gradient_kernel[(_tiles(a.shape[0], centre.shape[0], settings["BLOCK_T"]),)](
                a, b, a_offsets, b_offsets, centre, beta, *on, space, grad, centre.shape[0],
                a.shape[0], b.shape[0], x.shape[1], beta.shape[-1], beta_g, *a.stride(), *b.stride(), **settings,
            )  # fmt: skip
        grads.append(grad)
    return grads[0], grads[1]


def ahead_of_time(dtype: str) -> list[tuple[Any, dict[str, str], dict[str, Any]]]:
    """Return (kernel, signature, constants) for compiling every kernel without a GPU; dtype is Triton's name for it."""
    wide = "fp64" if dtype == "fp64" else "fp32"
    full = _constants(dtype == "fp64", 32, True)
    features = ("x", "y", "a", "b", "grad")
    pointers = {**dict.fromkeys(features, f"*{dtype}")}
    pointers |= dict.fromkeys(("x_offsets", "y_offsets", "a_offsets", "b_offsets"), "*i64")
    sums = ("centre", "beta", "values", "envs", "value", "env", "on_value", "on_env", "space")
    of_a_side = ("x_values", "x_envs", "y_values", "y_envs")
    pointers |= dict.fromkeys((*sums, *of_a_side), f"*{wide}")
    found = []
    for kernel in (_centre_kernel, _sums_kernel, _group_kernel, _gradient_kernel):
        constants = {name: value for name, value in {**full, "CROSS": True}.items() if name in kernel.arg_names}
        signature = {name: pointers.get(name, "constexpr" if name in constants else "i32") for name in kernel.arg_names}
        found.append((kernel, signature, constants))
    return found
