"""Results as tables on a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rich import box
from rich.table import Table

from fastedit.engine import Run
from fastedit.evaluation import MUST_CHANGE, MUST_STAY, Score

HEADINGS = {
    "reliability": "Rel",
    "text_generality": "T-Gen",
    "image_generality": "M-Gen",
    "portability": "Port",
    "text_locality": "T-Loc",
    "image_locality": "M-Loc",
    "text_locality_top10": "T-L@10",
    "image_locality_top10": "M-L@10",
}


def percent(score: Score | None, *, interval: bool = False) -> str:
    """A score as per cent, with half the width of its interval where asked for."""
    if score is None or not math.isfinite(score.mean):
        return "-"
    text = f"{100 * score.mean:.1f}"
    if interval:
        text += f" ±{50 * (score.high - score.low):.0f}"
    return text


LEGACY_ONLY = ("text_locality_top10", "image_locality_top10")


def checkpoint_line(count: int, scores: Mapping[str, Mapping[str, Score]]) -> str:
    """One line of the strict scores after so many edits of a sequence, in per cent."""
    shown = [name for name in (*MUST_CHANGE, *MUST_STAY) if name in scores["strict"]]
    return f"after {count}: " + ", ".join(f"{HEADINGS.get(n, n)} {100 * scores['strict'][n].mean:.1f}" for n in shown)


def score_tables(runs: Mapping[str, Run], protocol: str) -> list[Table]:
    """What must change and what must stay, as two tables that fit a narrow terminal; one row per run."""
    found = {name for run in runs.values() for name in run.scores.get(protocol, {})}
    edits = max((len(run.deltas) for run in runs.values()), default=0)
    stay = (*MUST_STAY, *LEGACY_ONLY) if protocol == "legacy" else MUST_STAY
    head = f"{protocol} protocol, {edits} edits, % ± half a 95 % interval"
    changed = _score_table(runs, protocol, [n for n in MUST_CHANGE if n in found], f"{head}: must change")
    kept = _score_table(runs, protocol, [n for n in stay if n in found], f"{head}: must stay")
    return [changed, kept]


def _score_table(runs: Mapping[str, Run], protocol: str, names: list[str], title: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("method", no_wrap=True)
    for name in names:
        table.add_column(HEADINGS.get(name, name), justify="right", no_wrap=True)
    for label, run in runs.items():
        scores = run.scores[protocol]
        table.add_row(label, *(percent(scores.get(name), interval=name not in LEGACY_ONLY) for name in names))
    return table


def speed_table(runs: Mapping[str, Run]) -> Table:
    """Speed, convergence and where the time went, one row per run."""
    table = Table(title="speed (this machine)", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("method", "edits/s", "steps", "stopped", "edit s", "eval s", "MiB"):
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for label, run in runs.items():
        count = max(1, len(run.outcomes))
        evaluation = run.timing.seconds.get("evaluation", 0.0)
        table.add_row(
            label,
            f"{run.timing.edits_per_s:.1f}",
            f"{run.timing.steps / count:.1f}",
            f"{sum(o.status == 'converged' for o in run.outcomes)}/{count}",
            f"{sum(run.timing.seconds.values()) - evaluation:.1f}",
            f"{evaluation:.1f}",
            f"{run.timing.peak_memory_mib:.0f}",
        )
    return table
