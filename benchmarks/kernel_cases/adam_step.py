"""adam_step_ with a clip: against torch's fused AdamW edit by edit, and copying as many bytes."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_cases._grouped import assert_equal
from fastedit import ops

#: Planes of (B, P) that a step reads or writes: params, grads and both moments in, all but grads out.
PLANES = 7
SETTINGS: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "clip": 1.0}


def make_case(name: str, edits: int, size: int) -> dict[str, Any]:
    """Return the case of B edits of P parameters, all active."""

    @cache
    def start() -> tuple[Tensor, Tensor]:
        make = torch.Generator().manual_seed(0)
        return torch.randn(edits, size, generator=make), 0.1 * torch.randn(edits, size, generator=make)

    @cache
    def ours() -> tuple[Tensor, ...]:
        params, grads = start()
        zeros = torch.zeros_like(params)
        step, active = torch.zeros(edits, dtype=torch.int64), torch.ones(edits, dtype=torch.bool)
        rate = torch.full((edits,), 1e-3, dtype=torch.float64)
        return params.clone(), grads, zeros, zeros.clone(), step, rate, active

    @cache
    def theirs() -> tuple[list[Tensor], list[torch.optim.AdamW]]:
        rows = [torch.nn.Parameter(row.clone()) for row in start()[0]]
        same = {name: SETTINGS[name] for name in ("betas", "eps", "weight_decay")}
        return rows, [torch.optim.AdamW([row], lr=1e-3, fused=True, **same) for row in rows]

    @cache
    def planes() -> tuple[Tensor, Tensor]:
        return torch.zeros(edits * size * PLANES // 2), torch.zeros(edits * size * PLANES // 2)

    def run() -> tuple[Tensor, ...]:
        ops.adam_step_(*ours(), **SETTINGS)
        return (ours()[0],)

    def fused_loop() -> tuple[Tensor, ...]:
        rows, optimizers = theirs()
        for row, grad, optimizer in zip(rows, start()[1], optimizers, strict=True):
            # clipping is in place: every step clips the gradient anew
            row.grad = grad.clone()
            torch.nn.utils.clip_grad_norm_([row], SETTINGS["clip"])
            optimizer.step()
        return tuple(rows)

    def copy() -> tuple[Tensor, ...]:
        return (planes()[0].copy_(planes()[1]),)

    def check() -> None:
        ours.cache_clear()
        theirs.cache_clear()
        for _ in range(3):
            (params,), rows = run(), fused_loop()
        assert_equal((params,), (torch.stack([row.detach() for row in rows]),), tolerance=1e-5)

    return {
        "name": name,
        "shapes": {"edits": edits, "parameters": size},
        "dtype": "float32",
        "run": run,
        "baselines": {"fused_loop": fused_loop, "copy": copy},
        "check": check,
    }


CASES = [make_case("adam_step", 64, 200_000)]
