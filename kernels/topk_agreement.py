"""topk_agreement in Triton: one program a token, one pass over its logits, the k best in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastedit.reference.arguments import check_topk_agreement

WARPS = 8
BLOCK_V = 4096  # logits looked at at a time, of float64 half


@triton.jit
def _larger(a, b):
    # a NaN is larger than all
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _first(block, best, own, start):
    # lowest id of the best; nobody's where it is
    place = tl.min(tl.where(block == best, own, 2147483647), axis=0)
    return tl.where(place < 1073741824, start + place.to(tl.int64), 9223372036854775806)


@triton.jit
def _top_ids(logits, V, v_stride, k, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr):
    # The k best as unsorted (values, ids), those before the (k + 1)-th slot; and whether a logit is NaN.
    slot = tl.arange(0, BLOCK_K)
    # ids from 2^62 on are nobody's
    nobody = tl.full((BLOCK_K,), 4611686018427387904, tl.int64)
    # slots from k on are never the worst
    values = tl.where(slot < k, float("-inf"), float("inf")).to(ACC)
    ids = tl.where(slot < k, nobody + slot, -1 - slot)
    worst = tl.min(values, axis=0)
    worst_id = tl.max(tl.where(values == worst, ids, -9223372036854775807), axis=0)
    broken = 0
    place = tl.arange(0, BLOCK_V)
    following = tl.load(logits + place.to(tl.int64) * v_stride, mask=place < V, other=float("-inf"))
    for start in range(0, V, BLOCK_V):
        block = following.to(ACC)
        # on its way while this block is looked at
        place = start + BLOCK_V + tl.arange(0, BLOCK_V)
        following = tl.load(logits + place.to(tl.int64) * v_stride, mask=place < V, other=float("-inf"))
        # one sum over the warps for a block that holds none of the best
        best = tl.reduce(block, 0, _larger)
        if best != best:
            broken = 1
        # ids rise, so a logit as large as the worst comes too late, save where nobody has its slot
        elif (best > worst) | (worst_id >= 4611686018427387904):
            own = tl.arange(0, BLOCK_V)
            own = tl.where(start + own < V, own, 1073741824)
            best_id = _first(block, best, own, start)
            while (best > worst) | ((best == worst) & (best_id < worst_id)):
                taken = ids == worst_id
                values = tl.where(taken, best, values)
                ids = tl.where(taken, best_id, ids)
                # a taken logit stays in the block as nobody's
                gone = own == best_id - start
                block = tl.where(gone, float("-inf"), block)
                own = tl.where(gone, 1073741824, own)
                best = tl.max(block, axis=0)
                best_id = _first(block, best, own, start)
                worst = tl.min(values, axis=0)
                worst_id = tl.max(tl.where(values == worst, ids, -9223372036854775807), axis=0)
    return values, ids, broken


@triton.jit
def _ranks(values, ids, k, BLOCK_K: tl.constexpr):
    # How many of the k stand before each: larger, or as large with a lower id.
    slot = tl.arange(0, BLOCK_K)
    ahead = (values[None, :] > values[:, None]) | ((values[None, :] == values[:, None]) & (ids[None, :] < ids[:, None]))
    return tl.sum((ahead & (slot < k)[None, :]).to(tl.int32), axis=1)


@triton.jit
def _agreement_kernel(
    before, after, top1, ranked, V, k, before_t, before_v, after_t, after_v,
    BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    first, first_ids, first_broken = _top_ids(before + token * before_t, V, before_v, k, BLOCK_V, BLOCK_K, ACC)
    second, second_ids, second_broken = _top_ids(after + token * after_t, V, after_v, k, BLOCK_V, BLOCK_K, ACC)
    slot = tl.arange(0, BLOCK_K)
    first_rank = _ranks(first, first_ids, k, BLOCK_K)
    second_rank = _ranks(second, second_ids, k, BLOCK_K)
    used = (slot < k)[:, None] & (slot < k)[None, :]
    same = (first_ids[:, None] == second_ids[None, :]) & (first_rank[:, None] == second_rank[None, :]) & used
    sound = (first_broken + second_broken == 0).to(tl.int32)
    count = tl.sum(tl.sum(same.to(tl.int32), axis=1), axis=0) * sound
    leads = tl.sum(tl.sum((same & (first_rank == 0)[:, None]).to(tl.int32), axis=1), axis=0) * sound
    tl.store(top1 + token, leads.to(tl.float64))
    tl.store(ranked + token, count.to(tl.float64) / k)


def topk_agreement(before: Tensor, after: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return top1 (T,) and topk_ranked (T,); arguments as the op's."""
    check_topk_agreement(before, after, k)
    tokens, vocabulary = before.shape
    top1 = before.new_empty(tokens, dtype=torch.float64)
    ranked = before.new_empty(tokens, dtype=torch.float64)
    if tokens:
        most = BLOCK_V // 2 if before.dtype == torch.float64 else BLOCK_V
        _agreement_kernel[(tokens,)](
            before, after, top1, ranked, vocabulary, k, *before.stride(), *after.stride(),
            BLOCK_V=min(triton.next_power_of_2(vocabulary), most), BLOCK_K=triton.next_power_of_2(k),
            ACC=tl.float64 if before.dtype == torch.float64 else tl.float32, num_warps=WARPS,
        )  # fmt: skip
    return top1, ranked
