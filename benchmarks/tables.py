"""What a comparison looks like on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.canvas import plain
from benchmarks.harness import Comparison
from benchmarks.implementations import ENGINE
from benchmarks.record import Row, spread


def show(found: Comparison, console: Console) -> None:
    """Print a finished case."""
    case = found.case
    console.print(
        f"[bold]{case.name}[/bold]: {case.method}, {case.where}, {case.steps} steps, {case.edits} edits, "
        f"batch {case.batch_size}, {case.model}, {case.dtype}"
        + (f", {case.quantize}" if case.quantize != "none" else "")
    )
    if found.gate.largest:
        parts = ", ".join(f"{name} {largest:.1e}" for name, largest in found.gate.largest.items())
        console.print(
            f"equal to {found.gate.reference}: deltas in float64 within {parts} ({found.gate.model}); equal scores"
        )
    peak = found.peak
    console.print(
        f"machine: {peak.matmul_gflop_per_s:,.0f} GFLOP/s matrix products in {peak.dtype}, "
        f"{peak.copy_gib_per_s:.1f} GiB/s copies; model loaded in {found.load_s:.1f} s; "
        f"{found.parameters / 1e6:,.3g} M parameters; necessary {plain(found.necessary.total / 1e9 / case.edits)} "
        "GFLOP per edit"
    )
    console.print(_speed(found))
    console.print(_phases(found))
    right = {name: runs.accuracy for name, runs in found.timed.items() if runs.accuracy is not None}
    if right:
        console.print("target tokens right: " + ", ".join(f"{name} {share:.3f}" for name, share in right.items()))


def _speed(found: Comparison) -> Table:
    table = Table(title="speed", title_justify="left")
    # On a narrow terminal names are folded, never numbers cut.
    table.add_column("implementation", overflow="fold")
    for heading in ("edits/s", "p20", "p80", "ratio", "NFU", "peak MiB"):
        table.add_column(heading, justify="right", no_wrap=True)
    rates = {row.implementation: row for row in found.rows if row.metric == "edits_per_s"}
    for name, runs in found.timed.items():
        row = rates[name]
        memory = runs.memory
        table.add_row(
            name,
            plain(row.value),
            plain(row.p20),
            plain(row.p80),
            "1" if row.ratio is None else f"{row.ratio:.2f}",
            f"{spread(runs.nfu())[0]:.3f}",
            "-" if memory is None else f"{memory.peak_mib:,.0f}",
            style="bold" if name == ENGINE else "",
        )
    return table


def _phases(found: Comparison) -> Table:
    """Milliseconds per edit, medians over the runs."""
    names = list(dict.fromkeys(phase for runs in found.timed.values() for phase in runs.phase_names()))
    table = Table("ms per edit", title="where the time goes", title_justify="left")
    for name in found.timed:
        table.add_column(name, justify="right", overflow="fold")
    for phase in [*names, "other", "all"]:
        cells = []
        for runs in found.timed.values():
            values = [_phase(phase, phases, total) for phases, total in zip(runs.phases, runs.seconds, strict=True)]
            scale = 1000.0 / runs.edits
            known = phase in ("other", "all") or phase in runs.phase_names()
            cells.append(f"{spread(values)[0] * scale:,.1f}" if known else "-")
        table.add_row(phase, *cells, style="bold" if phase == "all" else "")
    return table


def _phase(name: str, phases: dict[str, float] | object, total: float) -> float:
    assert isinstance(phases, dict)
    if name == "all":
        return total
    return total - sum(phases.values()) if name == "other" else float(phases.get(name, 0.0))


def show_changes(pairs: Sequence[tuple[Row, Row]], console: Console) -> None:
    """Print stored rows of two commits side by side."""
    table = Table("case", "implementation", title="ratio to the baseline, before and after", title_justify="left")
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right")
    for before, after in pairs:
        assert before.ratio is not None
        assert after.ratio is not None
        change = after.ratio / before.ratio - 1
        table.add_row(
            after.case, after.implementation, f"{before.ratio:.2f}", f"{after.ratio:.2f}", f"{change:+.1%}",
            style="red" if change < 0 else "",
        )  # fmt: skip
    console.print(table)
