"""``nearest_keys``: the exact k nearest of many stored keys for every query."""

from typing import Literal

import torch
from torch import Tensor

from fastedit.ops._library import define, serve_with_triton
from fastedit.reference import nearest_keys as reference
from fastedit.reference._precision import accumulation_dtype
from fastedit.reference.arguments import check_nearest_keys

Metric = Literal["cosine", "dot", "l2"]


def _fake(queries: Tensor, keys: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    check_nearest_keys(queries, keys, k, metric)
    values = queries.new_empty((queries.shape[0], k), dtype=accumulation_dtype(queries.dtype))
    return values, queries.new_empty((queries.shape[0], k), dtype=torch.int64)


define(
    "nearest_keys",
    "(Tensor queries, Tensor keys, int k, str metric) -> (Tensor, Tensor)",
    reference.nearest_keys,
    _fake,
    "widest",
)
serve_with_triton("nearest_keys", "nearest_keys")


def nearest_keys(queries: Tensor, keys: Tensor, k: int, metric: Metric = "cosine") -> tuple[Tensor, Tensor]:
    """Return the k keys nearest to every query, the best first, and how near they are.

    Exact: every key is compared with every query, without a (Q, K) matrix of scores. Equal values are ordered by lower
    index. A NaN value ranks behind all numbers. Vectors shorter than 1e-12 have cosine 0 with everything. The outputs
    are not differentiable.

    Args:
        queries: (Q, d), float32 | bfloat16 | float16 | float64. Sums are kept in float32 (float64 for float64).
        keys: (K, d), dtype of queries.
        k: how many, 1 <= k <= min(K, 64).
        metric: ``cosine`` or ``dot`` (inner product), largest first; ``l2``, the squared distance, smallest first.
    Returns:
        values (Q, k), float32 (float64 for float64); indices (Q, k), int64, rows of keys.
    Raises:
        ValueError: shapes, dtypes or devices disagree, k is out of range, or the metric is unknown.
    """
    values, indices = torch.ops.fastedit.nearest_keys.default(queries.detach(), keys.detach(), k, metric)
    return values, indices
