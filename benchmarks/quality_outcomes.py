"""The outcomes of ``quality.py``: read, compared on the same edits."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastedit.evaluation import Score, bootstrap_difference

Outcome = dict[str, Any]

HEADINGS: Mapping[str, str] = {
    "reliability": "Rel",
    "text_generality": "T-Gen",
    "image_generality": "M-Gen",
    "text_locality": "T-Loc",
    "image_locality": "M-Loc",
    "near": "near",
    "same": "same",
}
#: Compared between x and odedit+x.
COMPARED = ("mean_of_five", "near", "mean_of_six")


def load_outcomes(folder: Path) -> list[Outcome]:
    """Every outcome of a folder, by name of its case; of the same case the one with the most edits."""
    found: dict[str, Outcome] = {}
    for path in sorted(folder.glob("*.json")):
        outcome = json.loads(path.read_text(encoding="utf-8"))
        name = outcome["case"]["name"]
        if name not in found or outcome["case"]["edits"] > found[name]["case"]["edits"]:
            found[name] = outcome
    return list(found.values())


def stored_beside(outcomes: Sequence[Outcome], rows: Iterable[Mapping[str, Any]]) -> list[Outcome]:
    """Stored single edits of the same models, sets, weights and edits that the outcomes lack, in the form of outcomes.

    Sequences of the same models, sets and weights too, of any number of edits. A row has no values by edit: what is
    made of it stands in tables and is in no paired difference.
    """
    known = {outcome["case"]["name"] for outcome in outcomes}
    singles = of(outcomes, "single")
    wanted = {(*_same_model(outcome), "single", outcome["case"]["edits"]) for outcome in singles}
    lasting = {(*_same_model(outcome), "sequential") for outcome in singles}
    found = []
    for row in rows:
        table = (*_same_model(row), row["case"]["table"])
        if row["case"]["name"] not in known and ((*table, row["case"]["edits"]) in wanted or table in lasting):
            found.append(_of_row(row))
    return found


def _same_model(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["case"]["model"], row["case"]["data"], row.get("weights")


def _of_row(row: Mapping[str, Any]) -> Outcome:
    def whole(cell: Sequence[Any]) -> dict[str, Any]:
        return dict(zip(("mean", "low", "high", "n"), cell, strict=True))

    def both(cells: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        return {protocol: {name: whole(cell) for name, cell in own.items()} for protocol, own in cells.items()}

    rates = {name: whole(cell) for name, cell in row["rates"].items()}
    checkpoints = {count: both(scores) for count, scores in row["checkpoints"].items()}
    apart: dict[str, Any] = {"checkpoints": checkpoints, "per_edit": {}, "tags": []}
    return {**row, "scores": both(row["scores"]), "rates": rates, **apart}


def score(outcome: Outcome, name: str, protocol: str = "strict") -> dict[str, Any] | None:
    """One score with its interval, or None."""
    found = outcome["scores"].get(protocol, {}).get(name)
    return found if found and found["mean"] is not None else None


def seconds_of(outcome: Outcome) -> str:
    """Seconds an edit, marked where the processor had nothing wider than AVX2: those compare with no others."""
    seconds = f"{outcome['timing']['seconds_per_edit']:.3f}"
    machine = outcome.get("provenance", {}).get("machine", {})
    return f"{seconds} (AVX2)" if machine.get("cpu_capability") == "AVX2" else seconds


def mean_of_five(outcome: Outcome) -> float:
    """Mean over edits of the mean of the five scores."""
    if not outcome["per_edit"]:
        return float(outcome["mean_of_five"])
    values = [value for value in outcome["per_edit"]["mean_of_five"] if value is not None]
    return sum(values) / len(values)


def differences(plain: Outcome, other: Outcome) -> dict[str, Score]:
    """``other`` minus ``plain`` on the same edits, with intervals (paired bootstrap)."""
    names = [name for name in COMPARED if name in plain["per_edit"] and name in other["per_edit"]]
    return {name: bootstrap_difference(other["per_edit"][name], plain["per_edit"][name]) for name in names}


def pairs(outcomes: Sequence[Outcome], table: str = "single", against: str = "") -> list[tuple[Outcome, Outcome]]:
    """(x, odedit+x) on the same edits; ``against="kl"``: (kl+x, odedit+x), the control with the same data."""
    by_key = {(o["case"]["model"], o["case"]["data"], o["case"]["method"]): o for o in unlabelled(of(outcomes, table))}
    found = []
    for (model, data, method), outcome in by_key.items():
        prefix, _, base = method.rpartition("+")
        other = by_key.get((model, data, f"odedit+{base}")) if prefix == against else None
        if other is None or not (other["per_edit"] and outcome["per_edit"]):
            continue
        if len(other["per_edit"]["near"]) == len(outcome["per_edit"]["near"]):
            found.append((outcome, other))
    return found


def of(outcomes: Iterable[Outcome], table: str) -> list[Outcome]:
    """The outcomes of a table."""
    return [outcome for outcome in outcomes if outcome["case"]["table"] == table]


def unlabelled(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Methods as they are; a case with a label has other settings and stands for nobody else."""
    return [outcome for outcome in outcomes if not outcome["case"]["label"]]


def named(outcome: Outcome) -> str:
    """The case's label, or its method."""
    return str(outcome["case"]["label"] or outcome["case"]["method"])
