"""What the machine can do at best: matrix products and copies, measured in the same run as everything else.

python benchmarks/roofline.py --device cuda            matrix products in every dtype, and copies
python benchmarks/roofline.py --device cuda --record   appended to benchmarks/results/
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated

import torch
import typer
from rich.console import Console

if __name__ == "__main__":
    import _package  # noqa: F401

from benchmarks import record
from fastedit.backbone.products import choose_linear, onednn_product
from fastedit.engine import provenance
from fastedit.engine.flops import Peak

#: Sides of the square products that are tried; the best counts, since a peak is what can be reached.
SIDES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}
COPY_MIB = {"cpu": 256, "cuda": 2048}
#: float32 operands rounded to 10 bits of mantissa inside the matrix units of a GPU.
TF32 = "tf32"
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16", "float16", TF32, "float32", "float64")}


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


def rows_of(peaks: list[Peak], device: str, scale: float = 1.0) -> list[record.Row]:
    """Return rows of the machine alone, a case for every dtype."""
    shared = (
        record.machine(device),
        provenance.versions(),
        record.commit_with_changes(provenance.commit()),
        0,
        provenance.utc_now(),
    )
    suffix = "" if scale == 1.0 else f"@{scale:g}"

    def row(peak: Peak, metric: str, value: float) -> record.Row:
        config = {"dtype": peak.dtype, "device": device}
        unit = record.METRICS[metric]
        case = f"machine_{peak.dtype}{suffix}"
        return record.Row(case, "machine", metric, unit, value, value, value, None, None, config, *shared)

    rows = [row(peak, "matmul_peak_gflop_per_s", peak.matmul_gflop_per_s) for peak in peaks]
    return rows + [row(peak, "copy_bandwidth_gib_per_s", peak.copy_gib_per_s) for peak in peaks]


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    scale: Annotated[float, typer.Option(help="sizes times this; below 1 the result means nothing")] = 1.0,
    seconds: Annotated[float, typer.Option(help="for each dtype")] = 1.0,
    store: Annotated[bool, typer.Option("--record", help="append the rows to benchmarks/results/")] = False,
) -> None:
    """Measure copies, and matrix products in every dtype."""
    console = Console()
    peaks = [measure_peak(dtype, device, seconds=seconds, scale=scale) for dtype in DTYPES[device]]
    for peak in peaks:
        console.print(f"{peak.dtype}: {peak.matmul_gflop_per_s:,.0f} GFLOP/s, copies {peak.copy_gib_per_s:,.1f} GiB/s")
    if store:
        console.print(f"rows appended to {record.append(rows_of(peaks, device, scale)).name}")


if __name__ == "__main__":
    typer.run(main)
