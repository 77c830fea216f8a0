"""Exact scores behind nearest_keys: in float64, rounded once to the dtype of the values, and what is best by them."""

import triton
import triton.language as tl


@triton.jit
def ranked(score, NAN: tl.constexpr, LOWEST: tl.constexpr):
    """Return scores with numbers above NaN: minus infinity becomes the lowest number, NaN minus infinity."""
    return tl.where(score != score, NAN, tl.where(score < LOWEST, LOWEST, score))


@triton.jit
def exact(total, q_square, k_square, COSINE: tl.constexpr, L2: tl.constexpr, TINY: tl.constexpr):
    """Return the score, larger is better, of a product (of a squared distance for L2) and squared lengths."""
    if COSINE:
        q_length = tl.sqrt(q_square)
        k_length = tl.sqrt(k_square)
        # comparisons with NaN are false: it stays
        total = total / tl.where(q_length < TINY, TINY, q_length) / tl.where(k_length < TINY, TINY, k_length)
    if L2:
        total = -total
    return total


@triton.jit
def best_in_order(score, name, values, names, place, k, NAN: tl.constexpr, LOWEST: tl.constexpr, L2: tl.constexpr):
    """Store the k best of ranked scores (N,), equal ones by lower name, at ``place``; return the last one's score.

    A name of 2147483647 is none; one that stands twice is taken once.
    """
    top = NAN
    for rank in range(k):
        top = tl.max(tl.where(name < 2147483647, score, NAN), axis=0)
        chosen = tl.min(tl.where(score == top, name, 2147483647), axis=0)
        value = tl.where(top == NAN, float("nan"), tl.where(top == LOWEST, NAN, top))
        if L2:
            value = -value
        tl.store(values + place + rank, value)
        tl.store(names + place + rank, chosen.to(tl.int64))
        name = tl.where(name == chosen, 2147483647, name)
    return top


@triton.jit
def _search_kernel(
    queries, keys, again, scores, indices, Q, K, d, k, part, parts, q_r, q_d, k_r, k_d,
    ALL: tl.constexpr, COSINE: tl.constexpr, L2: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, SLOTS: tl.constexpr, NAN: tl.constexpr, LOWEST: tl.constexpr, TINY: tl.constexpr,
):  # fmt: skip
    # The k best of keys [begin, end) for BLOCK_Q queries, in no order, into scores and indices (Q, parts + 1, SLOTS).
    # Unless ALL, only where one of the queries has this part in again (Q, parts).
    rows = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    live = rows < Q
    if not ALL:
        asked = tl.load(again + rows.to(tl.int64) * parts + tl.program_id(1), mask=live, other=0)
        if tl.max(asked, axis=0) == 0:
            return
    q_at = rows.to(tl.int64) * q_r
    begin = tl.program_id(1) * part
    end = tl.minimum(begin + part, K)
    slot = tl.arange(0, SLOTS)
    # slots beyond k are never the worst; empty ones are taken first
    best = tl.where(slot[None, :] < k, NAN, -NAN) + tl.zeros((BLOCK_Q, SLOTS), dtype=scores.dtype.element_ty)
    names = tl.zeros((BLOCK_Q, SLOTS), dtype=tl.int32) + 2147483647
    column = tl.arange(0, BLOCK_K)
    for first in range(begin, end, BLOCK_K):
        there = first + column < end
        k_at = (first + column).to(tl.int64) * k_r
        total = tl.zeros((BLOCK_Q, BLOCK_K), dtype=tl.float64)
        q_square = tl.zeros((BLOCK_Q,), dtype=tl.float64)
        k_square = tl.zeros((BLOCK_K,), dtype=tl.float64)
        for f in range(0, d, BLOCK_D):
            feature = f + tl.arange(0, BLOCK_D)
            inside = feature < d
            left = tl.load(
                queries + q_at[:, None] + feature[None, :] * q_d, mask=live[:, None] & inside[None, :], other=0.0
            ).to(tl.float64)
            right = tl.load(
                keys + k_at[None, :] + feature[:, None] * k_d, mask=there[None, :] & inside[:, None], other=0.0
            ).to(tl.float64)
            # tensor cores have no float64 on every target
            if L2:
                apart = left[:, :, None] - right[None, :, :]
                total += tl.sum(apart * apart, axis=1)
            else:
                total += tl.sum(left[:, :, None] * right[None, :, :], axis=1)
            if COSINE:
                q_square += tl.sum(left * left, axis=1)
                k_square += tl.sum(right * right, axis=0)
        score = exact(total, q_square[:, None], k_square[None, :], COSINE, L2, TINY)
        score = ranked(score.to(scores.dtype.element_ty), NAN, LOWEST)
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
    to = (rows.to(tl.int64) * (parts + 1) + tl.program_id(1)) * SLOTS
    tl.store(scores + to[:, None] + slot[None, :], best, mask=live[:, None])
    tl.store(indices + to[:, None] + slot[None, :], names, mask=live[:, None])


@triton.jit
def _merge_kernel(
    again, scores, indices, values, names, k, parts,
    ALL: tl.constexpr, L2: tl.constexpr, BLOCK_P: tl.constexpr, SLOTS: tl.constexpr, NAN: tl.constexpr,
    LOWEST: tl.constexpr,
):  # fmt: skip
    # One query: of the keys of all parts the k best, in order. Unless ALL, of the parts in again and of those chosen
    # before, which stand behind the last part; nothing where no part is in again.
    query = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK_P)
    slot = tl.arange(0, SLOTS)
    if ALL:
        inside = part < parts
    else:
        inside = tl.load(again + query * parts + part, mask=part < parts, other=0) > 0
        if tl.max(inside.to(tl.int32), axis=0) == 0:
            return
        inside = inside | (part == parts)
    place = (query * (parts + 1) + part)[:, None] * SLOTS + slot[None, :]
    score = tl.load(scores + place, mask=inside[:, None], other=NAN)
    name = tl.load(indices + place, mask=inside[:, None], other=2147483647)
    best_in_order(
        tl.reshape(score, (BLOCK_P * SLOTS,)), tl.reshape(name, (BLOCK_P * SLOTS,)), values, names, query * k, k,
        NAN, LOWEST, L2,
    )  # fmt: skip
