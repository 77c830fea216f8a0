"""low_rank forward and backward: against one product per edit, and padded batched products."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_cases._grouped import assert_equal, padded, rows, step, unpadded
from fastedit import ops
from fastedit.testing import low_rank_inputs


def make_case(name: str, lengths: tuple[int, ...], d: int, rank: int, d_out: int) -> dict[str, Any]:
    """Return the case of these tokens per edit."""

    @cache
    def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        x, down, up, offsets = low_rank_inputs(lengths, d, rank, d_out, torch.float32)
        grad = torch.randn(x.shape[0], d_out, generator=torch.Generator().manual_seed(1))
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
        "run": run,
        "baselines": {"bmm_padded": bmm_padded, "loop": loop},
        "check": lambda: assert_equal(run(), loop()),
    }


CASES = [
    make_case("low_rank", (40,) * 32, 1024, 8, 1024),
    make_case("low_rank_ragged", tuple(8 + 9 * b % 65 for b in range(32)), 1024, 8, 1024),
]
