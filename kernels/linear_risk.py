"""linear_risk on NVIDIA: chunks of logits by a matrix product, their sums and gradients in Triton.

Sums of a token run over the chunks. With c and zc the drift and the largest logit of its first block, a = z - zc, and
u = c - (z - r) for reverse_kl, (z - r) - c for forward_kl, all of size 1, nothing cancels when the two are close:
KL = log1p(E[expm1 u]) - E[u], under p for reverse_kl and under q for forward_kl.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastedit.reference._checks import check_labels, check_segments
from fastedit.reference.arguments import check_linear_risk, check_risk_upstream

BLOCK_V = 1024  # logits a program works on at a time
COLUMNS = 8192  # logits of a token in a chunk at most
FEWEST = 128  # and at least
TOKENS = 4096  # tokens of a chunk at most
_KINDS = {"ce": 0, "forward_kl": 1, "reverse_kl": 2}

# Columns of the sums: M, sum e^(z - M), sum e^(z - M) a, zc | R, sum e^(r - R), c | under the divergence's own weights:
# u, expm1 u, a, a u (reverse_kl) or a expm1 u (forward_kl) | largest u | label's logit
SUMS = 13
FAR = 60.0


@triton.jit
def _expm1(x):
    # near 0 the series, x^13 / 13! left out; libdevice is not there for an interpreter
    low = 1.0 + x / 12.0
    for i in tl.static_range(10):
        low = 1.0 + x / (11.0 - i) * low
    return tl.where(tl.abs(x) < 0.5, x * low, tl.exp(x) - 1.0)


@triton.jit
def _sums_kernel(
    z, r, labels, segments, sums, first, columns, z_t, r_t,
    KIND: tl.constexpr, BLOCK_V: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # one program a token; first is the chunk's place in the vocabulary
    token = tl.program_id(0).to(tl.int64)
    if tl.load(segments + token) < 0:
        return
    own = sums + token * 13
    top_z = tl.load(own)
    sum_z = tl.load(own + 1)
    mean_z = tl.load(own + 2)
    zc = tl.load(own + 3)
    top_r = tl.load(own + 4)
    sum_r = tl.load(own + 5)
    c = tl.load(own + 6)
    on_u = tl.load(own + 7)
    on_w = tl.load(own + 8)
    on_a = tl.load(own + 9)
    on_mixed = tl.load(own + 10)
    top_u = tl.load(own + 11)
    for start in range(0, columns, BLOCK_V):
        place = start + tl.arange(0, BLOCK_V)
        inside = place < columns
        zs = tl.load(z + token * z_t + place, mask=inside, other=-1e15).to(ACC)
        # a NaN stays one
        zs = tl.where(zs < -1e15, -1e15, zs)
        block_top = tl.max(zs, axis=0)
        # until a block has a logit that is not -inf
        zc = tl.where(zc > -1e15, zc, block_top)
        new_top = tl.maximum(top_z, block_top)
        shrink_z = tl.exp(top_z - new_top)
        e_z = tl.where(inside, tl.exp(zs - new_top), 0.0)
        a = tl.where(inside, zs - zc, 0.0)
        sum_z = sum_z * shrink_z + tl.sum(e_z, axis=0)
        mean_z = mean_z * shrink_z + tl.sum(e_z * a, axis=0)
        top_z = new_top
        if KIND > 0:
            rs = tl.load(r + token * r_t + place, mask=inside, other=-1e15).to(ACC)
            rs = tl.where(rs < -1e15, -1e15, rs)
            block_top_r = tl.max(rs, axis=0)
            if first + start == 0:
                c = block_top - block_top_r
                c = tl.where(tl.abs(c) < 1e4, c, 0.0)
            new_top_r = tl.maximum(top_r, block_top_r)
            shrink_r = tl.exp(top_r - new_top_r)
            e_r = tl.where(inside, tl.exp(rs - new_top_r), 0.0)
            sum_r = sum_r * shrink_r + tl.sum(e_r, axis=0)
            top_r = new_top_r
            if KIND == 1:
                u = (zs - rs) - c
                e = e_r
                shrink = shrink_r
            else:
                u = (rs - zs) + c
                e = e_z
                shrink = shrink_z
            u = tl.where(inside, u, 0.0)
            w = _expm1(tl.minimum(u, 60.0))
            top_u = tl.maximum(top_u, tl.max(u, axis=0))
            on_u = on_u * shrink + tl.sum(e * u, axis=0)
            on_w = on_w * shrink + tl.sum(e * w, axis=0)
            on_a = on_a * shrink + tl.sum(e * a, axis=0)
            if KIND == 1:
                on_mixed = on_mixed * shrink + tl.sum(e * a * w, axis=0)
            else:
                on_mixed = on_mixed * shrink + tl.sum(e * a * u, axis=0)
    tl.store(own, top_z)
    tl.store(own + 1, sum_z)
    tl.store(own + 2, mean_z)
    tl.store(own + 3, zc)
    if KIND > 0:
        tl.store(own + 4, top_r)
        tl.store(own + 5, sum_r)
        tl.store(own + 6, c)
        tl.store(own + 7, on_u)
        tl.store(own + 8, on_w)
        tl.store(own + 9, on_a)
        tl.store(own + 10, on_mixed)
        tl.store(own + 11, top_u)
    else:
        label = tl.load(labels + token) - first
        if (label >= 0) & (label < columns):
            tl.store(own + 12, tl.load(z + token * z_t + label).to(ACC))


@triton.jit
def _gradient_kernel(
    z, r, labels, segments, stats, on_value, on_env, out, first, columns, z_t, r_t, out_t,
    KIND: tl.constexpr, BLOCK_V: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # out (tokens, columns): the gradient by a chunk of logits; on_value and on_env (T,) are per token
    token = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = place < columns
    there = out + token * out_t + place
    if tl.load(segments + token) < 0:
        tl.store(there, tl.zeros((BLOCK_V,), dtype=out.dtype.element_ty), mask=inside)
        return
    own = stats + token * 5
    lse = tl.load(own)
    mean = tl.load(own + 1)
    third = tl.load(own + 2)
    fourth = tl.load(own + 3)
    value = tl.load(on_value + token)
    env = tl.load(on_env + token)
    zs = tl.load(z + token * z_t + place, mask=inside, other=-1e15).to(ACC)
    zs = tl.where(zs < -1e15, -1e15, zs)
    p = tl.exp(zs - lse)
    a = zs - mean
    if KIND == 0:
        grad = p * (value + env * (1.0 + a))
        grad = tl.where(place == tl.load(labels + token) - first, grad - (value + env), grad)
    else:
        rs = tl.load(r + token * r_t + place, mask=inside, other=-1e15).to(ACC)
        rs = tl.where(rs < -1e15, -1e15, rs)
        if KIND == 1:
            grad = (value + env) * (p - tl.exp(rs - third)) + env * p * a
        else:
            b = (zs - rs) - third
            grad = p * (b * (value + env + env * a) + env * (a - fourth))
    tl.store(there, grad.to(out.dtype.element_ty), mask=inside)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b in float32 (float64)."""
    if a.is_cuda and a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    wide = torch.float64 if b.dtype == torch.float64 else torch.float32
    return a.to(wide) @ b.to(wide)


def _chunk(rows: Tensor, weight: Tensor | None, bias: Tensor | None, first: int, columns: int) -> Tensor:
    """Return logits (T', columns) of a head, or those that exist."""
    if weight is None:
        part = rows[:, first : first + columns]
        return part if part.stride(1) == 1 else part.contiguous()
    logits = _product(rows, weight[first : first + columns].t())
    return logits if bias is None else logits.add_(bias[first : first + columns])


def _tiles(tokens: int, vocabulary: int, planes: int, width: int, budget: int) -> tuple[int, int]:
    """Return tokens and columns of a chunk whose planes fit the budget."""
    numbers = budget // width
    rows = max(1, min(tokens, TOKENS, numbers // (FEWEST * planes)))
    return rows, max(FEWEST, min(vocabulary, COLUMNS, numbers // (rows * planes)))


def _segment_mean(per_token: Tensor, segments: Tensor, n_segments: int) -> Tensor:
    # ignored tokens go to a segment of their own
    where = torch.where(segments < 0, n_segments, segments)
    total = per_token.new_zeros(n_segments + 1).index_add_(0, where, per_token)
    return total[:n_segments] / _count(segments, n_segments, per_token.dtype)


def _count(segments: Tensor, n_segments: int, dtype: torch.dtype) -> Tensor:
    where = torch.where(segments < 0, n_segments, segments)
    ones = torch.ones(segments.shape[0], dtype=dtype, device=segments.device)
    count = ones.new_zeros(n_segments + 1).index_add_(0, where, ones)
    return count[:n_segments].clamp(min=1.0)


def _or_one(per_segment: Tensor) -> Tensor:
    # where there are no segments no token reads it
    return per_segment if per_segment.numel() else per_segment.new_zeros(1)


def _checked(segments: Tensor, target: Tensor, n_segments: int, kind: str, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Return segments, -1 where there is no such segment, and labels, both without gaps; a reference as it is."""
    if segments.device.type == "cpu":
        check_segments("linear_risk", segments, n_segments)
        if kind == "ce":
            check_labels("linear_risk", target, segments, vocabulary)
    segments = torch.where(segments < n_segments, segments, -1)
    return segments.contiguous(), target.contiguous() if kind == "ce" else target


def _finish(sums: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return value (T,), env_grad (T,) and stats (T, 5): lse, mean and, as the kind needs, two more."""
    top, sum_z, mean_a, zc, top_r, sum_r, c, u, w, a, mixed, top_u, label = sums.unbind(1)
    log_sum, mean_a = sum_z.log(), mean_a / sum_z
    lse, mean = top + log_sum, zc + mean_a
    stats = torch.zeros(sums.shape[0], 5, dtype=sums.dtype, device=sums.device)
    stats[:, 0], stats[:, 1] = lse, mean
    if kind == "ce":
        return (top - label) + log_sum, (zc - label) + mean_a, stats
    weight = sum_z if kind == "reverse_kl" else sum_r
    u, w, a, mixed = u / weight, w / weight, a / weight, mixed / weight
    lse_r = top_r + sum_r.log()
    close = torch.log1p(w) - u
    apart = (top_u > FAR) | (w < -0.9)
    if kind == "reverse_kl":
        env_grad = u * a - mixed
        far = c - u - lse + lse_r
        stats[:, 2], stats[:, 3] = c - u, env_grad
    else:
        env_grad = (mixed - w * a) / (1.0 + w)
        # E_q[z] = zc + E_q[a]
        env_grad = torch.where(apart, mean_a - a, env_grad)
        far = lse - lse_r - u - c
        stats[:, 2] = lse_r
    return torch.where(apart, far, close), env_grad, stats


def linear_risk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    target_weight: Tensor | None,
    target_bias: Tensor | None,
    segments: Tensor,
    n_segments: int,
    kind: str,
    budget: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return value (S,), env_grad (S,) and stats (T, 5); a GPU is not asked for labels and segments."""
    check_linear_risk(hidden, weight, bias, target, target_weight, target_bias, segments, n_segments, kind, budget)
    segments, target = _checked(segments, target, n_segments, kind, weight.shape[0])
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    sums = torch.zeros(tokens, SUMS, dtype=wide, device=hidden.device)
    sums[:, 0] = sums[:, 3] = sums[:, 4] = sums[:, 11] = -1e15
    # a label out of range gives NaN
    sums[:, 12] = torch.nan
    rows, columns = _tiles(tokens, vocabulary, 1 if kind == "ce" else 2, wide.itemsize, budget)
    settings = {"KIND": _KINDS[kind], "BLOCK_V": BLOCK_V, "ACC": tl.float64 if wide == torch.float64 else tl.float32}
    for t in range(0, tokens, rows):
        part = slice(t, t + rows)
        for first in range(0, vocabulary, columns):
            z = _chunk(hidden[part], weight, bias, first, columns)
            r = z if kind == "ce" else _chunk(target[part], target_weight, target_bias, first, columns)
            _sums_kernel[(z.shape[0],)](
                z, r, target[part] if kind == "ce" else segments[part], segments[part], sums[part], first, z.shape[1],
                z.stride(0), r.stride(0), **settings,
            )  # fmt: skip
    value, env_grad, stats = _finish(sums, kind)
    ignored = segments < 0
    value, env_grad = value.masked_fill(ignored, 0.0), env_grad.masked_fill(ignored, 0.0)
    return _segment_mean(value, segments, n_segments), _segment_mean(env_grad, segments, n_segments), stats


def linear_risk_backward(
    grad_value: Tensor,
    grad_env: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    target_weight: Tensor | None,
    target_bias: Tensor | None,
    segments: Tensor,
    stats: Tensor,
    kind: str,
    budget: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients by hidden, weight and bias; one that is not needed is empty."""
    n_segments = grad_value.shape[0] if grad_value.dim() else 0
    check_linear_risk(hidden, weight, bias, target, target_weight, target_bias, segments, n_segments, kind, budget)
    check_risk_upstream("linear_risk", grad_value, grad_env, stats, hidden)
    segments, target = _checked(segments, target, n_segments, kind, weight.shape[0])
    stats = stats.contiguous()
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    # gradients of logits are far below what float16 resolves
    operand = torch.bfloat16 if hidden.dtype == torch.bfloat16 else wide
    count = _count(segments, grad_value.shape[0], wide)
    used = segments.clamp(min=0)
    on_value, on_env = (_or_one(grad / count)[used].contiguous() for grad in (grad_value, grad_env))
    rows, columns = _tiles(tokens, vocabulary, 2 if kind == "ce" else 3, wide.itemsize, budget)
    on_hidden = hidden.new_zeros(hidden.shape if needs[0] else 0, dtype=wide)
    on_weight = weight.new_zeros(weight.shape if needs[1] else 0, dtype=wide)
    on_bias = weight.new_zeros(vocabulary if needs[2] else 0, dtype=wide)
    # an ignored token gives nothing, whatever its hidden state holds
    given = hidden.masked_fill((segments < 0)[:, None], 0.0) if needs[1] else hidden
    settings = {"KIND": _KINDS[kind], "BLOCK_V": BLOCK_V, "ACC": tl.float64 if wide == torch.float64 else tl.float32}
    for t in range(0, tokens if any(needs) else 0, rows):
        part = slice(t, t + rows)
        for first in range(0, vocabulary, columns):
            z = _chunk(hidden[part], weight, bias, first, columns)
            r = z if kind == "ce" else _chunk(target[part], target_weight, target_bias, first, columns)
            grad = z.new_empty(z.shape, dtype=operand)
            _gradient_kernel[(z.shape[0], triton.cdiv(z.shape[1], BLOCK_V))](
                z, r, target[part] if kind == "ce" else segments[part], segments[part], stats[part], on_value[part],
                on_env[part], grad, first, z.shape[1], z.stride(0), r.stride(0), grad.stride(0), **settings,
            )  # fmt: skip
            own = slice(first, first + z.shape[1])
            if needs[0]:
                on_hidden[part] += _product(grad, weight[own])
            if needs[1]:
                on_weight[own] += _product(grad.t(), given[part])
            if needs[2]:
                on_bias[own] += grad.sum(0, dtype=wide)
    return on_hidden.to(hidden.dtype), on_weight.to(weight.dtype), on_bias.to(weight.dtype)


def ahead_of_time(dtype: str) -> list[tuple[Any, dict[str, str], dict[str, Any]]]:
    """Return (kernel, signature, constants) for compiling every kernel without a GPU; dtype is Triton's name for it."""
    wide = "fp64" if dtype == "fp64" else "fp32"
    acc = tl.float64 if dtype == "fp64" else tl.float32
    pointers = dict.fromkeys(("z", "r", "sums", "stats", "on_value", "on_env"), f"*{wide}")
    pointers |= {"labels": "*i64", "segments": "*i64", "out": f"*{dtype}"}
    found = []
    for kernel, kind in ((_sums_kernel, 2), (_sums_kernel, 0), (_gradient_kernel, 1)):
        constants = {"KIND": kind, "BLOCK_V": BLOCK_V, "ACC": acc}
        signature = {name: pointers.get(name, "constexpr" if name in constants else "i32") for name in kernel.arg_names}
        found.append((kernel, signature, constants))
    return found
