"""low_rank as `lora` and a sequence of its edits pass it: 8 ranks an edit, factors in float32 for any tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks.compiled_calls import Call, Form, empty, label

D, D_OUT, EDITS, TOKENS = 4096, 11008, 16, 640
WIDE = torch.float32


def _step(dtype: torch.dtype, factors: torch.dtype, rank: int) -> None:
    from fastedit.kernels.low_rank import low_rank, low_rank_backward

    x, grad = empty(TOKENS, D, dtype=dtype), empty(TOKENS, D_OUT, dtype=dtype)
    down, up = empty(EDITS, D, rank, dtype=factors), empty(EDITS, rank, D_OUT, dtype=factors)
    offsets = empty(EDITS + 1, dtype=torch.int64)
    low_rank(x, down, up, offsets)
    low_rank_backward(grad, x, down, up, offsets, [True, True, True])


def calls() -> list[Call]:
    """Return a step in every dtype and rank: of one edit, and of a sequence up to the width of the model."""
    table = (
        *((torch.bfloat16, WIDE, rank, (80, 90), False) for rank in (8, 512)),
        *((torch.bfloat16, WIDE, rank, (90,), rank == 64) for rank in (16, 64, 4096)),
        *((torch.float32, WIDE, rank, (90,), rank == 512) for rank in (8, 64, 512)),
        (torch.float16, WIDE, 8, (90,), False),
        # under autocast
        (torch.bfloat16, torch.bfloat16, 8, (90,), False),
    )
    return [
        Call(f"r={rank}", label(dtype, factors), partial(_step, dtype, factors, rank), targets, every)
        for dtype, factors, rank, targets, every in table
    ]


PRODUCTS = {80: "mma", 90: "wgmma"}
# 16 ranks are fewer rows than the instruction for four warps takes
FEW = {80: "mma", 90: "mma"}
FORMS: dict[str, Any] = {
    "_code_kernel": (
        Form(load=16, store=16),
        *(Form(products=FEW, only=f"r={rank} ") for rank in (8, 16)),
        *(Form(products=PRODUCTS, only=f"r={rank} ") for rank in (64, 512)),
    ),
    "_expand_kernel": Form(load=16, store=16, products=PRODUCTS),
    "_weight_kernel": Form(load=16, store=16, products=PRODUCTS),
}
