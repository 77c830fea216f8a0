"""nearest_keys in Triton: candidates on tensor cores with a bound of their error, then exact scores that choose.

Programs for a block of queries and a part of the keys keep more candidates than are asked for, by scores that tensor
cores computed. A program a query takes the best of them, computes their scores exactly, and compares the k-th with
what a key that was left out can have at most: its approximate score and the bound. Only a part where that is not below
the k-th is searched again, exactly; elsewhere programs of the second search return at once, and nobody waits for the
host. So the choice is that of exact scores rounded to float32, with ties by lower index, on any device and in any order
of sums.

The bound. A float32 product is three of bfloat16, which leave out at most 3.1 * 2^-16 of it; 16-bit products are
exact. Tensor cores may cut each addend, and the sum so far, behind 23 bits of the largest: a block of BLOCK_D features
is so summed with an error of at most 2^-23 of its absolute sum for every addend, 9 for 8 products, and blocks are added
in float32. Absolute sums of products are at most the product of lengths. Lengths are sums in float32 of their own.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastedit.kernels._nearest_exact import _merge_kernel, _search_kernel, best_in_order, exact, ranked
from fastedit.kernels._tuning import SHARED, tuned, work_of
from fastedit.reference._checks import fail
from fastedit.reference.arguments import check_nearest_keys

EXACT = {"BLOCK_Q": 16, "BLOCK_K": 16, "BLOCK_D": 16}  # queries, keys and features of an exact search at a time
HELD = 1024  # candidates that a program holds for its queries, at most where queries are 16
PARTS = 31  # parts of the keys at most, where there are many queries
FEW = 264  # programs that few queries are shared out to, two for each multiprocessor
MERGED = 2048  # candidates that are looked at together for a query, where that may be chosen
PART = 4096  # keys of a part at least
THREE = {False: "bf16x3", True: "tf32x3"}  # Triton's interpreter knows no bf16x3; it computes neither so
TINY = 1e-12  # shorter vectors have no direction


def _scan_shared(BLOCK_Q: int, BLOCK_K: int, BLOCK_D: int, OPERAND: Any, num_stages: int, **_: Any) -> int:
    # both tiles in stages as stored, and as float32 the halves of the queries
    size = OPERAND.primitive_bitwidth // 8
    if size == 4 and BLOCK_D > 32:
        # registers do not hold the halves of the keys
        return 2 * SHARED
    return BLOCK_D * (size * num_stages * (BLOCK_Q + BLOCK_K) + size // 4 * 4 * BLOCK_Q)


@tuned(
    [
        triton.Config({"BLOCK_K": keys, "BLOCK_D": features}, num_warps=warps, num_stages=stages)
        for keys, features, warps, stages in ((64, 64, 4, 3), (128, 32, 8, 3), (128, 64, 8, 3), (64, 32, 4, 2))
    ],
    _scan_shared,
)
@triton.jit(do_not_specialize=["work"])
def _scan_kernel(
    queries, keys, scores, indices, slack, Q, K, d, part, q_r, q_d, k_r, k_d, work,
    COSINE: tl.constexpr, L2: tl.constexpr, SLOTS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, PRODUCTS: tl.constexpr, TINY: tl.constexpr,
):  # fmt: skip
    # Of keys [begin, end) SLOTS candidates for BLOCK_Q queries, in no order, into scores and indices (Q, parts + 1,
    # SLOTS), minus infinity and 2147483647 where there are fewer; slack (Q, parts), how far scores may be off.
    rows = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    live = rows < Q
    q_at = rows.to(tl.int64) * q_r
    parts = tl.num_programs(1)
    begin = tl.program_id(1) * part
    end = tl.minimum(begin + part, K)
    slot = tl.arange(0, SLOTS)
    q_square = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    for f in range(0, d, BLOCK_D):
        feature = f + tl.arange(0, BLOCK_D)
        left = tl.load(
            queries + q_at[:, None] + feature[None, :] * q_d, mask=live[:, None] & (feature < d)[None, :], other=0.0
        ).to(tl.float32)
        q_square += tl.sum(left * left, axis=1)
    best = tl.zeros((SLOTS, BLOCK_Q), dtype=tl.float32) - float("inf")
    names = tl.zeros((SLOTS, BLOCK_Q), dtype=tl.int32) + 2147483647
    column = tl.arange(0, BLOCK_K)
    longest = tl.zeros((BLOCK_K,), dtype=tl.float32)
    # where squared lengths are below 2^100 nothing overflows; a NaN is not below
    LIMIT: tl.constexpr = 1.2676506002282294e30
    for first in range(begin, end, BLOCK_K):
        there = first + column < end
        k_at = (first + column).to(tl.int64) * k_r
        acc = tl.zeros((BLOCK_K, BLOCK_Q), dtype=tl.float32)
        k_square = tl.zeros((BLOCK_K,), dtype=tl.float32)
        for f in range(0, d, BLOCK_D):
            feature = f + tl.arange(0, BLOCK_D)
            inside = feature < d
            # keys stand where tensor cores take 64 rows and more, queries where they take any count
            left = tl.load(
                keys + k_at[:, None] + feature[None, :] * k_d, mask=there[:, None] & inside[None, :], other=0.0
            )
            right = tl.load(
                queries + q_at[None, :] + feature[:, None] * q_d, mask=live[None, :] & inside[:, None], other=0.0
            )
            # every block is summed from 0, which keeps the bound small
            acc += tl.dot(left.to(OPERAND), right.to(OPERAND), input_precision=PRECISION)
            k_square += tl.sum(left.to(tl.float32) * left.to(tl.float32), axis=1)
        if COSINE:
            q_length = tl.maximum(tl.sqrt(q_square), TINY)
            k_length = tl.maximum(tl.sqrt(k_square), TINY)
            acc = acc / q_length[None, :] / k_length[:, None]
        if L2:
            acc = 2.0 * acc - k_square[:, None] - q_square[None, :]
        short = k_square < LIMIT
        longest = tl.maximum(longest, tl.where(there & short, k_square, 0.0))
        # what may overflow is a candidate: its exact score tells
        score = tl.where(short[:, None] & (q_square < LIMIT)[None, :], acc, float("inf"))
        score = tl.where(there[:, None] & live[None, :], score, float("-inf"))
        top = tl.max(score, axis=0)
        worst = tl.min(best, axis=0)
        better = top > worst
        searching = tl.max(better.to(tl.int32), axis=0)
        while searching > 0:
            # every query's best key that is left for its worst slot
            at = tl.min(tl.where(score == top[None, :], column[:, None], BLOCK_K), axis=0)
            place = tl.min(tl.where(best == worst[None, :], slot[:, None], SLOTS), axis=0)
            chosen = better[None, :] & (slot[:, None] == place[None, :])
            best = tl.where(chosen, top[None, :], best)
            names = tl.where(chosen, (first + at)[None, :], names)
            score = tl.where(column[:, None] == at[None, :], float("-inf"), score)
            top = tl.max(score, axis=0)
            worst = tl.min(best, axis=0)
            better = top > worst
            searching = tl.max(better.to(tl.int32), axis=0)
    place = (rows.to(tl.int64) * (parts + 1) + tl.program_id(1)) * SLOTS
    tl.store(scores + place[None, :] + slot[:, None], best, mask=live[None, :])
    tl.store(indices + place[None, :] + slot[:, None], names, mask=live[None, :])
    # 2^-23 for each: addends and blocks of a product, addends and blocks of lengths, and what scores are made with
    off = (PRODUCTS * 9 * BLOCK_D // 8 + BLOCK_D + 2.0 * d / BLOCK_D + 16.0) * 1.1920928955078125e-7
    if PRODUCTS == 3:
        off += 4.8e-5
    square = tl.max(longest, axis=0)
    # numbers below 2^-126 may count as 0
    small = 1e-37 * d
    if COSINE:
        # lengths that count are at least 1e-12
        bound = off + 1e-13 * d + tl.zeros_like(q_square)
    elif L2:
        bound = off * (q_square + square) + small * (1.0 + tl.sqrt(q_square) + tl.sqrt(square))
    else:
        bound = off * tl.sqrt(q_square) * tl.sqrt(square) + small * (1.0 + tl.sqrt(q_square) + tl.sqrt(square))
    # a length is itself off, by d roundings at most
    bound *= 1.01 + 1.2e-7 * d
    tl.store(slack + rows.to(tl.int64) * parts + tl.program_id(1), bound, mask=live)


@triton.jit
def _choose_kernel(
    queries, keys, scores, indices, slack, values, names, again, d, k, parts, q_r, q_d, k_r, k_d,
    COSINE: tl.constexpr, L2: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, SLOTS: tl.constexpr,
    NAN: tl.constexpr, LOWEST: tl.constexpr, TINY: tl.constexpr,
):  # fmt: skip
    # One query: of the parts' candidates the SLOTS best by approximate score, of those the k best by exact score; exact
    # scores behind the last part, and again (Q, parts), where a key that was left out may be as good as the k-th.
    query = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK_P)
    slot = tl.arange(0, SLOTS)
    inside = part < parts
    place = (query * (parts + 1) + part)[:, None] * SLOTS + slot[None, :]
    score = tl.load(scores + place, mask=inside[:, None], other=float("-inf"))
    name = tl.load(indices + place, mask=inside[:, None], other=2147483647)
    # a part without an empty slot may have left out keys as good as its worst
    left_out = tl.min(score, axis=1)
    score = tl.reshape(score, (BLOCK_P * SLOTS,))
    name = tl.reshape(name, (BLOCK_P * SLOTS,))
    picked = tl.zeros((SLOTS,), dtype=tl.int32) + 2147483647
    for rank in range(SLOTS):
        chosen = tl.min(tl.where(score == tl.max(score, axis=0), name, 2147483647), axis=0)
        picked = tl.where(slot == rank, chosen, picked)
        score = tl.where(name == chosen, float("-inf"), score)
        name = tl.where(name == chosen, 2147483647, name)
    left_out = tl.maximum(left_out, tl.max(tl.reshape(score, (BLOCK_P, SLOTS)), axis=1))
    there = picked < 2147483647
    key = tl.where(there, picked, 0).to(tl.int64) * k_r
    total = tl.zeros((SLOTS,), dtype=tl.float64)
    q_square = tl.zeros((1,), dtype=tl.float64)
    k_square = tl.zeros((SLOTS,), dtype=tl.float64)
    for f in range(0, d, BLOCK_D):
        feature = f + tl.arange(0, BLOCK_D)
        wide = (feature < d)[None, :]
        left = tl.load(queries + query * q_r + feature[None, :] * q_d, mask=wide, other=0.0).to(tl.float64)
        right = tl.load(keys + key[:, None] + feature[None, :] * k_d, mask=there[:, None] & wide, other=0.0).to(
            tl.float64
        )
        if L2:
            total += tl.sum((left - right) * (left - right), axis=1)
        else:
            total += tl.sum(left * right, axis=1)
        if COSINE:
            q_square += tl.sum(left * left, axis=1)
            k_square += tl.sum(right * right, axis=1)
    known = ranked(exact(total, q_square, k_square, COSINE, L2, TINY).to(tl.float32), NAN, LOWEST)
    behind = (query * (parts + 1) + parts) * SLOTS + slot
    tl.store(scores + behind, known)
    tl.store(indices + behind, picked)
    last = best_in_order(known, picked, values, names, query * k, k, NAN, LOWEST, L2)
    most = left_out + tl.load(slack + query * parts + part, mask=inside, other=0.0)
    # NaN is not below: it asks again
    tl.store(again + query * parts + part, (most < last).to(tl.int32) == 0, mask=inside)


def rows_of(count: int, slots: int, dtype: torch.dtype) -> int:
    """Return how many queries a program of the first search has: what it holds of them stays in its registers."""
    most = min(32 if dtype == torch.float32 else 64, HELD // slots)
    return max(16, min(int(triton.next_power_of_2(count)), most))


def parts_of(blocks: int, stored: int, slots: int) -> int:
    """Return into how many parts the stored keys go, each with its own candidates: more for few blocks of queries."""
    wanted = min(FEW // blocks, MERGED // slots - 1)
    return min(max(PARTS, wanted), triton.cdiv(stored, PART))


def slots_of(k: int) -> int:
    """Return how many candidates of a part are kept for the k best: more, so that the k-th is clear of others."""
    return int(triton.next_power_of_2(k + max(k // 2, 4)))


def nearest_keys(queries: Tensor, keys: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    """Return values (Q, k) and indices (Q, k); arguments as the op's, fewer than 2^31 keys."""
    check_nearest_keys(queries, keys, k, metric)
    if keys.shape[0] >= 2**31:
        fail("nearest_keys", "keys are fewer than 2^31", K=keys.shape[0])
    (count, d), stored = queries.shape, keys.shape[0]
    double = queries.dtype == torch.float64
    values = queries.new_empty((count, k), dtype=torch.float64 if double else torch.float32)
    indices = queries.new_empty((count, k), dtype=torch.int64)
    if count == 0:
        return values, indices
    slots = slots_of(k)
    rows = rows_of(count, slots, queries.dtype)
    parts = parts_of(triton.cdiv(count, rows), stored, slots)
    part = triton.cdiv(triton.cdiv(stored, parts), 64) * 64
    # behind the parts those that were chosen from them
    scores = queries.new_empty((count, parts + 1, slots), dtype=values.dtype)
    names = queries.new_empty((count, parts + 1, slots), dtype=torch.int32)
    again = queries.new_empty((count, parts), dtype=torch.int32)
    strides = (*queries.stride(), *keys.stride())
    kind = {"COSINE": metric == "cosine", "L2": metric == "l2", "SLOTS": slots}
    order = {"NAN": float("-inf"), "LOWEST": torch.finfo(values.dtype).min}
    block = triton.next_power_of_2(parts + 1)
    if not double:
        slack = queries.new_empty((count, parts), dtype=torch.float32)
        _scan(queries, keys, scores, names, slack, part, rows, kind)
        _choose_kernel[(count,)](
            queries, keys, scores, names, slack, values, indices, again, d, k, parts, *strides,
            BLOCK_P=block, BLOCK_D=max(16, 2048 // slots), TINY=TINY, **kind, **order,
        )  # fmt: skip
    _search_kernel[(triton.cdiv(count, EXACT["BLOCK_Q"]), parts)](
        queries, keys, again, scores, names, count, stored, d, k, part, parts, *strides,
        ALL=double, TINY=TINY, **EXACT, **kind, **order,
    )  # fmt: skip
    _merge_kernel[(count,)](
        again, scores, names, values, indices, k, parts,
        ALL=double, L2=kind["L2"], SLOTS=slots, BLOCK_P=block, **order,
    )  # fmt: skip
    return values, indices


def _scan(
    queries: Tensor, keys: Tensor, scores: Tensor, names: Tensor, slack: Tensor, part: int, rows: int,
    kind: dict[str, Any],
) -> None:  # fmt: skip
    (count, d), stored, parts = queries.shape, keys.shape[0], slack.shape[1]
    interpreted = triton.knobs.runtime.interpret
    # operands as stored; the interpreter multiplies no bfloat16
    same = {} if interpreted else {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    single = queries.dtype == torch.float32
    _scan_kernel[(triton.cdiv(count, rows), parts)](
        queries, keys, scores, names, slack, count, stored, d, part, *queries.stride(), *keys.stride(),
        work_of(count, stored, d), BLOCK_Q=rows, OPERAND=same.get(queries.dtype, tl.float32),
        PRECISION=THREE[interpreted] if single else "tf32", PRODUCTS=3 if single else 1, TINY=TINY, **kind,
    )  # fmt: skip
