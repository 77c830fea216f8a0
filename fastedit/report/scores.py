"""Scores of runs as rows of a page, beside what the unedited model scores on the same questions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fastedit.evaluation import MUST_CHANGE, MUST_STAY, Score, bootstrap, exact_match
from fastedit.report.words import Meaning, score_meaning


@dataclass(frozen=True)
class Value:
    """A mean with its 95 % interval, in per cent; of a method or of the unedited model."""

    label: str
    mean: float
    low: float
    high: float
    n: int
    colour: str = ""


@dataclass(frozen=True)
class ScoreRow:
    """One score of one run or of several, and of the unedited model where that is known."""

    meaning: Meaning
    changes: bool
    values: Sequence[Value]
    unedited: Value | None = None


def score_rows(
    runs: Mapping[str, Mapping[str, Any]],
    protocol: str,
    colours: Mapping[str, str],
    unedited: Mapping[str, Score] | None = None,
) -> list[ScoreRow]:
    """Rows of the scores that say what must change and what must stay, in the order in which they are shown.

    Args:
        runs: by label, ``scores`` of a run's record. protocol: whose. colours: by label.
        unedited: by score, of the unedited model.
    """
    rows = []
    for name in (*MUST_CHANGE, *MUST_STAY):
        tables = {label: scores.get(protocol, {}).get(name) for label, scores in runs.items()}
        values = [
            _value(label, table, colours.get(label, ""))
            for label, table in tables.items()
            if table is not None and table["mean"] is not None
        ]
        if values:
            base = (unedited or {}).get(name)
            shown = _value("", asdict(base), "") if base is not None and base.n else None
            rows.append(ScoreRow(score_meaning(name), name in MUST_CHANGE, values, shown))
    return rows


def unedited_scores(edits: Iterable[Mapping[str, Any]], seed: int = 0) -> dict[str, Score]:
    """Strict scores of doing nothing: of questions that must change by the answers before; what must stay, stays."""
    per_edit: dict[str, list[float]] = {}
    for edit in edits:
        values: dict[str, list[bool]] = {}
        for answer in edit.get("answers", ()):
            stays = answer["score"] in MUST_STAY
            values.setdefault(answer["score"], []).append(
                stays or exact_match(answer["before"], answer["wanted"] or "")
            )
        for name, right in values.items():
            per_edit.setdefault(name, []).append(sum(right) / len(right))
    return {name: bootstrap(values, seed=seed) for name, values in per_edit.items()}


def _value(label: str, table: Mapping[str, Any], colour: str) -> Value:
    mean, low, high = (100 * float(table[name]) for name in ("mean", "low", "high"))
    return Value(label, mean, low, high, table["n"], colour)
