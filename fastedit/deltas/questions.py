"""Which questions deltas answer, so that of two answers to one question the later stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

#: Name of the text: a line for every edit in the delta, "" where its question is not known.
QUESTIONS = "questions"


def questions_of(texts: Mapping[str, str]) -> tuple[str, ...]:
    """What identifies the questions of a delta's edits, in order; () where none is known."""
    return tuple(texts[QUESTIONS].split("\n")) if QUESTIONS in texts else ()


def joined_questions(texts: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The text of several deltas together; none where it is not known of one."""
    if not all(QUESTIONS in each for each in texts):
        return {}
    return {QUESTIONS: "\n".join(each[QUESTIONS] for each in texts)}


def newest(questions: Sequence[Sequence[str]]) -> list[int]:
    """By delta, which one answers instead: the last that has its question too; itself where it has several or none.

    Args:
        questions: of each delta, in the order in which they were made.
    """
    last = {question: number for number, asked in enumerate(questions) for question in asked if question}
    return [last.get(asked[0], number) if len(asked) == 1 else number for number, asked in enumerate(questions)]


def standing(texts: Sequence[Mapping[str, str]], entries: int) -> Tensor:
    """(entries,) 1 at those of edits whose question no later one has, every edit having as many; 1 where not known."""
    questions = questions_of(joined_questions(texts))
    if not questions or entries % len(questions):
        return torch.ones(entries)
    later = newest([[question] for question in questions])
    marks = torch.tensor([float(number == edit) for edit, number in enumerate(later)])
    return marks.repeat_interleave(entries // len(questions))


def latest_best(scores: Tensor, texts: Sequence[Mapping[str, str]]) -> Tensor:
    """(R,) the delta with the largest of the scores (R, B), or -1 where all are -inf.

    Of equal ones it is the latest, and of those that answer one question the newest.
    """
    return best_of(scores, answering(texts))


def answering(texts: Sequence[Mapping[str, str]]) -> Tensor:
    """(B,) int64: by delta, which one answers where it is chosen (``newest``)."""
    return torch.tensor(newest([questions_of(each) for each in texts]), dtype=torch.long)


def best_of(scores: Tensor, later: Tensor) -> Tensor:
    """What ``latest_best`` gives, of deltas whose ``answering`` (B,) is known."""
    best = scores.amax(dim=1)
    number = torch.arange(scores.shape[1], device=scores.device)
    chosen = torch.where(scores == best[:, None], number, -1).amax(dim=1)
    return torch.where(best > -torch.inf, later.to(scores.device)[chosen], -1)
