"""low_rank as `lora` and a sequence of its edits pass it: 8 ranks an edit, factors in float32 for any tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks.compiled_calls import Call, empty, label

D, D_OUT, EDITS, TOKENS = 4096, 11008, 16, 640
RANKS = (16,)


def _step(dtype: torch.dtype, rank: int) -> None:
    from fastedit.kernels.low_rank import low_rank, low_rank_backward

    x, grad = empty(TOKENS, D, dtype=dtype), empty(TOKENS, D_OUT, dtype=dtype)
    down, up = empty(EDITS, D, rank), empty(EDITS, rank, D_OUT)
    offsets = empty(EDITS + 1, dtype=torch.int64)
    low_rank(x, down, up, offsets)
    low_rank_backward(grad, x, down, up, offsets, [True, True, True])


def calls() -> list[Call]:
    """Return a step in every dtype and rank; only bfloat16 for the older target."""
    return [
        Call(f"r={rank}", label(dtype, torch.float32), partial(_step, dtype, rank), targets)
        for dtype, targets in ((torch.bfloat16, (80, 90)), (torch.float32, (90,)))
        for rank in RANKS
    ]


FORMS: dict[str, Any] = {}
