"""Questions nearly in the words of another, and which of them ask the same."""

from __future__ import annotations

import random

from fastedit import EditRequest
from fastedit.methods.meta.siblings import Siblings
from fastedit.pocket.templates import TEMPLATES


def record(prompt: str, rephrase: str | None = None) -> EditRequest:
    return EditRequest(prompt, "red", rephrase=rephrase)


RECORDS = [
    record("What colour is the circle?", "What color is the circle?"),
    record("What color is the circle?", "What is the colour of the circle?"),
    record("What colour is the square?"),
    record("Which country has this flag?"),
]


def test_what_any_record_gives_as_a_rephrase_is_no_sibling() -> None:
    found = Siblings(RECORDS).of("what colour is  the circle?", random.Random(0), 5)
    assert found[:1] == ["What colour is the square?"] or "What colour is the square?" in found
    assert not any("circle" in text for text in found)
    assert not any("flag" in text for text in Siblings(RECORDS[:3]).of("Which flag?", random.Random(0), 5))


def test_without_the_record_that_says_so_they_are_two_questions() -> None:
    assert "What color is the circle?" in Siblings([RECORDS[2], record("What color is the circle?")]).of(
        "What colour is the circle?", random.Random(0), 5
    )


def test_draws_are_the_same_for_the_same_state_and_no_more_than_asked() -> None:
    known = Siblings([record(text.format("circle")) for text in TEMPLATES["colour"]])
    first = known.of("What colour is the square?", random.Random(3), 2)
    assert len(first) == 2
    assert first == known.of("What colour is the square?", random.Random(3), 2)
    assert Siblings([]).of("Why?", random.Random(0), 2) == []
