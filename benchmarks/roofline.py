"""What the machine can do at best: matrix products and copies, measured in the same run as everything else.

python benchmarks/roofline.py --device cuda            matrix products in every dtype, and copies
python benchmarks/roofline.py --device cuda --record   appended to benchmarks/results/
"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

if __name__ == "__main__":
    import _package  # noqa: F401

from benchmarks import record
from fastedit.engine.profiling.flops import Peak
from fastedit.engine.profiling.utilisation import TF32, measure_peak

DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16", "float16", TF32, "float32", "float64")}


def rows_of(peaks: list[Peak], device: str, scale: float = 1.0) -> list[record.Row]:
    """Return rows of the machine alone, a case for every dtype."""
    shared = record.origin(0, device)
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
