"""Which edits a gallery shows, and what it says of them."""

from __future__ import annotations

from dataclasses import replace

from fastedit.report.gallery import (
    MOST_QUESTIONS,
    MOST_TEXT,
    chosen_numbers,
    holds,
    is_failed,
    is_right,
    make_card,
    must_change,
)
from fastedit.report.pictures import Pictures
from fastedit.requests import Probe
from tests.report.conftest import record_of, some_requests


def test_all_edits_are_shown_where_there_is_room() -> None:
    assert chosen_numbers([True, False, False], most=3) == [0, 1, 2]


def test_half_of_a_full_gallery_are_edits_that_failed() -> None:
    failed = [number % 10 == 9 for number in range(1000)]
    numbers = chosen_numbers(failed, most=20)
    assert len(numbers) == 20
    assert [number for number in numbers if failed[number]] == [9 + 10 * n for n in range(10)]
    assert len(chosen_numbers([True] * 100, most=20)) == 20
    assert sum(number == 50 for number in chosen_numbers([n == 50 for n in range(100)], most=20)) == 1
    few_good = chosen_numbers([n > 2 for n in range(100)], most=20)
    assert few_good == list(range(20))


def test_an_answer_is_right_as_the_strict_protocol_has_it() -> None:
    asked = {"score": "reliability", "wanted": "Two", "before": "one", "after": "2."}
    kept = {"score": "near", "wanted": "one", "before": "one", "after": "one"}
    assert is_right(asked)
    assert is_right(kept)
    assert not is_right({**kept, "after": "One"})
    assert not is_right({**asked, "not_finite": "after"})
    assert is_right({**asked, "not_finite": "before"})
    assert not is_right({**kept, "not_finite": "before"})
    assert must_change({"score": "polite"})
    assert not must_change({"score": "near_unseen"})


def test_right_answers_agree_with_the_scores_of_a_real_run(run_of_three: object) -> None:
    for edit in run_of_three.record()["edits"]:  # type: ignore[attr-defined]
        for name, score in edit["strict"].items():
            right = [is_right(answer) for answer in edit["answers"] if answer["score"] == name]
            if right:
                assert sum(right) / len(right) == score, name


def test_a_card_counts_what_went_wrong_and_has_pictures() -> None:
    requests = some_requests()
    record = record_of(requests, failing=[1])
    pictures = Pictures()
    good, bad = (make_card(n, record["edits"][n], requests[n], pictures) for n in (0, 1))
    assert (good.holds, good.missed, good.disturbed, good.failed) == (True, 0, 0, False)
    assert (bad.holds, bad.missed, bad.disturbed, bad.failed) == (False, 4, 1, True)
    assert is_failed(record["edits"][1])
    assert holds(record["edits"][0])
    shown = {question.score: question.pictures for question in good.questions}
    assert shown["Reliability"] == shown["Text generality"] == shown["Other question"]
    assert shown["Reliability"] != shown["Image locality"] != shown["Other picture"]
    assert shown["Text locality"] == shown["No picture"] == []


def test_records_of_other_questions_lend_no_pictures() -> None:
    requests = some_requests()
    record = record_of(requests)
    other = replace(requests[0], rephrase="Something else?")
    card = make_card(0, record["edits"][0], other, Pictures())
    assert all(question.pictures == [] for question in card.questions)


def test_texts_and_questions_are_bounded() -> None:
    probes = tuple(Probe("same", f"Is it {n}?" + "x" * 5000) for n in range(MOST_QUESTIONS))
    request = replace(some_requests(1)[0], probes=probes)
    card = make_card(0, record_of([request])["edits"][0], request, Pictures())
    assert len(card.questions) == MOST_QUESTIONS
    assert card.left_out == 6
    assert all(len(question.prompt) <= MOST_TEXT for question in card.questions)


def test_an_edit_that_was_not_scored_says_what_was_asked_for() -> None:
    request = some_requests(1)[0]
    card = make_card(0, {"id": "a", "status": "computed", "steps": 0}, request, Pictures())
    assert (card.holds, card.prompt, card.target) == (None, request.prompt, request.target)
    assert not card.failed
