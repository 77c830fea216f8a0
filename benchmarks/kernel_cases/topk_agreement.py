"""topk_agreement: against two topk, and two stable sorts, which alone rank ties by id."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_cases._grouped import assert_equal
from benchmarks.kernel_cases._sized import Sized
from fastedit import ops
from fastedit.reference import topk_agreement as reference
from fastedit.testing import topk_agreement_inputs


def _drawn(tokens: int, vocabulary: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Return what topk_agreement_inputs does, drawn on the device."""
    make = torch.Generator(device).manual_seed(0)
    before, drift = (torch.randn(tokens, vocabulary, generator=make, device=device) for _ in range(2))
    before *= 8.0
    return before.round().div(4.0).to(dtype), drift.mul_(2.0).add_(before).round_().div_(4.0).to(dtype)


def make_case(
    name: str, tokens: int, vocabulary: int, k: int, dtype: torch.dtype, device: str | None = None
) -> dict[str, Any]:
    """Return the case, its inputs drawn on the device if one is named."""

    @cache
    def inputs() -> tuple[Tensor, Tensor]:
        if device is not None:
            return _drawn(tokens, vocabulary, dtype, device)
        return topk_agreement_inputs(tokens, vocabulary, dtype)

    def run() -> tuple[Tensor, Tensor]:
        return ops.topk_agreement(*inputs(), k)

    def topk() -> tuple[Tensor, Tensor]:
        first, second = (logits.topk(k, dim=-1).indices for logits in inputs())
        same = (first == second).double()
        return same[:, 0], same.mean(-1)

    def stable_sort() -> tuple[Tensor, Tensor]:
        return reference.topk_agreement(*inputs(), k)

    return {
        "name": name,
        "shapes": {"tokens": tokens, "vocabulary": vocabulary, "k": k},
        "dtype": str(dtype).removeprefix("torch."),
        "bytes": 2 * tokens * vocabulary * dtype.itemsize,
        "run": run,
        "baselines": {"topk": topk, "stable_sort": stable_sort},
        "check": lambda: assert_equal(run(), stable_sort(), tolerance=0.0),
    }


CASES = [
    make_case("topk_agreement", 256, 32000, 10, torch.float32),
    make_case("topk_agreement_bf16", 128, 151936, 10, torch.bfloat16),
]
CUDA_CASES = [
    Sized(make_case, "topk_agreement_bf16", {"tokens": 4096, "vocabulary": 151_936}, {"k": 10, "dtype": torch.bfloat16})
]
