"""Numbers that are none: a base model that gives no finite logits, and what a run says of fits and answers without."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence

import torch

from fastedit.backbone import EditableModel
from fastedit.backbone.generation import Reader, likeliest
from fastedit.evaluation import EditScores
from fastedit.fitting.solver import FitOutcome
from fastedit.requests import EditRequest, Query

#: Questions that are asked before a model is called broken; a sound one is asked the first.
ASKED = 8


@torch.no_grad()
def check_finite(model: EditableModel, edits: Sequence[EditRequest]) -> None:
    """Refuse a model whose logits are not finite on any of the first questions: no edit of it means anything.

    Raises:
        ValueError: see there.
    """
    asked = edits[:ASKED]
    for edit in asked:
        reader = Reader(model, model.encode([Query(edit.prompt, edit.image)], answers=False), 1)
        if likeliest(model.head(reader.read()))[1][0]:
            return
    raise ValueError(
        f"edit: the logits of the model are finite (got NaN or inf for all of the first {len(asked)} questions, before "
        f"any edit, from {model.name} in {str(model.dtype).removeprefix('torch.')})"
    )


def not_finite(scored: Sequence[EditScores]) -> dict[str, int]:
    """How many answers came of logits that were not finite, before the edit and in all, and of how many."""
    marks = [answer.get("not_finite") for scores in scored for answer in scores.answers]
    return {
        "answers": sum(mark is not None for mark in marks),
        "before": sum(mark in ("before", "both") for mark in marks),
        "of": len(marks),
    }


def warn_of(outcomes: Sequence[FitOutcome], scored: Sequence[EditScores]) -> None:
    """Say once what did not go well: fits that ended worse than they began, answers of logits that are no numbers."""
    ended = Counter(outcome.status for outcome in outcomes)
    if ended["diverged"] + ended["diverging"]:
        message = (
            f"edit: {ended['diverged']} of {len(outcomes)} fits diverged (a value was not finite) and "
            f"{ended['diverging']} were diverging (see FitOutcome); a smaller lr may help"
        )
        warnings.warn(message, RuntimeWarning, stacklevel=4)
    found = not_finite(scored)
    if found["answers"]:
        message = (
            f"edit: the logits were not finite in {found['answers']} of {found['of']} answers, in {found['before']} "
            "before the edit; they count as wrong and as changed, and are marked 'not_finite'"
        )
        warnings.warn(message, RuntimeWarning, stacklevel=4)
