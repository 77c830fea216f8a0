"""risk as objectives pass it: logits of the model's dtype, references of the same, both contiguous."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.compiled_calls import Call, Form, empty, label

TOKENS, VOCABULARY, SEGMENTS = 640, 151_936, 32


def _step(kind: str, dtype: torch.dtype) -> None:
    from fastedit.kernels.risk import risk, risk_backward

    logits = empty(TOKENS, VOCABULARY, dtype=dtype)
    target = empty(TOKENS, dtype=torch.int64) if kind == "ce" else empty(TOKENS, VOCABULARY, dtype=dtype)
    segments = empty(TOKENS, dtype=torch.int64)
    on = [empty(SEGMENTS) for _ in range(2)]
    stats = risk(logits, target, segments, SEGMENTS, kind)[2]
    risk_backward(*on, logits, target, segments, stats, kind)


def calls() -> list[Call]:
    """Return a call for every kind in the dtype of most models, and the costliest of the others in float32."""
    kinds = [("ce", torch.bfloat16, (80, 90)), ("forward_kl", torch.bfloat16, (90,))]
    kinds += [("reverse_kl", torch.bfloat16, (90,)), ("reverse_kl", torch.float32, (90,))]
    return [Call(kind, label(dtype), partial(_step, kind, dtype), targets) for kind, dtype, targets in kinds]


FORMS = {
    "_sums_kernel": Form(load=16, registers=128),
    "_token_kernel": Form(),
    "_mean_kernel": Form(),
    "_count_kernel": Form(load=16),
    "_gradient_kernel": Form(load=16, store=16, registers=64),
}
