"""nearest_keys as `ike` and `unike` pass it: some queries against stored vectors of one dtype."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks.compiled_calls import NAMES, Call, Form, empty

QUERIES, KEYS, D, BEST = 64, 20_000, 4096, 10


def _search(dtype: torch.dtype, metric: str, queries: int = QUERIES, best: int = BEST) -> None:
    from fastedit.kernels.nearest_keys import nearest_keys

    nearest_keys(empty(queries, D, dtype=dtype), empty(KEYS, D, dtype=dtype), best, metric)


def calls() -> list[Call]:
    """Return searches by cosine, which the engine asks for, by distance, of one query, and for 64 keys."""
    bf16, fp32 = torch.bfloat16, torch.float32
    table = (
        ("cosine", bf16, {}, (80, 90), False),
        ("cosine", fp32, {}, (80,), False),
        ("cosine", fp32, {}, (90,), True),
        ("l2", fp32, {}, (90,), False),
        ("one query", fp32, {"queries": 1}, (90,), False),
        ("64 best", bf16, {"best": 64}, (90,), False),
    )
    return [
        Call(name, NAMES[dtype], partial(_search, dtype, "l2" if name == "l2" else "cosine", **sizes), targets, every)
        for name, dtype, sizes, targets, every in table
    ]


FORMS: dict[str, Any] = {
    "_scan_kernel": Form(load=16, products={80: "mma", 90: "wgmma"}),
    "_choose_kernel": Form(load=16),
    # they read only where the bound does not tell
    "_search_kernel": Form(),
    "_merge_kernel": Form(),
}
