"""What the machine can do at best: matrix products and copies, measured in the same run as everything else."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from fastedit.engine.flops import Peak

#: Sides of the square products that are tried; the best counts, since a peak is what can be reached.
SIDES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}
COPY_MIB = {"cpu": 256, "cuda": 2048}


def measure_peak(dtype: str = "float32", device: str | torch.device = "cpu", *, seconds: float = 1.0) -> Peak:
    """Matrix-multiply peak of a dtype and copy bandwidth, with the number of threads that torch uses now.

    Args:
        dtype: "float32", "bfloat16", "float16" or "float64".
        device: where.
        seconds: about how long to measure.
    """
    place = torch.device(device)
    kind = getattr(torch, dtype)
    best = 0.0
    for side in SIDES[place.type]:
        a, b = (torch.randn(side, side, device=place).to(kind) for _ in range(2))
        out = torch.empty(side, side, device=place, dtype=kind)
        took = fastest(partial(torch.mm, a, b, out=out), place, seconds / (len(SIDES[place.type]) + 1))
        best = max(best, 2.0 * side**3 / took)
    source = torch.ones(COPY_MIB[place.type] << 18, device=place)
    target = torch.empty_like(source)
    took = fastest(partial(target.copy_, source), place, seconds / (len(SIDES[place.type]) + 1))
    return Peak(best / 1e9, 2.0 * source.numel() * 4 / took / 2**30, dtype)


def fastest(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Least time of one call, over at least three calls and about so many seconds."""
    run()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - start)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
