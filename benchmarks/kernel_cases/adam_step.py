"""adam_step_ with a clip: against torch's fused AdamW edit by edit, and copying as many bytes."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_cases._grouped import assert_equal
from benchmarks.kernel_cases._sized import Sized
from fastedit import ops

#: Planes of (B, P) that a step reads or writes: params, grads and both moments in, all but grads out.
PLANES = 7
SETTINGS: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "clip": 1.0}


def make_case(name: str, edits: int, size: int, device: str | None = None) -> dict[str, Any]:
    """Return the case of B edits of P parameters, all active; for a GPU beside one optimiser of all edits too."""
    place = device or "cpu"

    @cache
    def start() -> tuple[Tensor, Tensor]:
        make = torch.Generator(place).manual_seed(0)
        params, grads = (torch.randn(edits, size, generator=make, device=place) for _ in range(2))
        return params, grads.mul_(0.1)

    @cache
    def ours() -> tuple[Tensor, ...]:
        params, grads = start()
        zeros = torch.zeros_like(params)
        step = torch.zeros(edits, dtype=torch.int64, device=place)
        active = torch.ones(edits, dtype=torch.bool, device=place)
        rate = torch.full((edits,), 1e-3, dtype=torch.float64, device=place)
        return params.clone(), grads, zeros, zeros.clone(), step, rate, active

    @cache
    def theirs() -> tuple[list[Tensor], list[torch.optim.AdamW]]:
        rows = [torch.nn.Parameter(row.clone()) for row in start()[0]]
        same = {name: SETTINGS[name] for name in ("betas", "eps", "weight_decay")}
        return rows, [torch.optim.AdamW([row], lr=1e-3, fused=True, **same) for row in rows]

    @cache
    def batch() -> tuple[torch.nn.Parameter, torch.optim.AdamW]:
        params = torch.nn.Parameter(start()[0].clone())
        same = {name: SETTINGS[name] for name in ("betas", "eps", "weight_decay")}
        return params, torch.optim.AdamW([params], lr=1e-3, fused=True, **same)

    @cache
    def planes() -> tuple[Tensor, Tensor]:
        half = edits * size * PLANES // 2
        return torch.zeros(half, device=place), torch.zeros(half, device=place)

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

    def fused_batch() -> tuple[Tensor, ...]:
        # all edits as one parameter: right while none of them has stopped
        (params, optimizer), grads = batch(), start()[1]
        norms = torch.linalg.vector_norm(grads, dim=1, keepdim=True)
        params.grad = grads * (SETTINGS["clip"] / (norms + 1e-6)).clamp(max=1.0)
        optimizer.step()
        return (params,)

    def copy() -> tuple[Tensor, ...]:
        return (planes()[0].copy_(planes()[1]),)

    def check() -> None:
        ours.cache_clear()
        theirs.cache_clear()
        for _ in range(3):
            (params,), rows = run(), fused_loop()
        assert_equal((params,), (torch.stack([row.detach() for row in rows]),), tolerance=1e-5)

    many = {} if device is None else {"fused_batch": fused_batch}
    return {
        "name": name,
        "shapes": {"edits": edits, "parameters": size},
        "dtype": "float32",
        "bytes": PLANES * edits * size * 4,
        "run": run,
        "baselines": {**many, "fused_loop": fused_loop, "copy": copy},
        "check": check,
    }


CASES = [make_case("adam_step", 64, 200_000)]
CUDA_CASES = [Sized(make_case, "adam_step", {"edits": 256, "size": 2_000_000})]
