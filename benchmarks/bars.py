"""Figures of bars: speed, memory, phases, the share of the machine's peak, sweeps over names, scores by precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from benchmarks import record
from benchmarks.canvas import (
    ENGINE,
    PHASES,
    SWEPT,
    canvas,
    canvases,
    colour,
    grouped,
    headline,
    ink,
    lines_of,
    ordered,
    phase_name,
    phase_order,
    plain,
    short,
    shown,
    speeds,
    stem,
)
from benchmarks.record import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PRECISION = "precision"
_TONES = ("#1b4f9c", "#4f9bd9", "#dd8b2f", "#b5566b", "#5b8c5a")
SCORES = ("reliability", "text_generality", "image_generality", "text_locality", "image_locality", "near", "same")


def speed(rows: Sequence[Row]) -> Figure | None:
    """Edits per second by case and implementation, p20 to p80 as whiskers, the ratio beside the bar."""
    found = [row for row in speeds(rows) if row.case in shown(rows)]
    return _bars(found, "edits per second", _with_ratio)


def memory(rows: Sequence[Row]) -> Figure | None:
    """Peak memory by case and implementation."""
    cases = shown(rows)
    found = [row for row in record.latest(rows) if row.metric == "peak_memory_mib" and row.case in cases]
    return _bars(found, "peak memory, MiB", lambda row: f"{row.value:,.0f}")


def _with_ratio(row: Row) -> str:
    return plain(row.value) if row.ratio is None else f"{plain(row.value)}  ({row.ratio:.2g}x)"


def _bars(rows: Sequence[Row], label: str, text: Callable[[Row], str]) -> Figure | None:
    if not rows:
        return None
    cells = {(row.case, row.implementation): row for row in rows}
    everyone = {row.implementation for row in rows}
    cases = list(dict.fromkeys(row.case for row in sorted(rows, key=lambda row: row.time)))
    groups = [(case, ordered({name for c, name in cells if c == case})) for case in cases]
    figure, axes = canvas(9, 0.9 + lines_of(groups), label)

    def draw(case: str, name: str, place: float) -> None:
        row = cells[case, name]
        whisker = [[row.value - row.p20], [row.p80 - row.value]]
        style = {"lw": 0.8, "capsize": 2}
        axes.barh(place, row.value, height=0.8, color=colour(name, everyone), xerr=whisker, error_kw=style)
        offset = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": 8.5}
        axes.annotate(text(row), (row.p80, place), **offset)  # type: ignore[arg-type]

    grouped(axes, groups, draw)
    axes.margins(x=0.14)
    return figure


def phases(rows: Sequence[Row]) -> Figure | None:
    """Milliseconds per edit by phase, one stacked bar per case and implementation."""
    parts = phase_parts(rows, shown(rows))
    if not parts:
        return None
    cases = [case for case in shown(rows) if any(c == case for c, _ in parts)]
    groups = [(case, ordered({name for c, name in parts if c == case})) for case in cases]
    figure, axes = canvas(9, 1.3 + lines_of(groups), "milliseconds per edit (median run)")
    seen: set[str] = set()

    def draw(case: str, name: str, place: float) -> None:
        left = 0.0
        for phase, seconds in parts[case, name].items():
            seen.add(phase)
            axes.barh(place, seconds * 1e3, left=left, color=PHASES.get(phase, "#555555"), height=0.8)
            left += seconds * 1e3
        axes.annotate(plain(left), (left, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8.5)

    grouped(axes, groups, draw)
    axes.margins(x=0.08)
    _phase_legend(figure, seen)
    return figure


def _phase_legend(figure: Figure, seen: set[str]) -> None:
    """The phases that were drawn, in the order of a bar."""
    from matplotlib.patches import Patch

    handles = [Patch(color=PHASES.get(name, "#555555"), label=name) for name in sorted(seen, key=phase_order)]
    figure.legend(handles=handles, frameon=False, ncols=5, loc="outside upper center", fontsize=8)


def phase_parts(rows: Sequence[Row], cases: Sequence[str]) -> dict[tuple[str, str], dict[str, float]]:
    """(case, implementation) -> phase -> seconds per edit, with what is in no phase as "other"."""
    newest = [row for row in record.latest(rows) if row.case in cases and record.edits_of(row)]
    found: dict[tuple[str, str], dict[str, float]] = {}
    for total in (row for row in newest if row.metric == "run_s"):
        edits = record.edits_of(total)
        own = {
            phase_name(row.metric.removeprefix("phase_").removesuffix("_s")): row.value / edits
            for row in newest
            if (row.case, row.implementation) == (total.case, total.implementation)
            and record.PHASE_METRIC.fullmatch(row.metric)
        }
        own["other"] = max(0.0, total.value / edits - sum(own.values()))
        found[total.case, total.implementation] = {name: own[name] for name in sorted(own, key=phase_order)}
    return found


def peak_share(rows: Sequence[Row]) -> Figure | None:
    """What the engine reaches of the machine's matrix-multiply peak, and which phases the time goes to.

    Left: necessary operations per second of editing beside the peak measured in the same run; their ratio is the
    NFU. Right: shares of the run's time, with milliseconds per edit in the wider ones.
    """
    cells = {(row.case, row.metric): row for row in record.latest(rows) if row.implementation in ("machine", ENGINE)}
    cases = [case for case in shown(rows) if {(case, "nfu"), (case, "matmul_peak_gflop_per_s")} <= set(cells)]
    parts = {case: own for (case, name), own in phase_parts(rows, cases).items() if name == ENGINE}
    cases = [case for case in cases if case in parts]
    if not cases:
        return None
    figure, (left, right) = canvases(11, 1.3 + 0.66 * len(cases), columns=2, share="y")
    seen: set[str] = set()
    for place, case in enumerate(cases):
        peak, nfu = cells[case, "matmul_peak_gflop_per_s"].value, cells[case, "nfu"].value
        copies = cells.get((case, "copy_bandwidth_gib_per_s"))
        headline(left, case, place - 0.42, 58)
        left.barh(place, peak, height=0.5, facecolor="#eef1f6", edgecolor="#b8c0cc", lw=0.8)
        left.barh(place, peak * nfu, height=0.5, color="#1b4f9c")
        told = f"{plain(peak * nfu)} of {plain(peak)}: NFU {nfu:.2f}"
        told += "" if copies is None else f"\ncopies {copies.value:,.1f} GiB/s"
        left.annotate(told, (peak, place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8)
        total, start = sum(parts[case].values()), 0.0
        for phase, seconds in parts[case].items():
            share = 100 * seconds / total
            seen.add(phase)
            tone = PHASES.get(phase, "#555555")
            right.barh(place, share, left=start, height=0.5, color=tone)
            if share > 12:
                style = {"ha": "center", "va": "center", "fontsize": 7.5, "color": ink(tone)}
                right.text(start + share / 2, place, f"{plain(seconds * 1e3)} ms", **style)
            start += share
    left.set_yticks([])
    left.set_ylim(len(cases) - 0.6, -0.7)
    left.set_xlim(0, 1.55 * max(cells[case, "matmul_peak_gflop_per_s"].value for case in cases))
    left.set_xlabel("necessary GFLOP/s, and the measured peak")
    right.set_xlim(0, 100)
    right.set_xlabel("share of the engine's time, %; ms per edit")
    _phase_legend(figure, seen)
    return figure


def sweeps(rows: Sequence[Row]) -> dict[str, Figure]:
    """Edits per second of every sweep over names (method, quantize, dtype), by base case and field."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in speeds(rows):
        swept = SWEPT.fullmatch(row.case)
        if swept is not None and not is_number(swept["value"]) and swept["field"] != "model":
            found.setdefault((swept["base"], swept["field"]), []).append(row)
    made = {}
    for (base, field), own in found.items():
        figure = _bars([_renamed(row) for row in own], f"edits per second: {short(base)}, by {field}", _with_ratio)
        if figure is not None:
            made[f"{stem(base)}-{field}"] = figure
    return made


def _renamed(row: Row) -> Row:
    swept = SWEPT.fullmatch(row.case)
    return row if swept is None else replace(row, case=swept["value"])


def is_number(text: str) -> bool:
    """Whether a swept value is a number."""
    return text.replace(".", "", 1).isdigit()


def precisions(rows: Sequence[Row]) -> dict[str, Figure]:
    """Scores under both protocols at every precision, with 95 % intervals, by base case."""
    tables: dict[str, dict[str, dict[str, float]]] = {}
    for row in record.latest(rows):
        swept = SWEPT.fullmatch(row.case)
        if swept is not None and swept["field"] == PRECISION and record.SCORE_METRIC.fullmatch(row.metric):
            tables.setdefault(swept["base"], {}).setdefault(swept["value"], {})[row.metric] = row.value
    return {stem(base): _scores(base, table) for base, table in tables.items()}


def _scores(base: str, table: dict[str, dict[str, float]]) -> Figure:
    """Two panels, a protocol each; the unedited model's answers stand in the first places of both."""
    figure, panels = canvases(9, 6.2, rows=2, share="x")
    names = ["base_answers", *SCORES]
    for protocol, axes in zip(("legacy", "strict"), panels, strict=True):
        for number, (precision, values) in enumerate(table.items()):
            metrics = [name if name.startswith("base") else f"{protocol}_{name}" for name in names]
            for place, metric in enumerate(metrics):
                if metric not in values:
                    continue
                at = place + (number - (len(table) - 1) / 2) * 0.17
                bounds = [
                    [values[metric] - values.get(f"{metric}_low", values[metric])],
                    [values.get(f"{metric}_high", values[metric]) - values[metric]],
                ]
                tone = _TONES[number % len(_TONES)]
                label = precision if place == 0 else None
                axes.errorbar(
                    at, values[metric], yerr=bounds, fmt="o", ms=4, lw=1.2, capsize=2, color=tone, label=label
                )
        axes.set_ylim(-0.03, 1.05)
        axes.set_ylabel(protocol)
        axes.grid(axis="x", visible=False)
        axes.set_xticks(
            range(len(names)), [name.replace("_", "\n", 1).replace("base\n", "unedited\n") for name in names]
        )
    panels[0].legend(frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1.0))
    figure.suptitle(short(base, 70), x=0.01, ha="left", fontsize=10)
    return figure
