"""What every figure shares: colours, names that fit, axes, and which rows are drawn."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from benchmarks import record
from benchmarks.record import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ENGINE = "engine"
#: Dark for the engine, quiet for what it is compared with.
COLOURS = {ENGINE: "#1b4f9c", "plain_loop": "#a3a9b3", "peft": "#dd8b2f", "plain_onednn": "#c9cdd4"}
#: For forms of the engine and whatever else there is.
OTHERS = ("#4f9bd9", "#5b8c5a", "#b5566b", "#8a6bb1", "#7a6a53")
#: One colour a phase, the same in every figure: colour-blind safe (Okabe and Ito), then greys.
PHASES = {
    "encode": "#cccccc",
    "setup": "#bbbbbb",
    "prefix": "#56b4e9",
    "reference": "#999999",
    "forward": "#0072b2",
    "objective": "#f0e442",
    "backward": "#e69f00",
    "optimiser": "#009e73",
    "evaluation": "#cc79a7",
    "store": "#777777",
    "other": "#e8e8e8",
}
#: Most cases in one figure of bars: the newest.
CASES = 12
NAME_LENGTH = 44
SWEPT = re.compile(r"(?P<base>.+?)/(?P<field>\w+)=(?P<value>.+)")


def speeds(rows: Sequence[Row]) -> list[Row]:
    """The newest rows of editing speed; not of endurance, whose parts are no cases of their own."""
    return [row for row in record.latest(rows) if row.metric == "edits_per_s" and "endurance" not in row.case]


def shown(rows: Sequence[Row]) -> list[str]:
    """The newest cases about speed that are no value of a sweep, oldest first, a dozen at most."""
    found = sorted((row for row in speeds(rows) if not SWEPT.fullmatch(row.case)), key=lambda row: row.time)
    cases = list(dict.fromkeys(row.case for row in reversed(found)))[:CASES]
    return cases[::-1]


def ordered(names: set[str]) -> list[str]:
    """The engine first, then the others by name."""
    return sorted(names, key=lambda name: (name != ENGINE, name))


def colour(name: str, names: set[str]) -> str:
    """Of an implementation among others."""
    unknown = [other for other in ordered(names) if other not in COLOURS]
    return COLOURS[name] if name in COLOURS else OTHERS[unknown.index(name) % len(OTHERS)]


def phase_name(name: str) -> str:
    """The forward pass is one phase, of whatever part of the model."""
    return "forward" if name == "tail_forward" else name


def phase_order(name: str) -> int:
    """Place of a phase in a stacked bar."""
    return list(PHASES).index(name) if name in PHASES else len(PHASES)


def short(name: str, length: int = NAME_LENGTH) -> str:
    """A name that fits: its beginning and its end."""
    if len(name) <= length:
        return name
    tail = (length - 1) // 3
    return f"{name[: length - 1 - tail]}…{name[-tail:]}"


def stem(name: str) -> str:
    """A part of a file name."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-")


def canvas(
    width: float, height: float, label: str = "", *, grid: Literal["both", "x", "y"] = "x"
) -> tuple[Figure, Axes]:
    """A figure with one pair of axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    dress(axes, label, grid=grid)
    return figure, axes


def canvases(
    width: float, height: float, *, rows: int = 1, columns: int = 1, share: Literal["x", "y", ""] = "x"
) -> tuple[Figure, list[Axes]]:
    """A figure with several axes that share one direction, or none."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=share == "x", sharey=share == "y", squeeze=False)
    found: list[Axes] = [axes for line in grid for axes in line]
    for axes in found:
        dress(axes, grid="x" if share == "y" else "both")
    return figure, found


def dress(axes: Axes, label: str = "", *, grid: Literal["both", "x", "y"] = "x") -> None:
    """Light grid behind, no box around."""
    axes.set_axisbelow(True)
    axes.grid(axis=grid, color="#e3e3e3", lw=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(label)


def grouped(axes: Axes, groups: Sequence[tuple[str, Sequence[str]]], draw: Callable[[str, str, float], None]) -> None:
    """Rows of bars under headings: a heading is a case, a row one of its implementations.

    Args:
        axes: y counts down from the first heading.
        groups: (heading, its rows).
        draw: told heading, row and y, draws the bar.
    """
    ticks: list[float] = []
    labels: list[str] = []
    place = 0.0
    for heading, names in groups:
        headline(axes, heading, place + 0.15)
        for name in names:
            place += 1
            draw(heading, name, place)
            ticks.append(place)
            labels.append(short(name))
        place += 1.4
    axes.set_yticks(ticks, labels, fontsize=8.5)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(place - 0.7, -0.4)


def headline(axes: Axes, text: str, place: float, length: int = 76) -> None:
    """A heading inside the axes at a y: there it may be long."""
    shown = short(text.replace("random:", ""), length)
    at = axes.get_yaxis_transform()
    axes.text(0.006, place, shown, transform=at, fontsize=8.5, fontweight="bold", va="center", gid="headline")


def plain(number: float) -> str:
    """Three figures, and never an exponent for a large number."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def ink(tone: str) -> str:
    """Black or white, whichever can be read on a colour (#rrggbb)."""
    red, green, blue = (int(tone[at : at + 2], 16) for at in (1, 3, 5))
    return "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 125 else "white"


def lines_of(groups: Sequence[tuple[str, Sequence[str]]]) -> float:
    """How high a figure of such groups is, in inches, without its margins."""
    return sum(0.26 * (len(names) + 1.4) for _, names in groups)
