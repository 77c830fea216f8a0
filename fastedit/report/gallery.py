"""Edits as a page shows them: every question with its picture, the answer before and after, and whether it is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastedit.evaluation import MUST_STAY, evaluation_views, exact_match
from fastedit.report.pictures import Pictures, more_words
from fastedit.report.words import STATUSES, score_meaning
from fastedit.requests import EditRequest
from fastedit.visuals import VisualSource

#: Most edits of a gallery, and most questions and characters of a text that one of them shows.
MOST_EDITS, MOST_QUESTIONS, MOST_TEXT = 48, 40, 280


@dataclass(frozen=True)
class Question:
    """One question of an edit.

    Args:
        score: what it is asked for, in words. changes: whether the answer must become ``wanted``, or stay.
        prompt, wanted, before, after: texts. right: whether the answer is as it must be.
        pictures: class names. more: what there is beside them.
    """

    score: str
    changes: bool
    prompt: str
    wanted: str
    before: str
    after: str
    right: bool
    pictures: Sequence[str] = ()
    more: str = ""


@dataclass(frozen=True)
class Card:
    """One edit.

    Args:
        number: from 1. id: of the record. status: how it was fitted, in words.
        holds: whether its own question gets the new answer; None where it was not scored.
        missed, disturbed: questions that must change and did not, must stay and did not.
        questions: the edit's own first. left_out: questions that are not shown.
        prompt, target: of an edit that was not scored.
    """

    number: int
    id: str
    status: str
    holds: bool | None
    missed: int
    disturbed: int
    questions: Sequence[Question]
    left_out: int = 0
    prompt: str = ""
    target: str = ""

    @property
    def failed(self) -> bool:
        """Whether anything of it is not as it must be."""
        return self.holds is False or self.missed + self.disturbed > 0


def must_change(answer: Mapping[str, Any]) -> bool:
    """Whether a recorded question is one whose answer must change."""
    return answer["score"] not in MUST_STAY


def is_right(answer: Mapping[str, Any]) -> bool:
    """Whether a recorded answer is as it must be, by the strict protocol."""
    broken = answer.get("not_finite")
    if must_change(answer):
        return exact_match(answer["after"], answer["wanted"] or "") and broken not in ("after", "both")
    return answer["after"] == answer["before"] and broken is None


def holds(edit: Mapping[str, Any]) -> bool | None:
    """Whether an edit's own question gets the new answer; None where it was not scored."""
    own = [answer for answer in edit.get("answers", ()) if answer["score"] == "reliability"]
    return all(map(is_right, own)) if own else None


def is_failed(edit: Mapping[str, Any]) -> bool:
    """Whether any answer of an edit is not as it must be."""
    return not all(map(is_right, edit.get("answers", ())))


def chosen_numbers(failed: Sequence[bool], most: int = MOST_EDITS) -> list[int]:
    """Numbers of the edits that a gallery shows: all, or the first of those that failed and of those that did not."""
    if len(failed) <= most:
        return list(range(len(failed)))
    bad = [number for number, each in enumerate(failed) if each]
    good = [number for number, each in enumerate(failed) if not each]
    n_bad = min(len(bad), max(most // 2, most - len(good)))
    return sorted(bad[:n_bad] + good[: most - n_bad])


def make_card(number: int, edit: Mapping[str, Any], request: EditRequest | None, pictures: Pictures) -> Card:
    """The card of an edit.

    Args:
        number: of the edit, from 0. edit: its entry in a run's record. request: None shows no pictures.
        pictures: of the page.
    """
    answers = edit.get("answers", ())
    visuals = _visuals(answers, request)
    questions = [
        _question(answer, visual, pictures)
        for answer, visual in zip(answers[:MOST_QUESTIONS], visuals[:MOST_QUESTIONS], strict=True)
    ]
    wrong = [answer for answer in answers if not is_right(answer)]
    missed = sum(must_change(answer) for answer in wrong)
    return Card(
        number + 1, shortened(edit["id"]), STATUSES.get(edit["status"], edit["status"]), holds(edit), missed,
        len(wrong) - missed, questions, max(0, len(answers) - MOST_QUESTIONS),
        "" if request is None else shortened(request.prompt), "" if request is None else shortened(request.target),
    )  # fmt: skip


def shortened(text: str | None) -> str:
    """A text that has room on a page."""
    text = text or ""
    return text if len(text) <= MOST_TEXT else f"{text[: MOST_TEXT - 1]}…"


def _question(answer: Mapping[str, Any], visual: VisualSource | None, pictures: Pictures) -> Question:
    names = pictures.of(visual)
    return Question(
        score_meaning(answer["score"]).title, must_change(answer), shortened(answer["prompt"]),
        shortened(answer["wanted"]), shortened(answer["before"]), shortened(answer["after"]), is_right(answer),
        names, more_words(visual, names),
    )  # fmt: skip


def _visuals(answers: Sequence[Mapping[str, Any]], request: EditRequest | None) -> list[VisualSource | None]:
    """What every recorded question was asked about; nothing where a record has other questions than the run."""
    views = [] if request is None else evaluation_views(request)
    if [(view.score, view.query.prompt) for view in views] != [(each["score"], each["prompt"]) for each in answers]:
        return [None] * len(answers)
    return [view.query.image for view in views]
