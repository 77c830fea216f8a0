"""A picture of a comparison: what changed that must, what stayed that must."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastedit.cli.tables import HEADINGS
from fastedit.evaluation import MUST_CHANGE, MUST_STAY
from fastedit.report import method_colours


def draw_comparison(record: Mapping[str, Any], path: str | Path) -> Path:
    """Draw strict scores of every method of a comparison record as grouped bars with intervals; PNG at ``path``.

    Args:
        record: as written by ``fastedit compare`` (``runs``: label -> {"scores": ...}).
        path: of the picture.
    """
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot

    runs = record["runs"]
    found = {name for run in runs.values() for name in run["scores"]["strict"]}
    groups = [[n for n in part if n in found] for part in (MUST_CHANGE, MUST_STAY)]
    names = [name for group in groups for name in group]
    places = [i + (0.6 if i >= len(groups[0]) else 0.0) for i in range(len(names))]
    width = 0.8 / max(1, len(runs))
    figure, axes = pyplot.subplots(figsize=(max(8.0, 1.15 * len(names) + 2.5), 4.6), layout="constrained")
    colours = method_colours(runs)
    for number, (label, run) in enumerate(runs.items()):
        scores = [run["scores"]["strict"].get(name) or {"mean": None} for name in names]
        shown = [(x, s) for x, s in zip(places, scores, strict=True) if s["mean"] is not None]
        xs = [x + (number - (len(runs) - 1) / 2) * width for x, _ in shown]
        means = [100 * s["mean"] for _, s in shown]
        below = [100 * (s["mean"] - s["low"]) for _, s in shown]
        above = [100 * (s["high"] - s["mean"]) for _, s in shown]
        axes.bar(xs, means, width, label=label, color=colours[label])
        axes.errorbar(xs, means, yerr=[below, above], fmt="none", ecolor="black", elinewidth=0.8, capsize=1.5)
    axes.set_xticks(places, [HEADINGS.get(name, name) for name in names])
    axes.set_ylabel("%")
    axes.set_ylim(0, 105)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    border = (places[len(groups[0]) - 1] + places[len(groups[0])]) / 2 if groups[0] and groups[1] else None
    if border is not None:
        axes.axvline(border, color="black", linewidth=0.8, alpha=0.5)
    axes.set_title(
        f"{record['model']} on {record['data']}, {record['n_edits']} edits, strict protocol: "
        "left must change, right must stay",
        fontsize=10,
    )
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=min(5, len(runs)), frameon=False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
    return path
