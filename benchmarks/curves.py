"""Figures of lines: speed, NFU and memory along a swept field, and a long run over its edits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks import record
from benchmarks.bars import is_number
from benchmarks.canvas import SWEPT, canvas, canvases, colour, ordered, short, stem
from benchmarks.record import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TENTH = re.compile(r"(?P<base>endurance.*)/tenth=(?P<number>\d+)")


@dataclass(frozen=True)
class Point:
    """One value of a sweep: where it is on the x axis, what it is called, and its row."""

    x: float
    name: str
    row: Row


#: implementation -> points, x rising
Curves = dict[str, list[Point]]


def sweep_curves(rows: Sequence[Row], metric: str) -> dict[tuple[str, str], Curves]:
    """Curves of a metric by (base case, field), for fields that are numbers and for models by their size."""
    newest = [row for row in record.latest(rows) if "endurance" not in row.case]
    sizes = {row.case: row.value for row in newest if row.metric == "parameters"}
    found: dict[tuple[str, str], Curves] = {}
    for row in newest:
        swept = SWEPT.fullmatch(row.case)
        if swept is None or row.metric != metric or row.implementation == "machine":
            continue
        if swept["field"] == "model":
            x = sizes.get(row.case)
        else:
            x = float(swept["value"]) if is_number(swept["value"]) else None
        if x is not None:
            own = found.setdefault((swept["base"], swept["field"]), {}).setdefault(row.implementation, [])
            own.append(Point(x, swept["value"], row))
    for curves in found.values():
        for own in curves.values():
            own.sort(key=lambda point: point.x)
    return found


def scaling(rows: Sequence[Row]) -> dict[str, Figure]:
    """Edits per second, and NFU below where it was measured, along every swept field that is a number."""
    rates, shares = sweep_curves(rows, "edits_per_s"), sweep_curves(rows, "nfu")
    figures = {}
    for key, curves in rates.items():
        used = shares.get(key, {})
        if used:
            figure, (axes, below) = canvases(6.4, 5.6, rows=2)
            _draw(below, used, field=key[1])
            below.set_ylabel("NFU")
            below.set_ylim(bottom=0)
        else:
            figure, axes = canvas(6.4, 4, grid="both")
        _draw(axes, curves, field=key[1])
        axes.set_xlabel("" if used else axes.get_xlabel())
        _log(axes)
        axes.set_ylabel("edits per second")
        _title(figure, axes, key[0])
        figures[_name(*key)] = figure
    return figures


def memory_scaling(rows: Sequence[Row]) -> dict[str, Figure]:
    """Peak memory (solid) and working memory (dashed) along every swept field that is a number."""
    peaks, working = sweep_curves(rows, "peak_memory_mib"), sweep_curves(rows, "working_memory_mib")
    figures = {}
    for key, curves in peaks.items():
        figure, axes = canvas(6.4, 4, grid="both")
        _draw(axes, curves, field=key[1], suffix=", peak")
        _draw(axes, working.get(key, {}), field=key[1], suffix=", working", style="o--")
        axes.set_ylabel("MiB")
        axes.set_ylim(bottom=0)
        _title(figure, axes, key[0])
        figures[_name(*key)] = figure
    return figures


def _draw(axes: Axes, curves: Curves, *, field: str, suffix: str = "", style: str = "o-") -> None:
    """Every implementation's line, p20 to p80 as a band, ticks at the values that were run."""
    names = set(curves)
    for name in ordered(names):
        x = [point.x for point in curves[name]]
        tone = colour(name, names)
        label = short(name, 32) + suffix
        axes.plot(x, [point.row.value for point in curves[name]], style, ms=4.5, color=tone, label=label)
        low, high = [point.row.p20 for point in curves[name]], [point.row.p80 for point in curves[name]]
        axes.fill_between(x, low, high, color=tone, alpha=0.2, lw=0)
    places = {point.x: point for own in curves.values() for point in own}
    if not places:
        return
    axes.set_xscale("log", base=2)
    axes.minorticks_off()
    slant = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if field == "model" else {}
    axes.set_xticks(sorted(places), [_tick(places[x], field) for x in sorted(places)], fontsize=8, **slant)
    axes.set_xlabel("parameters" if field == "model" else field.replace("_", " "))


def _tick(point: Point, field: str) -> str:
    if field != "model":
        return f"{point.x:g}"
    return f"{short(point.name.removeprefix('random:'), 20)} {_count(point.x)}"


def _count(number: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"


def _log(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers on it."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _place: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _title(figure: Figure, axes: Axes, base: str) -> None:
    axes.set_title(short(base, 70), loc="left", fontsize=10)
    # Below the axes: inside of them it would cover a line
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, fontsize=8, ncols=3, loc="outside lower center")


def _name(base: str, field: str) -> str:
    return f"{stem(base)}-{field}"


def endurance(rows: Sequence[Row]) -> dict[str, Figure]:
    """Edits per second and resident memory over the edits of every long run."""
    tables: dict[str, dict[str, dict[int, Row]]] = {}
    for row in record.latest(rows):
        tenth = _TENTH.fullmatch(row.case)
        if tenth is not None:
            tables.setdefault(tenth["base"], {}).setdefault(row.metric, {})[int(tenth["number"])] = row
    figures = {}
    for base, table in tables.items():
        figure, (above, below) = canvases(7, 5, rows=2)
        for axes, metric, label, tone in (
            (above, "edits_per_s", "edits per second", "#1b4f9c"),
            (below, "rss_mib", "resident memory, MiB", "#dd8b2f"),
        ):
            found = sorted(table.get(metric, {}).items())
            # A rate is of the whole tenth, memory of its end
            shift = 0.5 if metric == "edits_per_s" else 0.0
            x = [(number - shift) * record.edits_of(row) / 10 for number, row in found]
            axes.plot(x, [row.value for _, row in found], "o-", color=tone, ms=4.5)
            axes.set_ylabel(label)
            axes.set_ylim(0, 1.15 * max((row.value for _, row in found), default=1.0))
        below.set_xlabel("edits")
        below.xaxis.set_major_formatter(lambda value, _place: f"{value:,.0f}")
        below.set_xlim(left=0)
        above.set_title(short(base, 70), loc="left", fontsize=10)
        figures[stem(base)] = figure
    return figures
