"""Definition of ``nearest_keys``: all scores, sorted."""

import torch
from torch import Tensor

from fastedit.reference._precision import widen
from fastedit.reference.arguments import check_nearest_keys

# Below this norm a vector has no direction: its cosine with anything is 0.
SMALLEST_NORM = 1e-12


def nearest_keys(queries: Tensor, keys: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    """Return values (Q, k) in the accumulation dtype and indices (Q, k)."""
    check_nearest_keys(queries, keys, k, metric)
    queries, keys = widen(queries), widen(keys)
    if metric == "cosine":
        queries = queries / queries.norm(dim=1, keepdim=True).clamp(min=SMALLEST_NORM)
        keys = keys / keys.norm(dim=1, keepdim=True).clamp(min=SMALLEST_NORM)
    if metric == "l2":
        score = -(queries[:, None, :] - keys[None, :, :]).square().sum(-1)
    else:
        score = queries @ keys.T
    # sort puts NaN first: they take the last places, in the order of their keys
    nan = score.isnan()
    order = score.masked_fill(nan, 0.0).sort(dim=1, descending=True, stable=True).indices
    order = order.gather(1, nan.gather(1, order).to(torch.uint8).sort(dim=1, stable=True).indices)
    indices = order[:, :k].contiguous()
    values = score.gather(1, indices)
    return -values if metric == "l2" else values, indices
