"""The metrics of both protocols, as a table: a column's name to the function of one answered question that fills it.

A metric takes the row of a question and the edit's target, and returns a value, or None where it does not apply. A new
one is a function and a line in ``METRICS``. Definitions as in the multimodal editing literature: teacher-forced token
accuracy, and locality by agreement with the unedited model (top-1, and rank-ordered top-10; MMEdit, arXiv 2310.08475).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fastedit.evaluation.normalise import exact_match, token_f1
from fastedit.evaluation.protocol import EvaluationView


@dataclass
class AskedRow:
    """One question of one edit, with what was answered.

    Args:
        edit: number of the edit. view: the question. before, after: generated answers.
        legacy: means over the tokens of the fed answer by name (``scoring.token_scores``); None where none was fed.
        kl: KL(before || after) on those tokens, in nats.
        acted: whether the router let an edit act; None where there is none.
        broken_before, broken_after: whether logits that were not finite came up, in what was fed or answered.
    """

    edit: int
    view: EvaluationView
    before: str = ""
    after: str = ""
    legacy: dict[str, float] | None = None
    kl: float | None = None
    acted: bool | None = None
    broken_before: bool = False
    broken_after: bool = False

    @property
    def not_finite(self) -> str | None:
        """ "before", "after" or "both": whose logits were not finite; None where all were."""
        if self.broken_before and self.broken_after:
            return "both"
        return "before" if self.broken_before else "after" if self.broken_after else None

    @property
    def wanted(self) -> str:
        """The wanted answer, "" where none is known."""
        return self.view.query.answer or ""


Metric = Callable[[AskedRow, str], float | None]


def _answered(row: AskedRow, _target: str) -> float | None:
    """Whether the answer is the wanted one, or where it must stay, what it was."""
    if row.view.changes:
        return float(exact_match(row.after, row.wanted) and not row.broken_after)
    return float(row.after == row.before and row.not_finite is None)


def _answered_of_kind(row: AskedRow, target: str) -> float | None:
    """The same of portability questions of one kind: steps that the base model cannot take are 0, and another score."""
    return _answered(row, target) if row.view.changes and row.view.query.kind else None


def _f1(row: AskedRow, _target: str) -> float | None:
    """F1 of the answer's tokens against the wanted ones."""
    if not row.view.changes:
        return None
    return 0.0 if row.broken_after else token_f1(row.after, row.wanted)


def _blindness(row: AskedRow, target: str) -> float | None:
    """Whether a question about another image, or none, gets the edit's target, which was not its answer."""
    if row.view.score not in ("near", "blind") or exact_match(row.before, target):
        return None
    return float(exact_match(row.after, target) and not row.broken_after)


def _routed_in(row: AskedRow, _target: str) -> float | None:
    """A router's true positives."""
    return float(row.acted) if row.acted is not None and row.view.changes else None


def _routed_in_wrongly(row: AskedRow, _target: str) -> float | None:
    """A router's false positives."""
    return float(row.acted) if row.acted is not None and not row.view.changes else None


def _divergence(row: AskedRow, _target: str) -> float | None:
    """KL(before || after) of a question that must stay; inf where there is nothing that could be fed."""
    if row.view.changes:
        return None
    if row.legacy is None:
        return None if row.not_finite is None else math.inf
    return row.kl


def _fed(row: AskedRow, name: str) -> float | None:
    """A mean over the fed answer's tokens; 0 where the unedited model says nothing finite that could be fed."""
    if row.legacy is None:
        return None if row.not_finite is None else 0.0
    return row.legacy[name]


def _tokens(row: AskedRow, _target: str) -> float | None:
    """Teacher-forced accuracy, or where the answer must stay, agreement of the argmax."""
    return _fed(row, "accuracy" if row.view.changes else "top1")


def _ten_best(row: AskedRow, _target: str) -> float | None:
    """Rank-ordered agreement of the ten best tokens, of the two localities."""
    localities = ("text_locality", "image_locality")
    return _fed(row, "top10") if row.view.score.removesuffix("_unseen") in localities else None


#: By protocol, columns in their order; "{score}" is the question's score and "{kind}" its kind.
METRICS: Mapping[str, Mapping[str, Metric]] = {
    "legacy": {"{score}": _tokens, "{score}_top10": _ten_best},
    "strict": {
        "{score}": _answered,
        "{score}[{kind}]": _answered_of_kind,
        "{score}_f1": _f1,
        "blindness": _blindness,
        "routed_in": _routed_in,
        "routed_in_wrongly": _routed_in_wrongly,
        "{score}_kl": _divergence,
    },
}
