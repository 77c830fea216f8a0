"""The forgetting curve of a sequence: how the edits so far hold while others follow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastedit.report.words import score_meaning

#: Of the drawing, in its own units; and the margins around the lines.
WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 44, 14, 12, 34
_SHOWN = ("reliability", "text_generality", "text_locality", "image_locality")
_COLOURS = ("#0072b2", "#56b4e9", "#d55e00", "#009e73")
# Lines are told apart without colours too
_DASHES = ("", "7 4", "2 4", "9 4 2 4")


@dataclass(frozen=True)
class Line:
    """A score over the number of edits: points in the drawing's units, and the interval around them."""

    label: str
    colour: str
    dash: str
    points: Sequence[tuple[float, float, str]]
    band: str


@dataclass(frozen=True)
class Curve:
    """Lines, and where the numbers of edits stand below them."""

    lines: Sequence[Line]
    ticks: Sequence[tuple[float, str]]
    levels: Sequence[tuple[float, str]]
    logarithmic: bool


def forgetting_curve(record: Mapping[str, Any]) -> Curve | None:
    """The curve of a run's record; None where it was not scored at two numbers of edits at least."""
    tables = {int(count): scores["strict"] for count, scores in record["checkpoints"].items() if "strict" in scores}
    if record["scores"].get("strict"):
        tables[len(record["edits"])] = record["scores"]["strict"]
    counts = sorted(tables)
    if len(counts) < 2:
        return None
    logarithmic = counts[-1] > 20 * counts[0]
    places = {count: _across(count, counts, logarithmic) for count in counts}
    lines = []
    for name, colour, dash in zip(_SHOWN, _COLOURS, _DASHES, strict=True):
        scores = {n: tables[n][name] for n in counts if name in tables[n] and tables[n][name]["mean"] is not None}
        if scores:
            lines.append(_line(score_meaning(name).title, colour, dash, scores, places))
    ticks = [(places[count], f"{count:,}") for count in counts]
    return Curve(
        lines, _apart(ticks), [(_down(level), f"{level:.0%}") for level in (0, 0.25, 0.5, 0.75, 1)], logarithmic
    )


def _line(
    label: str, colour: str, dash: str, scores: Mapping[int, Mapping[str, Any]], places: Mapping[int, float]
) -> Line:
    points = [
        (places[n], _down(score["mean"]), f"{label} after {n:,}: {score['mean']:.1%}") for n, score in scores.items()
    ]
    edge = [(places[n], _down(score["high"])) for n, score in scores.items()]
    edge += reversed([(places[n], _down(score["low"])) for n, score in scores.items()])
    return Line(label, colour, dash, points, " ".join(f"{x:.1f},{y:.1f}" for x, y in edge))


def _across(count: int, counts: Sequence[int], logarithmic: bool) -> float:
    scale = math.log if logarithmic else float
    first, last = scale(counts[0]), scale(counts[-1])
    return LEFT + (WIDTH - LEFT - RIGHT) * (scale(count) - first) / (last - first)


def _down(share: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - share)


def _apart(ticks: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """The ticks that have room beside the last one, and beside each other."""
    kept = [ticks[-1]]
    for tick in reversed(ticks[:-1]):
        if kept[-1][0] - tick[0] > 46:
            kept.append(tick)
    return kept[::-1]
