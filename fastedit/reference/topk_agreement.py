"""Definition of ``topk_agreement``: whether two sets of logits rank the same tokens first."""

import torch
from torch import Tensor

from fastedit.reference.arguments import check_topk_agreement


def topk_agreement(before: Tensor, after: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return top1 (T,) and topk_ranked (T,), float64 in 0..1."""
    check_topk_agreement(before, after, k)
    # a stable descending sort leaves equal logits in the order of their ids; -0 equals 0
    first, second = (torch.sort(t, dim=-1, descending=True, stable=True).indices[:, :k] for t in (before, after))
    sound = ~(before.isnan().any(-1) | after.isnan().any(-1))
    same = (first == second) & sound[:, None]
    return same[:, 0].double(), same.double().mean(-1)
