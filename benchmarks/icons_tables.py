"""Tables of what `icons.py` measured: means over the edits that every variant of a table has, with their intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from statistics import mean
from typing import Any

from fastedit.evaluation import bootstrap

TABLES = ("localization", "methods", "controls", "hops")
#: What must change and what must stay, of the scores that the search of layers goes by.
CHANGES = ("reliability", "text_generality", "image_generality", "text_generality_unseen", "image_generality_unseen")
STAYS = ("text_locality", "image_locality", "near")
#: Columns of each table, by the parts that it is shown in.
SHOWN: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "localization": ((*CHANGES, *STAYS),),
    "methods": (
        (*CHANGES, "polite"),
        (
            "text_locality", "text_locality_unseen", "image_locality", "image_locality_unseen", "near", "near_unseen",
            "same", "sibling", "negated", "contrary",
        ),
        ("portability[entailed]", "portability[one-hop]", "portability[two-hop]"),
    ),
    "controls": (("reliability", *CHANGES[1:4], *STAYS, "same"),),
    "hops": (("reliability", "portability[entailed]", "portability[one-hop]", "portability[two-hop]"),),
}  # fmt: skip


def scores_of(table: str) -> list[str]:
    """Names of the scores that rows of a table have; the search has those of the table that it is made for."""
    return [name for part in SHOWN.get(table, SHOWN["localization"]) for name in part]


def worth(row: Mapping[str, Any]) -> float:
    """Mean over edits of the means of what must change and of what must stay."""
    parts = []
    for names in (CHANGES, STAYS):
        values = [value for name in names for value in row["scores"].get(name, ()) if value is not None]
        parts.append(mean(values))
    return mean(parts)


def complete(rows: Sequence[Mapping[str, Any]], table: str) -> dict[str, list[Mapping[str, Any]]]:
    """By label, the rows of those edits that every variant of a table was measured on."""
    by_label: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        if row["table"] == table:
            by_label.setdefault(row["label"], {})[row["start"]] = row
    shared = set.intersection(*(set(found) for found in by_label.values())) if by_label else set()
    return {label: [found[start] for start in sorted(shared)] for label, found in by_label.items()} if shared else {}


def markdown(rows: Sequence[Mapping[str, Any]], table: str) -> Iterator[str]:
    """Lines of a table, in its parts: means, beside them 95 % bootstrap intervals, and processor seconds an edit.

    The number of edits that have a score stands in its head where not all do; a score that none has is left out.
    """
    by_label = complete(rows, table)
    for number, part in enumerate(SHOWN[table] if by_label else ()):
        last = number == len(SHOWN[table]) - 1
        own = next(iter(by_label.values()))
        edits = sum(row["edits"] for row in own)
        counts = {name: bootstrap(values_of(own, name)).n for name in part}
        counts = {name: n for name, n in counts.items() if n}
        heads = [f"{name.replace('_', ' ')}{f' ({n})' if n < edits else ''}" for name, n in counts.items()]
        seconds = ["localization, s", "fit, s"] if table == "localization" else ["s an edit"]
        yield f"| {' | '.join([table, *heads, *(seconds if last else [])])} |"
        yield f"|{'---|' * (1 + len(heads) + (len(seconds) if last else 0))}"
        for label, own in by_label.items():
            cells = [label, *(cell(values_of(own, name)) for name in counts)]
            cells += costs(own, split=table == "localization") if last else []
            yield f"| {' | '.join(cells)} |"
        yield ""


def values_of(rows: Sequence[Mapping[str, Any]], name: str) -> list[float | None]:
    """One value an edit of a score, over rows."""
    return [value for row in rows for value in row["scores"].get(name, [None] * row["edits"])]


def cell(values: Sequence[float | None]) -> str:
    """A mean with its interval, "-" where no edit has the score."""
    score = bootstrap(values)
    return f"{score.mean:.2f} <sub>{score.low:.2f} to {score.high:.2f}</sub>" if score.n else "-"


def costs(rows: Sequence[Mapping[str, Any]], *, split: bool) -> list[str]:
    """Processor seconds an edit without evaluation: of getting ready, which localization is part of, and of the fit."""
    edits = sum(row["edits"] for row in rows)
    ready = sum(row["cpu_seconds"].get("setup", 0.0) for row in rows) / edits
    whole = sum(v for row in rows for name, v in row["cpu_seconds"].items() if name != "evaluation") / edits
    return [f"{ready:.2f}", f"{whole - ready:.2f}"] if split else [f"{whole:.2f}"]


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every table of every set, the search, and how often each layer was chosen."""
    lines: list[str] = []
    for data in sorted({row["data"] for row in rows}):
        for table in TABLES:
            shown = list(markdown([row for row in rows if row["data"] == data], table))
            lines += [f"## {table}, {data}", "", *shown] if shown else []
    for row in rows:
        if row["table"] == "search":
            spent = sum(v for name, v in row["cpu_seconds"].items() if name != "evaluation")
            lines.append(f"* {row['label']}: {worth(row):.3f}, {spent:.1f} s")
        if row["table"] == "training":
            lines.append(f"* {row['label']} trained on {row['data']}: {row['cpu_seconds']:.0f} s")
    for label, own in complete(rows, "localization").items():
        counted = Counter(layer for row in own for layers in row["layers"] for layer in layers)
        lines.append(f"* {label}: {', '.join(f'layer {n} {c} times' for n, c in sorted(counted.items()))}")
    return "\n".join(lines)
