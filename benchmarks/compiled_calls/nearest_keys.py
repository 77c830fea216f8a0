"""nearest_keys as `ike` and `unike` pass it: a few queries against stored vectors of one dtype."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks.compiled_calls import NAMES, Call, Form, empty

QUERIES, KEYS, D, BEST = 64, 20_000, 4096, 10


def _search(dtype: torch.dtype, metric: str) -> None:
    from fastedit.kernels.nearest_keys import nearest_keys

    nearest_keys(empty(QUERIES, D, dtype=dtype), empty(KEYS, D, dtype=dtype), BEST, metric)


def calls() -> list[Call]:
    """Return a search by cosine, which the engine asks for, and by distance, in every dtype."""
    return [
        Call(metric, NAMES[dtype], partial(_search, dtype, metric), targets)
        for dtype, targets in ((torch.bfloat16, (80, 90)), (torch.float32, (90,)))
        for metric in ("cosine", "l2")
    ]


FORMS: dict[str, Any] = {
    "_scan_kernel": (Form(load=16), Form(products={80: "mma", 90: "mma"}, only="bf16")),
    "_merge_kernel": Form(),
    "_distance_kernel": Form(load=16),
}
