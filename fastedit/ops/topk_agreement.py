"""``topk_agreement``: legacy locality, the agreement of two sets of logits on their first tokens."""

import torch
from torch import Tensor

from fastedit.ops._library import define, serve_with_triton
from fastedit.reference import topk_agreement as reference
from fastedit.reference.arguments import check_topk_agreement


def _fake(before: Tensor, after: Tensor, k: int) -> tuple[Tensor, Tensor]:
    check_topk_agreement(before, after, k)
    top1 = before.new_empty(before.shape[0], dtype=torch.float64)
    return top1, torch.empty_like(top1)


define(
    "topk_agreement",
    "(Tensor before, Tensor after, int k) -> (Tensor, Tensor)",
    reference.topk_agreement,
    _fake,
    "widest",
)
serve_with_triton("topk_agreement", "topk_agreement")


def topk_agreement(before: Tensor, after: Tensor, k: int = 10) -> tuple[Tensor, Tensor]:
    """Return, per token, whether the best token is the same in both, and the share of the k ranks that are.

    Locality as MMEdit measures it, arXiv 2310.08475: a swap of two ranks costs both. Equal logits rank in the order of
    their ids. No logit is copied, sorted or moved, and no gradient exists.

    Args:
        before: (T, V), float32 | bfloat16 | float16 | float64. Logits of the unedited model; -inf is a logit like any.
        after: (T, V), dtype of before. Logits of the edited model.
        k: 1 to V, at most 64.
    Returns:
        top1 (T,), 0 or 1, and topk_ranked (T,), in 0..1, float64. Both are 0 where a logit of the token is NaN.
    Raises:
        ValueError: shapes, dtypes or devices disagree, or k is out of range.
    """
    top1, ranked = torch.ops.fastedit.topk_agreement.default(before.detach(), after.detach(), k)
    return top1, ranked
