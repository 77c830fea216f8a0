"""topk_agreement in Triton: one program a token, one pass over its logits, the k best in registers."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastedit.reference.arguments import check_topk_agreement

BLOCK_V = 2048  # logits looked at at a time


@triton.jit
def _top_ids(logits, V, v_stride, k, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr):
    # The k best as unsorted (values, ids), those before the (k + 1)-th slot; and how many logits are NaN.
    slot = tl.arange(0, BLOCK_K)
    # ids from 2^62 on are nobody's
    nobody = tl.full((BLOCK_K,), 4611686018427387904, tl.int64)
    # slots from k on are never the worst
    values = tl.where(slot < k, float("-inf"), float("inf")).to(ACC)
    ids = tl.where(slot < k, nobody + slot, -1 - slot)
    broken = 0
    for start in range(0, V, BLOCK_V):
        place = start + tl.arange(0, BLOCK_V).to(tl.int64)
        inside = place < V
        block = tl.load(logits + place * v_stride, mask=inside, other=float("-inf")).to(ACC)
        broken += tl.sum((block != block).to(tl.int32), axis=0)
        block = tl.where(block != block, float("-inf"), block)
        own = tl.where(inside, place, 4611686018427387904 + 2 * BLOCK_K)
        best = tl.max(block, axis=0)
        best_id = tl.min(tl.where(block == best, own, 9223372036854775807), axis=0)
        worst = tl.min(values, axis=0)
        worst_id = tl.max(tl.where(values == worst, ids, -9223372036854775807), axis=0)
        while (best > worst) | ((best == worst) & (best_id < worst_id)):
            taken = ids == worst_id
            values = tl.where(taken, best, values)
            ids = tl.where(taken, best_id, ids)
            # a taken logit stays in the block as nobody's
            gone = own == best_id
            block = tl.where(gone, float("-inf"), block)
            own = tl.where(gone, 9223372036854775806, own)
            best = tl.max(block, axis=0)
            best_id = tl.min(tl.where(block == best, own, 9223372036854775807), axis=0)
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
        _agreement_kernel[(tokens,)](
            before, after, top1, ranked, vocabulary, k, *before.stride(), *after.stride(),
            BLOCK_V=min(triton.next_power_of_2(vocabulary), BLOCK_V), BLOCK_K=triton.next_power_of_2(k),
            ACC=tl.float64 if before.dtype == torch.float64 else tl.float32,
        )  # fmt: skip
    return top1, ranked


def ahead_of_time(dtype: str) -> list[tuple[Any, dict[str, str], dict[str, Any]]]:
    """Return (kernel, signature, constants) for compiling every kernel without a GPU; dtype is Triton's name for it."""
    constants = {"BLOCK_V": BLOCK_V, "BLOCK_K": 16, "ACC": tl.float64 if dtype == "fp64" else tl.float32}
    pointers = {"before": f"*{dtype}", "after": f"*{dtype}", "top1": "*fp64", "ranked": "*fp64"}
    names = _agreement_kernel.arg_names
    signature = {name: pointers.get(name, "constexpr" if name in constants else "i32") for name in names}
    return [(_agreement_kernel, signature, constants)]
