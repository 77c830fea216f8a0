"""How much of a machine editing uses: its measured peak, and the operations of a run that are necessary."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from fastedit.backbone import EditableModel
from fastedit.backbone.branches import branches
from fastedit.backbone.cpu_linear import choose_linear, onednn_product
from fastedit.deltas import DeltaSpec
from fastedit.engine.profiling.flops import FlopCounter, NecessaryFlops, Peak
from fastedit.fitting.prepared import can_branch, leaders
from fastedit.fitting.solver import FitOutcome
from fastedit.fitting.views import ViewSource
from fastedit.objectives import Role

#: Sides of the square products that are tried; the best counts, since a peak is what can be reached.
SIDES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}
COPY_MIB = {"cpu": 256, "cuda": 2048}
#: float32 operands rounded to 10 bits of mantissa inside the matrix units of a GPU.
TF32 = "tf32"
#: Edits whose rows are counted together; the number changes nothing.
COUNTED = 64


def measure_peak(
    dtype: str = "float32", device: str | torch.device = "cpu", *, seconds: float = 1.0, scale: float = 1.0
) -> Peak:
    """Matrix-multiply peak of a dtype and copy bandwidth, with the number of threads that torch uses now.

    Args:
        dtype: "float32", "bfloat16", "float16", "float64", or "tf32" on a GPU; float32 means all its bits.
        device: where.
        seconds: about how long to measure.
        scale: sizes times this; below 1 the result means nothing.
    """
    place = torch.device(device)
    kind = torch.float32 if dtype == TF32 else getattr(torch, dtype)
    best = 0.0
    for full in SIDES[place.type]:
        side = max(64, round(full * scale))
        a, b = (torch.randn(side, side, device=place).to(kind) for _ in range(2))
        out = torch.empty(side, side, device=place, dtype=kind)
        products: list[Callable[[], object]] = [partial(torch.mm, a, b, out=out)]
        if choose_linear("auto", kind, place) == "onednn":
            # the other library that the engine multiplies by: a peak is that of the faster one
            products.append(partial(onednn_product, a, b))
        share = seconds / ((len(SIDES[place.type]) + 1) * len(products))
        with _precision("high" if dtype == TF32 else "highest"):
            took = min(fastest(product, place, share) for product in products)
        best = max(best, 2.0 * side**3 / took)
    source = torch.ones(max(1, round(COPY_MIB[place.type] * scale)) << 18, device=place)
    target = torch.empty_like(source)
    took = fastest(partial(target.copy_, source), place, seconds / (len(SIDES[place.type]) + 1))
    return Peak(best / 1e9, 2.0 * source.numel() * 4 / took / 2**30, dtype)


@contextmanager
def _precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


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


def necessary_flops(
    model: EditableModel,
    spec: DeltaSpec,
    source: ViewSource,
    roles: Sequence[Role],
    outcomes: Sequence[FitOutcome],
    beside: Sequence[Role] = (),
) -> NecessaryFlops:
    """Operations that fitting edits, which ended like this, cannot do without.

    Args:
        model: frozen. spec: of their deltas. source: their training views. roles: of the views they were fitted on.
        outcomes: one per edit, in order.
        beside: roles of views without loss.
    """
    counter = FlopCounter(model, spec)
    total = NecessaryFlops(0, 0, 0, 0, 0)
    for first in range(0, len(outcomes), COUNTED):
        ended = outcomes[first : first + COUNTED]
        views = [(n, view) for n in range(len(ended)) for view in source.views(first + n, tuple(roles))]
        encoded = model.encode([view.query for _, view in views], answers=True)
        compared = [row for row, (_, view) in enumerate(views) if view.role in beside]
        out = [row for row, (_, view) in enumerate(views) if view.role >= Role.TEXT_LOCALITY]
        reference = [row for row in out if row not in compared]
        off = branches(encoded, leaders([view.role for _, view in views])) if can_branch(model, spec) else {}
        begins = {row: shared for row, (_, shared) in off.items()}
        total = total + counter.batch(encoded, [edit for edit, _ in views], ended, reference, compared, begins)
    return total
