"""Figures from stored rows, and from nothing else.

python benchmarks/plot.py rows.json --out runs/figures
python benchmarks/plot.py benchmarks/results/*.jsonl --out runs/figures --html runs/report.html
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if __name__ == "__main__":
    import _package  # noqa: F401

from benchmarks import record
from benchmarks.record import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Dark for the engine, quiet for what it is compared with.
COLOURS = {"engine": "#1b4f9c", "plain_loop": "#a3a9b3", "peft": "#dd8b2f"}
#: One colour a phase, the same in every figure: colour-blind safe (Okabe and Ito), then greys.
PHASES = {
    "encode": "#cccccc",
    "prefix": "#56b4e9",
    "reference": "#999999",
    "forward": "#0072b2",
    "tail_forward": "#0072b2",
    "objective": "#f0e442",
    "backward": "#e69f00",
    "optimiser": "#009e73",
    "evaluation": "#cc79a7",
    "store": "#777777",
    "other": "#e8e8e8",
}
SWEPT = re.compile(r"(?P<base>.+)/(?P<field>\w+)=(?P<value>[^/]+)")


def latest(rows: Sequence[Row]) -> list[Row]:
    """Of every case, implementation and metric, the row measured last."""
    newest: dict[tuple[str, str, str], Row] = {}
    for row in sorted(rows, key=lambda row: row.time):
        newest[row.case, row.implementation, row.metric] = row
    return list(newest.values())


def speed(rows: Sequence[Row]) -> Figure | None:
    """Edits per second by case and implementation, p20 to p80 as whiskers, the ratio beside the bar."""
    found = [row for row in latest(rows) if row.metric == "edits_per_s"]
    return _bars(found, "edits per second", lambda row: "" if row.ratio is None else f"{row.ratio:.1f}x")


def memory(rows: Sequence[Row]) -> Figure | None:
    """Peak memory by case and implementation."""
    found = [row for row in latest(rows) if row.metric == "peak_memory_mib"]
    return _bars(found, "peak memory, MiB", lambda row: f"{row.value:,.0f}")


def _bars(rows: Sequence[Row], label: str, text: Callable[[Row], str]) -> Figure | None:
    if not rows:
        return None
    cases = list(dict.fromkeys(row.case for row in rows))
    names = _ordered({row.implementation for row in rows})
    figure, axes = _canvas(9, 1.2 + 0.28 * len(rows) + 0.15 * len(cases), label)
    ticks, place = [], 0.0
    shown: set[str] = set()
    for case in cases:
        start = place
        for name in names:
            for row in (r for r in rows if r.case == case and r.implementation == name):
                whisker = [[row.value - row.p20], [row.p80 - row.value]]
                axes.barh(
                    place,
                    row.value,
                    height=0.85,
                    color=COLOURS.get(name, "#5b8c5a"),
                    xerr=whisker,
                    error_kw={"lw": 0.8, "capsize": 2},
                    label=None if name in shown else name,
                )
                shown.add(name)
                axes.annotate(text(row), (row.p80, place), xytext=(5, 0), textcoords="offset points", va="center")
                place += 1
        ticks.append((start + place - 1) / 2)
        place += 0.6
    axes.set_yticks(ticks, cases)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.legend(frameon=False, loc="lower right")
    return figure


def phases(rows: Sequence[Row]) -> Figure | None:
    """Milliseconds per edit by phase, one stacked bar per case and implementation."""
    newest = latest(rows)
    totals = [row for row in newest if row.metric == "run_s"]
    if not totals:
        return None
    figure, axes = _canvas(9, 1.4 + 0.34 * len(totals), "milliseconds per edit (median run)")
    labels, seen = [], set()
    for place, total in enumerate(sorted(totals, key=lambda row: (row.case, row.implementation))):
        scale = 1000.0 / int(total.config["edits"])
        parts = {
            row.metric.removeprefix("phase_").removesuffix("_s"): row.value
            for row in newest
            if (row.case, row.implementation) == (total.case, total.implementation) and row.metric.startswith("phase_")
        }
        parts["other"] = max(0.0, total.value - sum(parts.values()))
        left = 0.0
        for name in sorted(parts, key=lambda name: list(PHASES).index(name) if name in PHASES else len(PHASES)):
            label = None if name in seen else name
            seen.add(name)
            colour = PHASES.get(name, "#555555")
            axes.barh(place, parts[name] * scale, left=left, color=colour, height=0.8, label=label)
            left += parts[name] * scale
        axes.annotate(f"{left:,.0f}", (left, place), xytext=(4, 0), textcoords="offset points", va="center")
        labels.append(f"{total.case}: {total.implementation}")
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.legend(frameon=False, ncols=6, loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=8)
    return figure


def scaling(rows: Sequence[Row]) -> dict[str, Figure]:
    """Edits per second along every swept field that is a number, by name of base case and field."""
    curves: dict[tuple[str, str], dict[str, list[tuple[float, Row]]]] = {}
    for row in latest(rows):
        swept = SWEPT.fullmatch(row.case)
        if swept is None or row.metric != "edits_per_s" or not swept["value"].replace(".", "", 1).isdigit():
            continue
        by_name = curves.setdefault((swept["base"], swept["field"]), {})
        by_name.setdefault(row.implementation, []).append((float(swept["value"]), row))
    figures = {}
    for (base, field), by_name in curves.items():
        figure, axes = _canvas(6, 4, "", grid="both")
        for name in _ordered(set(by_name)):
            points = sorted(by_name[name], key=lambda point: point[0])
            x = [value for value, _ in points]
            colour = COLOURS.get(name, "#5b8c5a")
            axes.plot(x, [row.value for _, row in points], "o-", color=colour, label=name)
            axes.fill_between(x, [r.p20 for _, r in points], [r.p80 for _, r in points], color=colour, alpha=0.2)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(field.replace("_", " "))
        axes.set_ylabel("edits per second")
        axes.set_title(base, loc="left")
        axes.legend(frameon=False)
        figures[f"{re.sub(r'[^A-Za-z0-9_.=-]+', '-', base).strip('-')}-{field}"] = figure
    return figures


def _ordered(names: set[str]) -> list[str]:
    """The engine first, then the others by name."""
    return sorted(names, key=lambda name: (name != "engine", name))


def _canvas(width: float, height: float, label: str, *, grid: Literal["both", "x"] = "x") -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_axisbelow(True)
    axes.grid(axis=grid, color="#e3e3e3", lw=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(label)
    return figure, axes


def figures_of(rows: Sequence[Row]) -> dict[str, Figure]:
    """Every figure that the rows have data for, by file stem."""
    made = {"speed": speed(rows), "phases": phases(rows), "memory": memory(rows)}
    found = {name: figure for name, figure in made.items() if figure is not None}
    return found | {f"scaling-{name}": figure for name, figure in scaling(rows).items()}


def main(
    files: Annotated[list[Path], typer.Argument(help="stored rows: .jsonl files or JSON lists", exists=True)],
    out: Annotated[Path, typer.Option(help="folder for PNG files")] = Path("runs/figures"),
    html: Annotated[Path | None, typer.Option(help="also one self-contained page with all of it")] = None,
) -> None:
    """Draw what stored rows say."""
    try:
        rows = [row for file in files for row in record.read(file)]
    except record.RowError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error
    figures = figures_of(rows)
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        path = out / f"{name}.png"
        figure.savefig(path, dpi=150)
        typer.echo(str(path))
    if html is not None:
        from benchmarks.report import write_page

        typer.echo(str(write_page(rows, figures, html)))


if __name__ == "__main__":
    typer.run(main)
