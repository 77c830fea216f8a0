"""topk_agreement as locality is scored: logits of a large vocabulary before and after an edit, the 10 best."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.compiled_calls import Call, Form, empty, label

TOKENS, VOCABULARY, K = 256, 151_936, 10


def _score(dtype: torch.dtype) -> None:
    from fastedit.kernels.topk_agreement import topk_agreement

    topk_agreement(*(empty(TOKENS, VOCABULARY, dtype=dtype) for _ in range(2)), K)


def calls() -> list[Call]:
    """Return a call for every dtype."""
    return [
        Call("V=151936", label(dtype), partial(_score, dtype), targets)
        for dtype, targets in ((torch.bfloat16, (80, 90)), (torch.float32, (90,)))
    ]


# its reductions go over shared memory; four programs of eight warps share a multiprocessor
FORMS = {"_agreement_kernel": Form(load=16, registers=128)}
