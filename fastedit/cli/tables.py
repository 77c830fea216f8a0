"""Results as tables on a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from fastedit.engine import Run
from fastedit.evaluation import MUST_CHANGE, MUST_STAY, UNSEEN, Score

HEADINGS = {
    "reliability": "Rel",
    "text_generality": "T-Gen",
    "image_generality": "M-Gen",
    "portability": "Port",
    "text_locality": "T-Loc",
    "image_locality": "M-Loc",
    "text_locality_top10": "T-L@10",
    "image_locality_top10": "M-L@10",
    "near": "Near",
    "same": "Same",
    "sibling": "Sibling",
    "polite": "Polite",
    "negated": "Negated",
    "contrary": "Contrary",
}


def titled(title: str, headings: Sequence[str], *, left: int = 1) -> tuple[Group, Table]:
    """A table under a title that keeps its line however narrow the table is: what is printed, and what is filled.

    Args:
        title: short enough for 60 columns. headings: of the columns. left: columns that are aligned to the left.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, heading in enumerate(headings):
        # Where there is no room a name is folded; a number never loses digits
        table.add_column(heading, justify="left" if number < left else "right", no_wrap=number >= left, overflow="fold")
    return Group(Text(title, style="italic", no_wrap=True, overflow="ellipsis"), table), table


def plus_minus(console: Console) -> str:
    """The sign before half an interval, or what stands for it on a terminal that has ASCII only."""
    return "+-" if console.options.ascii_only else "±"


def percent(score: Score | None, *, interval: str = "") -> str:
    """A score as per cent, behind the sign ``interval`` with half the width of its interval where there is one."""
    if score is None or not math.isfinite(score.mean):
        return "-"
    text = f"{100 * score.mean:.1f}"
    if interval:
        text += f" {interval}{50 * (score.high - score.low):.0f}"
    return text


# Columns of the terminal that a score takes: "100.0 +-10" and what is between columns
_CELL = 12
WORDINGS = "seen / unseen wording"
_BY_ONE_WORDING = tuple(name for name in (*MUST_CHANGE, *MUST_STAY) if name not in UNSEEN.values())
LEGACY_ONLY = ("text_locality_top10", "image_locality_top10")


def checkpoint_line(count: int, scores: Mapping[str, Mapping[str, Score]]) -> str:
    """One line of the strict scores after so many edits of a sequence, in per cent."""
    strict = scores["strict"]
    shown = [name for name in _BY_ONE_WORDING if name in strict]
    return f"after {count}: " + ", ".join(f"{HEADINGS.get(n, n)} {both_wordings(strict, n)}" for n in shown)


def score_tables(runs: Mapping[str, Run], protocol: str, sign: str = "±", width: int = 80) -> list[RenderableType]:
    """What must change, what must stay, and seen beside unseen wording, in tables that fit the terminal; a row per run.

    Args:
        runs: by label. protocol: whose scores. sign: before half an interval. width: columns of the terminal; scores
            that have no room beside the others go to one more table.
    """
    found = {name for run in runs.values() for name in run.scores.get(protocol, {})}
    edits = max((len(run.deltas) for run in runs.values()), default=0)
    head = f"{protocol} protocol, {edits} edit{'' if edits == 1 else 's'}"
    room = max(1, (width - max(map(len, runs)) - 2) // _CELL)
    tables = []
    groups = (("must change", MUST_CHANGE), ("must stay", (*MUST_STAY, *LEGACY_ONLY)), (WORDINGS, tuple(UNSEEN)))
    for kind, known in groups:
        if kind == WORDINGS:
            names = [name for name in known if UNSEEN[name] in found]
        else:
            names = [name for name in known if name in found and name not in UNSEEN.values()]
            names = [name for name in names if protocol == "legacy" or name not in LEGACY_ONLY]
        for start in range(0, len(names), room):
            part = names[start : start + room]
            tables.append(_score_table(runs, protocol, part, f"{head}: {kind}", sign))
    return tables


def both_wordings(scores: Mapping[str, Score], name: str) -> str:
    """A score in seen and, where it was asked, in unseen wording: "97.5/81.0"."""
    seen, twin = percent(scores.get(name)), UNSEEN.get(name, "")
    return f"{seen}/{percent(scores[twin])}" if twin in scores else seen


def _score_table(runs: Mapping[str, Run], protocol: str, names: list[str], title: str, sign: str) -> RenderableType:
    shown, table = titled(title, ["method", *(HEADINGS.get(name, name) for name in names)])
    for label, run in runs.items():
        scores = run.scores.get(protocol, {})
        if title.endswith(WORDINGS):
            table.add_row(label, *(both_wordings(scores, name) for name in names))
            continue
        table.add_row(
            label, *(percent(scores.get(name), interval="" if name in LEGACY_ONLY else sign) for name in names)
        )
    return shown


def speed_table(runs: Mapping[str, Run]) -> Group:
    """Speed, convergence and where the time went, one row per run."""
    headings = ("method", "edits/s", "steps", "stopped", "edit s", "eval s", "MiB")
    shown, table = titled("speed (this machine)", headings)
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
    return shown


def print_scores(console: Console, runs: Mapping[str, Run]) -> None:
    """Every table of some runs; those without scores have only their speed."""
    for count, scores in (item for run in runs.values() for item in run.checkpoints.items()):
        console.print(checkpoint_line(count, scores), markup=False, soft_wrap=True)
    for protocol in ("legacy", "strict"):
        if any(run.scores.get(protocol) for run in runs.values()):
            for table in score_tables(runs, protocol, plus_minus(console), console.width):
                console.print(table)
    if any(run.scores for run in runs.values()):
        console.print(f"% {plus_minus(console)} half a 95 % interval", markup=False, highlight=False)
    console.print(speed_table(runs))
