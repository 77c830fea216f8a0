"""Pictures of the outcomes of ``quality.py``: trade-off, forgetting, which layers, what the encoders see."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from benchmarks.canvas import canvas, canvases
from benchmarks.quality_outcomes import unlabelled
from benchmarks.quality_tables import Outcome, named, of, score

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: One colour a base method, the same in every picture.
TONES = (
    "#1b4f9c", "#4f9bd9", "#dd8b2f", "#b5566b", "#5b8c5a", "#8a6bb1",
    "#7a6a53", "#c2a83e", "#3b9e9e", "#e377c2", "#777777", "#bc4b26",
)  # fmt: skip
MUST_CHANGE = ("reliability", "text_generality", "image_generality")
SPACES = {"question": "#9aa3b0", "right answer": "#1b4f9c", "wrong answer": "#dd8b2f"}
#: Least of both, in per cent, of what the second panel shows.
CORNER = 60
MUST_STAY = ("text_locality", "image_locality", "near", "same")


def draw(
    outcomes: Sequence[Outcome],
    folder: Path,
    maps: Sequence[Mapping[str, Any]] = (),
    views: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Path]:
    """Draw what there is; name -> PNG.

    Args:
        outcomes: of ``quality.py``. folder: for the pictures. maps: of layers, from ``quality_maps``.
        views: of UniKE's spaces by model and set, from there as well.
    """
    figures: dict[str, Figure] = {}
    # A method has one mark, that of its defaults
    singles = unlabelled(of(outcomes, "single"))
    for model, data in dict.fromkeys((o["case"]["model"], o["case"]["data"]) for o in singles):
        group = [o for o in singles if (o["case"]["model"], o["case"]["data"]) == (model, data)]
        figures[f"trade-off, {data} on {model}"] = trade_off(group, f"{data} on {model}")
    for table in ("sequential", "cross-task"):
        group = [o for o in of(outcomes, table) if o["checkpoints"]]
        if group:
            figures[f"forgetting, {table}"] = forgetting(group)
    figures |= {f"layers, {m['data']} on {m['model']}": layer_map(m) for m in maps}
    figures |= {f"spaces, {name}": spaces(view) for name, view in (views or {}).items()}
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for name, figure in figures.items():
        path = folder / (name.replace(", ", "-").replace(" ", "-") + ".png")
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=96)
        # A palette takes a third of the room, and nothing is seen of it
        Image.open(buffer).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(path, optimize=True)
        drawn[name] = path
    return drawn


def colours(outcomes: Sequence[Outcome]) -> dict[str, str]:
    """By base method."""
    names = sorted({base_of(outcome) for outcome in outcomes})
    return {name: TONES[number % len(TONES)] for number, name in enumerate(names)}


def base_of(outcome: Outcome) -> str:
    """The method without its objective."""
    return str(outcome["case"]["method"]).rpartition("+")[2]


def trade_off(group: Sequence[Outcome], title: str) -> Figure:
    """What must change against what must stay, all and the best corner; arrows lead from x to kl+x and odedit+x."""
    figure, panels = canvases(12.4, 5.2, columns=2, share="")
    tones = colours(group)
    places = {o["case"]["method"]: (_mean(o, MUST_STAY), _mean(o, MUST_CHANGE)) for o in group}
    best = [place for place in places.values() if min(place) >= CORNER]
    for axes in panels:
        for name, place in places.items():
            base = name.rpartition("+")[2]
            full = name != base
            mark = "s" if name.startswith("kl+") else "o"
            axes.plot(
                *place, mark, ms=8, mfc=tones[base] if full else "white", mec=tones[base], mew=1.8,
                label=None if full else base, zorder=3,
            )  # fmt: skip
            if full and base in places:
                axes.annotate(
                    "", place, places[base], annotation_clip=True,
                    arrowprops={"arrowstyle": "-|>", "color": tones[base], "lw": 1.1, "shrinkA": 5, "shrinkB": 5},
                )  # fmt: skip
        axes.set_xlabel("must stay: mean of text, image locality, near and same, %")
        axes.margins(0.06)
    if best:
        panels[1].set_xlim(min(x for x, _ in best) - 1.5, 100.8)
        panels[1].set_ylim(min(y for _, y in best) - 1.5, 100.8)
        panels[1].set_title(f"those above {CORNER} %", fontsize=10)
    panels[0].set_ylabel("must change: mean of reliability, text and image generality, %")
    panels[0].set_title(
        f"{title}, {group[0]['case']['edits']} edits, strict: open is x, square kl+x, full odedit+x", fontsize=10
    )
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8.5)
    return figure


def forgetting(group: Sequence[Outcome]) -> Figure:
    """Reliability of all edits so far, and locality, along a sequence."""
    figure, panels = canvases(10.5, 4.6, columns=3, share="y")
    tones = colours(group)
    parts = (("reliability of all edits so far", ("reliability",)), ("text and image locality", MUST_STAY[:2]),
             ("near", ("near",)))  # fmt: skip
    for axes, (title, names) in zip(panels, parts, strict=True):
        for outcome in group:
            points = [*outcome["checkpoints"].items(), (str(outcome["case"]["edits"]), outcome["scores"])]
            values = [(int(count), _mean({"scores": scores}, names)) for count, scores in points]
            name = named(outcome)
            style = "--" if outcome["case"]["label"] else "-" if "+" in name else ":"
            axes.plot(
                [x for x, _ in values], [y for _, y in values], style, marker="o", ms=3,
                color=tones[base_of(outcome)], label=name, lw=1.4,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.grid(axis="y", color="#e3e3e3", lw=0.7)
        axes.set_xlabel("edits made in sequence")
        axes.set_title(title, fontsize=10)
        axes.set_ylim(-3, 103)
    panels[0].set_ylabel("%")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    return figure


def layer_map(scores: Mapping[str, Any]) -> Figure:
    """Which layers an edit's answer hangs on: kinds of questions by layer."""
    kinds, values = list(scores["kinds"]), scores["values"]
    figure, axes = canvas(1.6 + 0.9 * len(values[0]), 1.2 + 0.34 * len(kinds), "layer")
    image = axes.imshow(values, cmap="Blues", vmin=0, aspect="auto")
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7.5,
                      color="white" if value > 0.6 * max(map(max, values)) else "black")  # fmt: skip
    axes.set_yticks(range(len(kinds)), kinds, fontsize=8.5)
    axes.set_xticks(range(len(values[0])))
    axes.grid(visible=False)
    axes.set_title(f"{scores['data']} on {scores['model']}: share of the localization score", fontsize=9)
    figure.colorbar(image, ax=axes, fraction=0.05)
    return figure


def spaces(view: Mapping[str, Any]) -> Figure:
    """Two-dimensional views of the semantic and truthfulness spaces, before and after the encoders."""
    figure, panels = canvases(9.2, 8.2, rows=2, columns=2, share="")
    for axes, (title, (points, labels)) in zip(panels, view.items(), strict=False):
        for label in dict.fromkeys(labels):
            chosen = [point for point, own in zip(points, labels, strict=True) if own == label]
            axes.plot([p[0] for p in chosen], [p[1] for p in chosen], "o", ms=2.6, alpha=0.6, mew=0,
                      color=SPACES[label], label=label)  # fmt: skip
        axes.set_title(title, fontsize=10)
        axes.legend(frameon=False, fontsize=8, markerscale=2)
    return figure


def _mean(outcome: Mapping[str, Any], names: Sequence[str]) -> float:
    found = [score(dict(outcome), name) for name in names]
    present = [100 * each["mean"] for each in found if each is not None]
    return sum(present) / len(present) if present else float("nan")
