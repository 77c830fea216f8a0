"""adam_step_ in Triton: the sums of squares of a gradient's parts and what its row's step needs, then the update.

A row whose norm is not finite gets no update, and no step is counted.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastedit.reference.arguments import check_adam_step, check_adam_step_memory

WARPS = 8
TILE = 2048  # numbers of a row at a time
PART = 8192  # numbers of a program at least
MOST = 1024  # programs of a row at most: every one adds up the sums of all

# Columns of the table (B, 9): lr / (1 - beta1^step), 1 - lr weight_decay, 1 / sqrt(1 - beta2^step), 1 - beta1, beta2,
# 1 - beta2, eps, clip, radius
COLUMNS = 9


@triton.jit
def _prepare_kernel(
    grads, step, lr, active, table, sums, norm, P, parts, size, grads_b, step_b, lr_b, active_b,
    beta1: tl.float64, beta2: tl.float64, log_beta1: tl.float64, log_beta2: tl.float64,
    eps: tl.float64, weight_decay: tl.float64, clip: tl.float64, radius: tl.float64,
    TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # a row's first program fills the table for the step to come; every one leaves its part's sum of squares
    row = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    live = tl.load(active + row * active_b).to(tl.int32)
    if live == 0:
        tl.store(norm + row, 0.0)
        return
    if part == 0:
        count = tl.load(step + row * step_b) + 1
        rate = tl.load(lr + row * lr_b)
        done = count.to(tl.float64)
        own = table + row * 9
        # an interpreter would store a number of its own as float32
        zero = tl.zeros((), dtype=tl.float64)
        tl.store(own, rate / (1.0 - tl.exp(done * log_beta1)))
        tl.store(own + 1, 1.0 - rate * weight_decay)
        tl.store(own + 2, 1.0 / tl.sqrt(1.0 - tl.exp(done * log_beta2)))
        tl.store(own + 3, zero + (1.0 - beta1))
        tl.store(own + 4, zero + beta2)
        tl.store(own + 5, zero + (1.0 - beta2))
        tl.store(own + 6, zero + eps)
        tl.store(own + 7, zero + clip)
        tl.store(own + 8, zero + radius)
    begin = part.to(tl.int64) * size
    end = tl.minimum(begin + size, P)
    place = tl.arange(0, TILE)
    total = tl.zeros((TILE,), dtype=ACC)
    for start in range(begin, end, TILE):
        g = tl.load(grads + row * grads_b + start + place, mask=place < end - start, other=0.0).to(ACC)
        total += g * g
    tl.store(sums + row * parts + part, tl.sum(total, axis=0))


@triton.jit
def _norm(sums, row, parts, PARTS: tl.constexpr):
    part = tl.arange(0, PARTS)
    return tl.sqrt(tl.sum(tl.load(sums + row * parts + part, mask=part < parts, other=0.0), axis=0))


# Triton's launcher has a variable `params` of its own: no argument may have that name.
@triton.jit
def _update_kernel(
    values, grads, first, second, step, active, table, sums, norm, P, parts, size,
    values_b, grads_b, first_b, second_b, step_b, active_b,
    PARTS: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    if tl.load(active + row * active_b).to(tl.int32) == 0:
        return
    length = _norm(sums, row, parts, PARTS)
    finite = length < float("inf")
    if part == 0:
        tl.store(norm + row, length)
        if finite:
            tl.store(step + row * step_b, tl.load(step + row * step_b) + 1)
    if not finite:
        return
    own = table + row * 9
    rate = tl.load(own)
    decay = tl.load(own + 1)
    inverse = tl.load(own + 2)
    beta1_rest = tl.load(own + 3)
    beta2 = tl.load(own + 4)
    beta2_rest = tl.load(own + 5)
    eps = tl.load(own + 6)
    radius = tl.load(own + 8)
    # the coefficient of torch.nn.utils.clip_grad_norm_; 1 where clip is infinite
    scale = tl.load(own + 7) / (length + 1e-6)
    scale = tl.where(scale > 1.0, 1.0, scale)
    begin = part.to(tl.int64) * size
    end = tl.minimum(begin + size, P)
    place = tl.arange(0, TILE)
    for start in range(begin, end, TILE):
        inside = place < end - start
        p_at = values + row * values_b + start + place
        m_at = first + row * first_b + start + place
        v_at = second + row * second_b + start + place
        g = tl.load(grads + row * grads_b + start + place, mask=inside, other=0.0).to(ACC)
        p = tl.load(p_at, mask=inside, other=0.0).to(ACC)
        m = tl.load(m_at, mask=inside, other=0.0)
        v = tl.load(v_at, mask=inside, other=0.0)
        g = g * scale
        m = m + (g - m) * beta1_rest
        v = v * beta2 + beta2_rest * g * g
        p = p * decay - rate * m / (tl.sqrt(v) * inverse + eps)
        p = tl.where(p > radius, radius, tl.where(p < -radius, -radius, p))
        tl.store(p_at, p.to(values.dtype.element_ty), mask=inside)
        tl.store(m_at, m, mask=inside)
        tl.store(v_at, v, mask=inside)


def _parts(P: int) -> tuple[int, int]:
    """Return the parts of a row and their size; they depend on P alone, so a row's norm is the same in any batch."""
    most = max(1, min(MOST, triton.cdiv(P, PART)))
    size = max(1, triton.cdiv(triton.cdiv(P, most), TILE)) * TILE
    return max(1, triton.cdiv(P, size)), size


def adam_step_(
    params: Tensor,
    grads: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: Tensor,
    active: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    clip: float | None,
    radius: float | None,
) -> Tensor:
    """Update params, moments (B, P) and step (B,) in place; return the gradient norms (B,); arguments as the op's."""
    check_adam_step(params, grads, exp_avg, exp_avg_sq, step, lr, active, beta1, beta2, eps, weight_decay, clip, radius)
    check_adam_step_memory(params, exp_avg, exp_avg_sq)
    rows, P = params.shape
    norm = exp_avg.new_empty(rows)
    if rows == 0:
        return norm
    parts, size = _parts(P)
    table = exp_avg.new_empty((rows, COLUMNS))
    sums = exp_avg.new_empty((rows, parts))
    shared = {"TILE": TILE, "ACC": tl.float64 if exp_avg.dtype == torch.float64 else tl.float32, "num_warps": WARPS}
    # exp(-1e4) is 0
    logs = [math.log(beta) if beta else -1e4 for beta in (beta1, beta2)]
    limits = [math.inf if limit is None else limit for limit in (clip, radius)]
    _prepare_kernel[(rows * parts,)](
        grads, step, lr, active, table, sums, norm, P, parts, size,
        grads.stride(0), step.stride(0), lr.stride(0), active.stride(0),
        beta1, beta2, *logs, eps, weight_decay, *limits, **shared,
    )  # fmt: skip
    _update_kernel[(rows * parts,)](
        params, grads, exp_avg, exp_avg_sq, step, active, table, sums, norm, P, parts, size,
        params.stride(0), grads.stride(0), exp_avg.stride(0), exp_avg_sq.stride(0), step.stride(0), active.stride(0),
        PARTS=triton.next_power_of_2(parts), **shared,
    )  # fmt: skip
    return norm
