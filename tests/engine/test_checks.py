"""What makes a run impossible is said before any work."""

from __future__ import annotations

import dataclasses

import pytest

from fastedit import EditRequest
from fastedit.engine.checks import check_conflicts, check_sequence
from fastedit.methods import resolve
from tests.engine.conftest import make_edits, picture


@pytest.fixture
def edit() -> EditRequest:
    return make_edits(1)[0]


def test_one_question_has_one_answer(edit: EditRequest) -> None:
    other = dataclasses.replace(edit, target="a dog", prompt=f"  {edit.prompt.upper()} ")
    with pytest.raises(ValueError, match=r"edits\[0\]\.target='.*' and edits\[2\]\.target='a dog'"):
        check_conflicts([edit, make_edits(3)[2], other])


def test_what_differs_in_image_or_question_or_agrees_is_no_conflict(edit: EditRequest) -> None:
    again = dataclasses.replace(edit, target=edit.target.upper())
    elsewhere = dataclasses.replace(edit, image=picture(77), target="a dog")
    in_text = dataclasses.replace(edit, image=None, target="a bird")
    otherwise = dataclasses.replace(edit, prompt="Something else ?", target="a fish")
    check_conflicts([edit, again, elsewhere, in_text, otherwise])


@pytest.mark.parametrize(
    ("mode", "score_at", "message"),
    [
        ("single", (1,), r"score_at belongs to mode='sequential' \(got mode='single', score_at=\(1,\)\)"),
        ("sequential", (0,), r"score_at names numbers of edits, 1 to 4 \(got score_at=\[0\]\)"),
        ("sequential", (2, 5), r"score_at names numbers of edits, 1 to 4 \(got score_at=\[2, 5\]\)"),
    ],
)
def test_gaps_are_numbers_of_edits(mode: str, score_at: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_sequence(resolve("lora", {}), mode, score_at, 4)
    check_sequence(resolve("lora", {}), "sequential", (1, 4), 4)


def test_a_method_without_sequences_says_so() -> None:
    with pytest.raises(ValueError, match=r"ike edits one question at a time and keeps no sequence"):
        check_sequence(resolve("ike", {}), "sequential", (), 4)
    check_sequence(resolve("ike", {}), "single", (), 4)


@pytest.mark.parametrize(("mode", "sample"), [("single", 3), ("sequential", 0)])
def test_a_sample_of_scores_is_of_a_sequence(mode: str, sample: int) -> None:
    with pytest.raises(ValueError, match=r"score_sample is at least 1, or None, and belongs to mode='sequential'"):
        check_sequence(resolve("lora", {}), mode, (), 4, sample)
