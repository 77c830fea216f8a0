"""The rows of a run on one page of text: the machine, the ops beside their baselines, the models beside a plain loop.

python benchmarks/summary.py                               the newest file of benchmarks/results/, latest rows
python benchmarks/summary.py rows.jsonl --since 2026-01-31T12:00:00+00:00
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

if __name__ == "__main__":
    import _package  # noqa: F401

from benchmarks import record
from benchmarks.kernel_model import predictions
from benchmarks.kernels import OURS, floor_text
from benchmarks.record import Row, latest

ENGINE = "engine"
#: Phases of the engine that a line names, the longest first.
PHASES = 3


def lines(rows: Sequence[Row]) -> list[str]:
    """Return the page, line by line.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("summary: at least one row (got none)")
    by_case: dict[str, list[Row]] = {}
    for row in latest(rows):
        by_case.setdefault(row.case, []).append(row)
    parts = [machine_lines(rows[-1], by_case)]
    kernels = [kernel_line(found) for found in by_case.values() if _find(found, OURS, "run_s")]
    if kernels:
        parts.append(
            ["", "ops: median ms, share of the machine, extra MiB, predicted ms; others as times the op's", *kernels]
        )
    models = [line for found in by_case.values() if _find(found, ENGINE, "edits_per_s") for line in model_lines(found)]
    if models:
        parts.append(["", "edits: speed, ratio to the loop, NFU, peak MiB; longest phases in ms an edit", *models])
    return [line for part in parts for line in part]


def machine_lines(row: Row, by_case: dict[str, list[Row]]) -> list[str]:
    """Name the machine, and what it does at best in every dtype that was measured alone."""
    machine, versions = row.machine, row.versions
    if "gpu" in machine:
        named = f"{machine['gpu']}, driver {machine['driver']}, CUDA {machine['cuda']}"
    else:
        named = f"{machine.get('cpu')}, {machine.get('threads')} threads"
    found = [f"{named}, torch {versions.get('torch')}, triton {versions.get('triton', 'absent')}, commit {row.commit}"]
    for case, own in by_case.items():
        if case.startswith("machine_"):
            peak, copies = (_find(own, "machine", m) for m in ("matmul_peak_gflop_per_s", "copy_bandwidth_gib_per_s"))
            if peak and copies:
                tera, tebi = peak.value / 1e3, copies.value / 2**10
                found.append(f"  {case}: {tera:,.1f} TFLOP/s, copies {tebi:.2f} TiB/s")
    return found


def kernel_line(rows: Sequence[Row]) -> str:
    """Return one case of an op."""
    own = _find(rows, OURS, "run_s")
    if own is None:
        raise ValueError(f"summary: a case has a row of the op itself (got case={rows[0].case})")
    memory = _find(rows, OURS, "working_memory_mib")
    mib = "" if memory is None else f"{memory.value:,.0f} MiB"
    others = [f"{row.implementation} {row.ratio:.2f}" for row in rows if row.metric == "run_s" and row.ratio]
    served = str(own.config.get("served_by", ""))
    cells = f"{own.case:<38} {served:<9} {own.value * 1e3:>10.3f} {floor_text(rows, OURS):>11} {mib:>11}"
    if own.case in predictions():
        # of an H200, docs/kernels.md
        floor, likely = predictions()[own.case]
        cells += f" floor {floor * 1e3:.3f}" + ("" if likely is None else f" likely {likely * 1e3:.3f}")
    return f"{cells} | {', '.join(others)}"


def model_lines(rows: Sequence[Row]) -> list[str]:
    """Return a line for every implementation of a case, the engine's first."""
    found = []
    speeds = [row for row in rows if row.metric == "edits_per_s"]
    for row in sorted(speeds, key=lambda row: row.implementation != ENGINE):
        nfu, memory = (_find(rows, row.implementation, m) for m in ("nfu", "peak_memory_mib"))
        own = (other for other in rows if other.implementation == row.implementation)
        phases = sorted((r for r in own if record.PHASE_METRIC.fullmatch(r.metric)), key=lambda r: -r.value)
        edits = int(row.config.get("edits", 1))
        spent = ", ".join(f"{r.metric[6:-2]} {1e3 * r.value / edits:.1f}" for r in phases[:PHASES])
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}x"
        share = "" if nfu is None else f"{nfu.value:.3f}"
        mib = "" if memory is None else f"{memory.value:,.0f}"
        name = row.case if len(row.case) <= 32 else row.case[:31] + "…"
        found.append(f"{name:<32} {row.implementation:<11} {row.value:>9.3f} {ratio:>8} {share:>6} {mib:>8} | {spent}")
    return found


def _find(rows: Sequence[Row], implementation: str, metric: str) -> Row | None:
    return next((row for row in rows if row.implementation == implementation and row.metric == metric), None)


def newest() -> list[Path]:
    """Return the file of stored rows that changed last, if there is one."""
    return sorted(record.RESULTS.glob("*.jsonl.gz"), key=lambda path: path.stat().st_mtime)[-1:]


def main(
    files: Annotated[list[Path] | None, typer.Argument(help="stored rows; the newest file if absent")] = None,
    since: Annotated[str | None, typer.Option(help="only rows from this time on, ISO 8601")] = None,
) -> None:
    """Print one page of stored rows."""
    rows = [row for path in files or newest() for row in record.read(path)]
    if since is not None:
        rows = [row for row in rows if datetime.fromisoformat(row.time) >= datetime.fromisoformat(since)]
    for line in lines(rows):
        print(line)


if __name__ == "__main__":
    typer.run(main)
