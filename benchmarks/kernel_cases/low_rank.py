"""low_rank forward and backward: against one product per edit, and padded batched products."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_cases._grouped import assert_equal, padded, rows, step, touched, unpadded
from benchmarks.kernel_cases._sized import Sized
from fastedit import ops
from fastedit.testing import low_rank_inputs

TOKENS = 40


def make_case(
    name: str, lengths: tuple[int, ...], d: int, rank: int, d_out: int, device: str = "cpu"
) -> dict[str, Any]:
    """Return the case of these tokens per edit."""

    @cache
    def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        x, down, up, offsets = low_rank_inputs(lengths, d, rank, d_out, torch.float32, device=device)
        grad = torch.randn(x.shape[0], d_out, generator=torch.Generator().manual_seed(1)).to(device)
        return x.requires_grad_(), down.requires_grad_(), up.requires_grad_(), offsets, grad

    def run() -> tuple[Tensor, ...]:
        x, down, up, offsets, grad = inputs()
        return step(lambda: ops.low_rank(x, down, up, offsets), (x, down, up), grad)

    def loop() -> tuple[Tensor, ...]:
        x, down, up, offsets, grad = inputs()
        return step(
            lambda: torch.cat([x[own] @ down[b] @ up[b] for b, own in enumerate(rows(offsets))]), (x, down, up), grad
        )

    def bmm_padded() -> tuple[Tensor, ...]:
        x, down, up, offsets, grad = inputs()
        return step(lambda: unpadded(torch.bmm(torch.bmm(padded(x, offsets), down), up), offsets), (x, down, up), grad)

    return {
        "name": name,
        "shapes": {"tokens": list(lengths), "d": d, "rank": rank, "d_out": d_out},
        "dtype": "float32",
        "bytes": touched(sum(lengths), len(lengths), d, d_out, rank * (d + d_out)),
        "inputs": inputs,
        "run": run,
        "baselines": {"bmm_padded": bmm_padded, "loop": loop},
        "check": lambda: assert_equal(run(), loop()),
    }


def make_even(name: str, edits: int, d: int, device: str) -> dict[str, Any]:
    """Return the case of 40 tokens an edit, where batched products need no padding."""
    made = make_case(name, (TOKENS,) * edits, d, 8, d, device)

    def bmm() -> tuple[Tensor, ...]:
        x, down, up, _, grad = made["inputs"]()
        return step(lambda: torch.bmm(torch.bmm(x.view(edits, TOKENS, d), down), up).view(-1, d), (x, down, up), grad)

    return {**made, "baselines": {"bmm": bmm, "loop": made["baselines"]["loop"]}}


CASES = [
    make_case("low_rank", (40,) * 32, 1024, 8, 1024),
    make_case("low_rank_ragged", tuple(8 + 9 * b % 65 for b in range(32)), 1024, 8, 1024),
]
CUDA_CASES = [Sized(make_even, "low_rank", {"edits": 256, "d": 4096})]
