"""nearest_keys in Triton: programs for a block of queries and a part of the keys, then one program a query to merge."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastedit.reference._checks import fail
from fastedit.reference.arguments import check_nearest_keys

BLOCK_Q = 16  # queries of a program
BLOCK_K = 64  # keys scored at a time
BLOCK_D = 64  # features read at a time
DISTANCE_D = 1024  # features of a chosen key read at a time, 16 bytes a thread
PARTS = 32  # parts of the keys at most, where there are many queries
FEW = 264  # programs that few queries are shared out to, two for each multiprocessor
MERGED = 2048  # candidates that the merge looks at for a query, where it may choose
PART = 4096  # keys of a part at least


@triton.jit
def _product(a, b, acc, USE_DOT: tl.constexpr):
    # (M, K) (K, N) added to acc. Tensor cores have no float64 on every target, so that goes by broadcasting.
    if USE_DOT:
        return tl.dot(a, b, acc, input_precision="ieee")
    else:
        return acc + tl.sum(a[:, :, None] * b[None, :, :], axis=1)


@triton.jit
def _ranked(score, NAN: tl.constexpr, LOWEST: tl.constexpr):
    # numbers above NaN: minus infinity becomes the lowest number, NaN minus infinity
    return tl.where(score != score, NAN, tl.where(score < LOWEST, LOWEST, score))


@triton.jit
def _scan_kernel(
    queries, keys, scores, indices, Q, K, d, k, part, q_r, q_d, k_r, k_d,
    COSINE: tl.constexpr, L2: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    SLOTS: tl.constexpr, ACC: tl.constexpr, OPERAND: tl.constexpr, USE_DOT: tl.constexpr,
    NAN: tl.constexpr, LOWEST: tl.constexpr, TINY: tl.constexpr,
):  # fmt: skip
    # the k best of keys [begin, end) for BLOCK_Q queries, in no order, into scores and indices (Q, parts, k)
    rows = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    live = rows < Q
    q_at = rows.to(tl.int64) * q_r
    begin = tl.program_id(1) * part
    end = tl.minimum(begin + part, K)
    slot = tl.arange(0, SLOTS)
    # slots beyond k are never the worst; empty ones are taken first
    best = tl.where(slot[None, :] < k, NAN, -NAN) + tl.zeros((BLOCK_Q, SLOTS), dtype=ACC)
    names = tl.zeros((BLOCK_Q, SLOTS), dtype=tl.int32) + 2147483647
    column = tl.arange(0, BLOCK_K)
    for first in range(begin, end, BLOCK_K):
        there = first + column < end
        k_at = (first + column).to(tl.int64) * k_r
        acc = tl.zeros((BLOCK_Q, BLOCK_K), dtype=ACC)
        q_square = tl.zeros((BLOCK_Q,), dtype=ACC)
        k_square = tl.zeros((BLOCK_K,), dtype=ACC)
        for f in range(0, d, BLOCK_D):
            feature = f + tl.arange(0, BLOCK_D)
            inside = feature < d
            left = tl.load(
                queries + q_at[:, None] + feature[None, :] * q_d, mask=live[:, None] & inside[None, :], other=0.0
            )
            right = tl.load(
                keys + k_at[None, :] + feature[:, None] * k_d, mask=there[None, :] & inside[:, None], other=0.0
            )
            acc = _product(left.to(OPERAND), right.to(OPERAND), acc, USE_DOT)
            q_square += tl.sum(left.to(ACC) * left.to(ACC), axis=1)
            k_square += tl.sum(right.to(ACC) * right.to(ACC), axis=0)
        if COSINE:
            q_length = tl.sqrt(q_square)
            k_length = tl.sqrt(k_square)
            # comparisons with NaN are false: it stays
            q_length = tl.where(q_length < TINY, TINY, q_length)
            k_length = tl.where(k_length < TINY, TINY, k_length)
            acc = acc / q_length[:, None] / k_length[None, :]
        if L2:
            acc = 2.0 * acc - k_square[None, :] - q_square[:, None]
        score = _ranked(acc, NAN, LOWEST)
        open_ = there[None, :] & live[:, None]
        searching = 1
        while searching > 0:
            # every row's best key that is left, the lowest of equal ones, for its worst slot, the latest of equal ones
            top = tl.max(tl.where(open_, score, NAN), axis=1)
            at = tl.min(tl.where(open_ & (score == top[:, None]), column[None, :], BLOCK_K), axis=1)
            worst = tl.min(best, axis=1)
            name = tl.max(tl.where(best == worst[:, None], names, -1), axis=1)
            better = (at < BLOCK_K) & ((top > worst) | (name == 2147483647))
            place = tl.min(tl.where((best == worst[:, None]) & (names == name[:, None]), slot[None, :], SLOTS), axis=1)
            chosen = better[:, None] & (slot[None, :] == place[:, None])
            best = tl.where(chosen, top[:, None], best)
            names = tl.where(chosen, (first + at)[:, None], names)
            open_ = open_ & (column[None, :] != at[:, None])
            searching = tl.max(better.to(tl.int32), axis=0)
    to = (rows.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * k
    kept = live[:, None] & (slot[None, :] < k)
    tl.store(scores + to[:, None] + slot[None, :], best, mask=kept)
    tl.store(indices + to[:, None] + slot[None, :], names, mask=kept)


@triton.jit
def _merge_kernel(
    scores, indices, values, names, found, k,
    BLOCK: tl.constexpr, NAN: tl.constexpr, LOWEST: tl.constexpr, L2: tl.constexpr,
):  # fmt: skip
    # one query: of the parts' keys the k best, in order
    query = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside = place < found
    score = tl.load(scores + query * found + place, mask=inside, other=NAN)
    name = tl.load(indices + query * found + place, mask=inside, other=2147483647)
    for rank in range(k):
        top = tl.max(tl.where(name < 2147483647, score, NAN), axis=0)
        chosen = tl.min(tl.where(score == top, name, 2147483647), axis=0)
        value = tl.where(top == NAN, float("nan"), tl.where(top == LOWEST, NAN, top))
        if L2:
            value = -value
        tl.store(values + query * k + rank, value.to(values.dtype.element_ty))
        tl.store(names + query * k + rank, chosen.to(tl.int64))
        name = tl.where(name == chosen, 2147483647, name)


@triton.jit
def _distance_kernel(
    queries, keys, names, values, d, k, q_r, q_d, k_r, k_d, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # the squared distance of a query and a chosen key by their difference
    query = tl.program_id(0).to(tl.int64)
    place = query * k + tl.program_id(1)
    key = tl.load(names + place)
    acc = tl.zeros((BLOCK_D,), dtype=ACC)
    for f in range(0, d, BLOCK_D):
        feature = f + tl.arange(0, BLOCK_D)
        inside = feature < d
        left = tl.load(queries + query * q_r + feature * q_d, mask=inside, other=0.0).to(ACC)
        right = tl.load(keys + key * k_r + feature * k_d, mask=inside, other=0.0).to(ACC)
        acc += (left - right) * (left - right)
    tl.store(values + place, tl.sum(acc, axis=0))


def _constants(wide: bool, metric: str, k: int, operand: Any) -> dict[str, Any]:
    block = 16 if wide else 0
    return {
        "COSINE": metric == "cosine",
        "L2": metric == "l2",
        "BLOCK_Q": BLOCK_Q,
        "BLOCK_K": block or BLOCK_K,
        "BLOCK_D": block or BLOCK_D,
        "SLOTS": triton.next_power_of_2(k),
        "ACC": tl.float64 if wide else tl.float32,
        "OPERAND": operand,
        "USE_DOT": not wide,
        "NAN": float("-inf"),
        "LOWEST": torch.finfo(torch.float64 if wide else torch.float32).min,
        "TINY": 1e-12,
    }


def parts_of(count: int, stored: int, k: int) -> int:
    """Return into how many parts the stored keys go, each with its own k best: more of them where queries are few."""
    wanted = min(FEW // triton.cdiv(count, BLOCK_Q), MERGED // k)
    return min(max(PARTS, wanted), triton.cdiv(stored, PART))


def nearest_keys(queries: Tensor, keys: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    """Return values (Q, k) and indices (Q, k); arguments as the op's, fewer than 2^31 keys."""
    check_nearest_keys(queries, keys, k, metric)
    if keys.shape[0] >= 2**31:
        fail("nearest_keys", "keys are fewer than 2^31", K=keys.shape[0])
    (count, d), stored = queries.shape, keys.shape[0]
    wide = queries.dtype == torch.float64
    # operands as stored; the interpreter multiplies no bfloat16
    same = {} if triton.knobs.runtime.interpret else {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    settings = _constants(wide, metric, k, same.get(queries.dtype, tl.float64 if wide else tl.float32))
    values = queries.new_empty((count, k), dtype=torch.float64 if wide else torch.float32)
    indices = queries.new_empty((count, k), dtype=torch.int64)
    if count == 0:
        return values, indices
    parts = parts_of(count, stored, k)
    part = triton.cdiv(triton.cdiv(stored, parts), BLOCK_K) * BLOCK_K
    scores = queries.new_empty((count, parts, k), dtype=values.dtype)
    names = queries.new_empty((count, parts, k), dtype=torch.int32)
    strides = (*queries.stride(), *keys.stride())
    _scan_kernel[(triton.cdiv(count, BLOCK_Q), parts)](
        queries, keys, scores, names, count, stored, d, k, part, *strides, **settings
    )
    merge = {name: settings[name] for name in ("NAN", "LOWEST", "L2")}
    _merge_kernel[(count,)](
        scores, names, values, indices, parts * k, k, BLOCK=triton.next_power_of_2(parts * k), **merge
    )
    if metric == "l2":
        _distance_kernel[(count, k)](
            queries, keys, indices, values, d, k, *strides, BLOCK_D=DISTANCE_D, ACC=settings["ACC"]
        )
        # by lower index, then stably by distance; NaN goes last
        indices, order = indices.sort(dim=1)
        values, by_value = values.gather(1, order).sort(dim=1, stable=True)
        indices = indices.gather(1, by_value)
    return values, indices
