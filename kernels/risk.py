"""risk in Triton: sums of parts of a token's logits, a token's risk from them, means of segments; and the gradient.

With M the largest logit, a = z - M, e = exp(a), u = c - (z - r) for a constant c close to the drift and w = expm1(u),
q is p (1 + w) / (1 + E_p[w]): sums of e alone give both divergences, and nothing cancels when the two are close:
KL(p || q) = log1p(E_p[w]) - E_p[u] and KL(q || p) = E_q[u] - log1p(E_p[w]).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastedit.kernels._device import processors
from fastedit.reference._checks import check_labels, check_segments
from fastedit.reference.arguments import check_risk, check_risk_upstream

WARPS = 8
LANES = 32 * WARPS  # columns of a tile: a thread's own logits are one, it has a maximum and sums of its own
ROWS = 16  # logits of a lane in a tile; of float64 a quarter, they fill the registers
PROBE = 1024  # first logits, which say how far z is from r
PROGRAMS = 16  # programs a multiprocessor at least, before a vocabulary is not cut further
BLOCK_V = 4096  # logits of a program of the gradient
BLOCK_T = 256  # tokens that the program of a segment looks at at a time
COUNTED = 1024  # tokens of a program that counts those of segments
_KINDS = {"ce": 0, "forward_kl": 1, "reverse_kl": 2}

# Columns of the sums of a part: M | sum e, e a | e u (reverse_kl) or e (1 + w) u (forward_kl), e w,
# e u a (reverse_kl) or e w a (forward_kl) | largest u | c
SUMS = 8


@triton.jit
def _load(at, inside, ACC: tl.constexpr, FLOOR: tl.constexpr):
    # -inf becomes a logit of probability zero whose products with itself are finite; a NaN stays one
    x = tl.load(at) if inside is None else tl.load(at, mask=inside, other=float("-inf"))
    return tl.maximum(x.to(ACC), FLOOR, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _exp(x):
    # a power of 2 is one instruction in float32
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def _expm1(x):
    # near 0 a polynomial, in float32 that of the least relative error; libdevice is not there for an interpreter
    if x.dtype.primitive_bitwidth == 64:
        series = 1.0 + x / 15.0
        for i in tl.static_range(13):
            series = 1.0 + x / (14.0 - i) * series
    else:
        series = 0.00833370536 + x * (0.00139812252 + x * 0.000198059424)
        series = 1.0 + x * (0.5 + x * (0.166666627 + x * (0.0416658707 + x * series)))
    return tl.where(tl.abs(x) < 0.5, x * series, _exp(x) - 1.0)


@triton.jit
def _log1p(x):
    # float64; the rounding of 1 + x is divided out
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / (y - 1.0)))


@triton.jit
def _lane_sum(x):
    return tl.sum(tl.sum(x, axis=2), axis=0)


@triton.jit
def _add(
    z, r, place, end, z_v, r_v, c, state,
    KIND: tl.constexpr, PARTIAL: tl.constexpr, ACC: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    # a tile (·, LANES, ·) of logits onto the sums (LANES,), which are about the lane's own maximum
    top, total, on_a, on_u, on_w, on_mixed, top_u = state
    inside = place < end if PARTIAL else None
    at = place.to(tl.int64)
    zs = _load(z + at * z_v, inside, ACC, FLOOR)
    new_top = tl.maximum(top, tl.max(tl.max(zs, axis=2), axis=0))
    a = zs - new_top[None, :, None]
    e = _exp(a)
    if PARTIAL:
        e = tl.where(inside, e, 0.0)
    shift = top - new_top
    shrink = _exp(shift)
    if KIND > 0:
        u = (_load(r + at * r_v, inside, ACC, FLOOR) - zs) + c
        if PARTIAL:
            u = tl.where(inside, u, 0.0)
        top_u = tl.maximum(top_u, tl.max(tl.max(u, axis=2), axis=0))
        # what overflows here is not read: the largest u is too large
        w = e * _expm1(u)
        if KIND == 1:
            on_mixed = (on_mixed + shift * on_w) * shrink + _lane_sum(w * a)
            on_u = on_u * shrink + _lane_sum((e + w) * u)
        else:
            on_mixed = (on_mixed + shift * on_u) * shrink + _lane_sum(e * u * a)
            on_u = on_u * shrink + _lane_sum(e * u)
        on_w = on_w * shrink + _lane_sum(w)
    on_a = (on_a + shift * total) * shrink + _lane_sum(e * a)
    total = total * shrink + _lane_sum(e)
    return new_top, total, on_a, on_u, on_w, on_mixed, top_u


@triton.jit
def _sums_kernel(
    z, r, segments, sums, V, parts, part, z_t, z_v, r_t, r_v,
    KIND: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, PROBE: tl.constexpr,
    ACC: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    # sums (T, parts, 8) of logits [begin, end) of a token
    token = (tl.program_id(0) // parts).to(tl.int64)
    if tl.load(segments + token) < 0:
        return
    begin = (tl.program_id(0) % parts) * part
    end = tl.minimum(begin + part, V)
    z += token * z_t
    r += token * r_t
    c = tl.zeros((), dtype=ACC)
    if KIND > 0:
        # every part has the same c
        first = tl.arange(0, PROBE)
        there = first < V
        first = first.to(tl.int64)
        head_z = _load(z + first * z_v, there, ACC, FLOOR)
        head_r = _load(r + first * r_v, there, ACC, FLOOR)
        c = tl.max(head_z, axis=0) - tl.max(head_r, axis=0)
        c = tl.where(tl.abs(c) < 1e4, c, 0.0)
    zero = tl.zeros((LANES,), dtype=ACC)
    state = (tl.full((LANES,), FLOOR, dtype=ACC), zero, zero, zero, zero, zero, zero)
    # neighbours of a vector load are one lane's
    row = tl.arange(0, ROWS // VEC)[:, None, None] * LANES
    place = (row + tl.arange(0, LANES)[None, :, None]) * VEC + tl.arange(0, VEC)[None, None, :]
    whole = begin + (end - begin) // (ROWS * LANES) * (ROWS * LANES)
    for start in range(begin, whole, ROWS * LANES):
        state = _add(z, r, start + place, end, z_v, r_v, c, state, KIND, False, ACC, FLOOR)
    if whole < end:
        state = _add(z, r, whole + place, end, z_v, r_v, c, state, KIND, True, ACC, FLOOR)
    top, total, on_a, on_u, on_w, on_mixed, top_u = state
    all_top = tl.max(top, axis=0)
    shift = top - all_top
    shrink = _exp(shift)
    own = sums + tl.program_id(0).to(tl.int64) * 8
    tl.store(own, all_top)
    tl.store(own + 1, tl.sum(total * shrink, axis=0))
    tl.store(own + 2, tl.sum((on_a + shift * total) * shrink, axis=0))
    if KIND > 0:
        on_shift = on_w if KIND == 1 else on_u
        tl.store(own + 3, tl.sum(on_u * shrink, axis=0))
        tl.store(own + 4, tl.sum(on_w * shrink, axis=0))
        tl.store(own + 5, tl.sum((on_mixed + shift * on_shift) * shrink, axis=0))
        tl.store(own + 6, tl.max(top_u, axis=0))
        tl.store(own + 7, c)


@triton.jit
def _far(z, r, V, z_v, r_v, top, BLOCK_V: tl.constexpr, ACC: tl.constexpr, FLOOR: tl.constexpr):
    # max r, sum e^(r - max r), and under these weights r - z and z - top
    top_r = tl.full((), FLOOR, dtype=ACC)
    total = tl.zeros((), dtype=ACC)
    drift = tl.zeros((), dtype=ACC)
    on_z = tl.zeros((), dtype=ACC)
    for start in range(0, V, BLOCK_V):
        place = start + tl.arange(0, BLOCK_V)
        inside = place < V
        place = place.to(tl.int64)
        zs = _load(z + place * z_v, inside, ACC, FLOOR)
        rs = _load(r + place * r_v, inside, ACC, FLOOR)
        new_top = tl.maximum(top_r, tl.max(rs, axis=0))
        shrink = _exp(top_r - new_top)
        e = tl.where(inside, _exp(rs - new_top), 0.0)
        total = total * shrink + tl.sum(e, axis=0)
        drift = drift * shrink + tl.sum(e * (rs - zs), axis=0)
        on_z = on_z * shrink + tl.sum(e * (zs - top), axis=0)
        top_r = new_top
    return top_r.to(tl.float64), total.to(tl.float64), drift.to(tl.float64), on_z.to(tl.float64)


@triton.jit
def _token_kernel(
    sums, z, r, labels, segments, value, env, stats, ranges, T, S, V, parts, z_t, z_v, r_t, r_v,
    KIND: tl.constexpr, PARTS: tl.constexpr, BLOCK_V: tl.constexpr, ACC: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    # value (T,), env (T,) and stats (T, 5) from the parts' sums; the few numbers of a token in float64. The range of a
    # segment, ranges (S, 2), holds T less its first token and one more than its last: largest numbers, so in no order.
    token = tl.program_id(0).to(tl.int64)
    segment = tl.load(segments + token)
    if segment < 0:
        tl.store(value + token, 0.0)
        tl.store(env + token, 0.0)
        for column in tl.static_range(5):
            tl.store(stats + token * 5 + column, 0.0)
        return
    if segment < S:
        tl.atomic_max(ranges + 2 * segment, T - tl.program_id(0), sem="relaxed")
        tl.atomic_max(ranges + 2 * segment + 1, tl.program_id(0) + 1, sem="relaxed")
    z += token * z_t
    r += token * r_t
    part = tl.arange(0, PARTS)
    inside = part < parts
    own = sums + (token * parts + part) * 8
    tops = tl.load(own, mask=inside, other=FLOOR).to(tl.float64)
    top = tl.max(tops, axis=0)
    shift = tops - top
    # a part that is not there weighs nothing even where every logit is -inf
    shrink = tl.where(inside, tl.exp(shift), 0.0)
    totals = tl.load(own + 1, mask=inside, other=0.0).to(tl.float64)
    total = tl.sum(totals * shrink, axis=0)
    on_a = tl.load(own + 2, mask=inside, other=0.0).to(tl.float64)
    mean = tl.sum((on_a + shift * totals) * shrink, axis=0) / total
    fourth = tl.zeros((), dtype=tl.float64)
    fifth = tl.zeros((), dtype=tl.float64)
    if KIND == 0:
        label = tl.load(labels + token)
        # a label out of range gives NaN
        known = (label >= 0) & (label < V)
        picked = tl.where(known, tl.load(z + label * z_v, mask=known, other=0.0).to(ACC), float("nan"))
        # a label of probability zero has an infinite risk, save where every logit is -inf and all are alike
        alike = (top <= tl.full((), FLOOR, dtype=ACC).to(tl.float64)) & (picked == picked)
        lead = tl.where(alike, 0.0, top - picked)
        risk = lead + tl.log(total)
        slope = lead + mean
    else:
        on_u = tl.load(own + 3, mask=inside, other=0.0).to(tl.float64)
        on_w = tl.load(own + 4, mask=inside, other=0.0).to(tl.float64)
        on_mixed = tl.load(own + 5, mask=inside, other=0.0).to(tl.float64)
        mixed = tl.sum((on_mixed + shift * (on_w if KIND == 1 else on_u)) * shrink, axis=0) / total
        e_u = tl.sum(on_u * shrink, axis=0) / total
        e_w = tl.sum(on_w * shrink, axis=0) / total
        top_u = tl.max(tl.load(own + 6, mask=inside, other=0.0), axis=0)
        c = tl.load(sums + token * parts * 8 + 7).to(tl.float64)
        if KIND == 1:
            risk = e_u / (1.0 + e_w) - _log1p(e_w)
            slope = (mean * e_w - mixed) / (1.0 + e_w)
            fourth = top - c
            fifth = total * (1.0 + e_w)
        else:
            risk = _log1p(e_w) - e_u
            slope = mean * e_u - mixed
            fourth = c - e_u
            fifth = slope
        # exp(60) is finite in float32 with room for a sum; beyond it two log-sum-exps are as accurate
        if (top_u > 60.0) | (e_w < -0.9):
            top_r, total_r, drift, on_z = _far(z, r, V, z_v, r_v, top.to(ACC), BLOCK_V, ACC, FLOOR)
            lead = (top - top_r) + (tl.log(total) - tl.log(total_r))
            if KIND == 1:
                risk = drift / total_r + lead
                slope = mean - on_z / total_r
                fourth = top_r
                fifth = total_r
            else:
                risk = fourth - lead
    tl.store(value + token, risk)
    tl.store(env + token, slope)
    tl.store(stats + token * 5, top)
    tl.store(stats + token * 5 + 1, total)
    tl.store(stats + token * 5 + 2, top + mean)
    tl.store(stats + token * 5 + 3, fourth)
    tl.store(stats + token * 5 + 4, fifth)


@triton.jit
def _mean_kernel(
    per_value, per_env, segments, ranges, value, env, T, BLOCK_T: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    # value (S,), env (S,): means of a segment's tokens, in their order
    own = tl.program_id(0)
    tokens = tl.zeros((BLOCK_T,), dtype=tl.int32)
    on_value = tl.zeros((BLOCK_T,), dtype=ACC)
    on_env = tl.zeros((BLOCK_T,), dtype=ACC)
    stop = tl.load(ranges + 2 * own + 1)
    for start in range(T - tl.load(ranges + 2 * own), stop, BLOCK_T):
        token = start + tl.arange(0, BLOCK_T)
        hit = tl.load(segments + token, mask=token < stop, other=-1) == own
        tokens += hit.to(tl.int32)
        on_value += tl.load(per_value + token, mask=hit, other=0.0)
        on_env += tl.load(per_env + token, mask=hit, other=0.0)
    shared = tl.maximum(tl.sum(tokens, axis=0), 1).to(ACC)
    tl.store(value + own, tl.sum(on_value, axis=0) / shared)
    tl.store(env + own, tl.sum(on_env, axis=0) / shared)


@triton.jit
def _count_kernel(segments, count, T, S, COUNTED: tl.constexpr):
    # count (S,): tokens of every segment
    token = tl.program_id(0) * COUNTED + tl.arange(0, COUNTED)
    segment = tl.load(segments + token, mask=token < T, other=-1)
    tl.atomic_add(count + segment, 1, mask=(segment >= 0) & (segment < S), sem="relaxed")


@triton.jit
def _gradient_kernel(
    z, r, labels, segments, count, on_value, on_env, stats, out, V, S, blocks, value_s, env_s, z_t, z_v, r_t, r_v,
    KIND: tl.constexpr, BLOCK_V: tl.constexpr, ACC: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) // blocks).to(tl.int64)
    place = (tl.program_id(0) % blocks) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = place < V
    there = out + token * V + place
    segment = tl.load(segments + token)
    if (segment < 0) | (segment >= S):
        tl.store(there, tl.zeros((BLOCK_V,), dtype=out.dtype.element_ty), mask=inside)
        return
    at = place.to(tl.int64)
    zs = _load(z + token * z_t + at * z_v, inside, ACC, FLOOR)
    shared = tl.maximum(tl.load(count + segment), 1).to(ACC)
    value = tl.load(on_value + segment * value_s) / shared
    env = tl.load(on_env + segment * env_s) / shared
    own = stats + token * 5
    p = _exp(zs - tl.load(own)) * (1.0 / tl.load(own + 1))
    a = zs - tl.load(own + 2)
    if KIND == 0:
        grad = p * (value + env + env * a)
        grad = tl.where(place == tl.load(labels + token), grad - (value + env), grad)
    else:
        rs = _load(r + token * r_t + at * r_v, inside, ACC, FLOOR)
        fourth = tl.load(own + 3)
        fifth = tl.load(own + 4)
        if KIND == 1:
            q = _exp(rs - fourth) * (1.0 / fifth)
            grad = (value + env) * (p - q) + env * p * a
        else:
            b = (zs - rs) - fourth
            grad = p * (b * (value + env + env * a) + env * (a - fifth))
    tl.store(there, grad.to(out.dtype.element_ty), mask=inside)


def _constants(dtype: torch.dtype, kind: str) -> dict[str, Any]:
    wide = dtype == torch.float64
    return {"KIND": _KINDS[kind], "ACC": tl.float64 if wide else tl.float32, "FLOOR": -1e100 if wide else -1e15}


def _tile(dtype: torch.dtype) -> dict[str, int]:
    return {"ROWS": ROWS // 4 if dtype == torch.float64 else ROWS, "LANES": LANES, "VEC": 16 // dtype.itemsize}


def _parts(tokens: int, vocabulary: int, processors: int, tile: int) -> tuple[int, int]:
    """Return the parts of a token's logits and the logits of a part: enough programs, of two tiles or more."""
    wanted = max(1, min(triton.cdiv(PROGRAMS * processors, tokens), vocabulary // (2 * tile)))
    part = triton.cdiv(triton.cdiv(vocabulary, wanted), tile) * tile
    return triton.cdiv(vocabulary, part), part


def _check_values(logits: Tensor, target: Tensor, segments: Tensor, n_segments: int, kind: str) -> None:
    if logits.device.type == "cpu":
        check_segments("risk", segments, n_segments)
        if kind == "ce":
            check_labels("risk", target, segments, logits.shape[1])


def risk(logits: Tensor, target: Tensor, segments: Tensor, n_segments: int, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return value (S,), env_grad (S,) and stats (T, 5); a GPU is not asked for labels and segments."""
    check_risk(logits, target, segments, n_segments, kind)
    _check_values(logits, target, segments, n_segments, kind)
    tokens, vocabulary = logits.shape
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    segments, target = segments.contiguous(), target.contiguous() if kind == "ce" else target
    value, env = (logits.new_empty(n_segments, dtype=wide) for _ in range(2))
    per_value, per_env = (logits.new_empty(tokens, dtype=wide) for _ in range(2))
    stats = logits.new_empty((tokens, 5), dtype=wide)
    constants = _constants(logits.dtype, kind)
    ranges = logits.new_zeros((n_segments, 2), dtype=torch.int32)
    if tokens:
        tile = _tile(logits.dtype)
        parts, part = _parts(tokens, vocabulary, processors(logits.device), tile["ROWS"] * LANES)
        sums = logits.new_empty((tokens, parts, SUMS), dtype=wide)
        r, labels = (logits, target) if kind == "ce" else (target, segments)
        strides = (*logits.stride(), *r.stride())
        _sums_kernel[(tokens * parts,)](
            logits, r, segments, sums, vocabulary, parts, part, *strides,
            **tile, PROBE=PROBE, **constants, num_warps=WARPS,
        )  # fmt: skip
        _token_kernel[(tokens,)](
            sums, logits, r, labels, segments, per_value, per_env, stats, ranges, tokens, n_segments,
            vocabulary, parts, *strides,
            PARTS=triton.next_power_of_2(parts), BLOCK_V=PROBE, **constants,
        )  # fmt: skip
    if n_segments:
        _mean_kernel[(n_segments,)](
            per_value, per_env, segments, ranges, value, env, tokens, BLOCK_T=BLOCK_T, ACC=constants["ACC"]
        )
    return value, env, stats


def risk_backward(
    grad_value: Tensor, grad_env: Tensor, logits: Tensor, target: Tensor, segments: Tensor, stats: Tensor, kind: str
) -> Tensor:
    """Return the gradient by logits (T, V), contiguous; arguments as the op's."""
    check_risk(logits, target, segments, grad_value.shape[0] if grad_value.dim() else 0, kind)
    check_risk_upstream("risk", grad_value, grad_env, stats, logits)
    _check_values(logits, target, segments, grad_value.shape[0], kind)
    (tokens, vocabulary), n_segments = logits.shape, grad_value.shape[0]
    grad = logits.new_empty(logits.shape)
    if tokens == 0:
        return grad
    segments, target = segments.contiguous(), target.contiguous() if kind == "ce" else target
    constants = _constants(logits.dtype, kind)
    count = segments.new_zeros(n_segments, dtype=torch.int32)
    _count_kernel[(triton.cdiv(tokens, COUNTED),)](segments, count, tokens, n_segments, COUNTED=COUNTED)
    r, labels = (logits, target) if kind == "ce" else (target, segments)
    blocks = triton.cdiv(vocabulary, BLOCK_V)
    _gradient_kernel[(tokens * blocks,)](
        logits, r, labels, segments, count, grad_value, grad_env, stats.contiguous(), grad, vocabulary, n_segments,
        blocks, grad_value.stride(0), grad_env.stride(0), *logits.stride(), *r.stride(),
        BLOCK_V=BLOCK_V, **constants, num_warps=WARPS,
    )  # fmt: skip
    return grad
