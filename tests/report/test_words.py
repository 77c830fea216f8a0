"""Words for every abbreviation."""

from __future__ import annotations

import pytest

import fastedit
from fastedit.evaluation import MUST_CHANGE, MUST_STAY
from fastedit.report.words import (
    LARGE_MODEL,
    METHODS,
    OBJECTIVES,
    count_of,
    method_words,
    nfu_words,
    score_meaning,
    seconds_words,
)


def test_every_method_has_words() -> None:
    bases = {name.rpartition("+")[2] for name in fastedit.method_names()}
    assert bases <= set(METHODS), bases - set(METHODS)
    assert method_words("odedit+lora") == f"{METHODS['lora']}, {OBJECTIVES['odedit']}"
    assert method_words("lora") == METHODS["lora"]


@pytest.mark.parametrize("name", [*MUST_CHANGE, *MUST_STAY])
def test_every_score_has_words(name: str) -> None:
    meaning = score_meaning(name)
    assert meaning.text
    assert "_" not in meaning.title
    assert ("new words" in meaning.title) == name.endswith("_unseen")


def test_the_utilisation_of_a_small_model_is_not_shown() -> None:
    assert nfu_words(0.41, LARGE_MODEL - 1).startswith("not shown")
    assert nfu_words(0.41, LARGE_MODEL) == "41.0 %"
    assert nfu_words(None, LARGE_MODEL).startswith("not measured")


def test_numbers_are_said_as_people_say_them() -> None:
    assert count_of(1, "edit") == "1 edit"
    assert count_of(1200, "edit") == "1,200 edits"
    assert [seconds_words(s) for s in (0.25, 3.21, 600, 7300)] == ["250 ms", "3.2 s", "10.0 min", "2.0 h"]
