from __future__ import annotations

from collections import Counter

import pytest

from fastedit.smol.concepts import concepts
from fastedit.smol.facts import TWO_HOP, facts, this_one
from fastedit.smol.templates import WORDINGS


@pytest.mark.parametrize(
    ("relation", "subject", "answer"),
    [
        ("sound", "dog", "bark"),
        ("legs", "spider", "eight"),
        ("young", "cat", "kitten"),
        ("food", "panda", "bamboo"),
        ("class", "frog", "amphibian"),
        ("user", "fire truck", "firefighter"),
        ("colour", "fire truck", "red"),
        ("capital", "Mexico", "Mexico City"),
        ("capital_continent", "Japan", "Asia"),
        ("language", "Brazil", "Portuguese"),
    ],
)
def test_a_fact_is_in_the_table(relation: str, subject: str, answer: str) -> None:
    assert [fact.answer for fact in facts() if (fact.relation, fact.subject) == (relation, subject)] == [answer]


def test_every_fact_is_about_a_concept_and_has_wordings() -> None:
    names = {concept.name for concept in concepts()}
    for fact in facts():
        assert fact.subject in names
        assert fact.relation in WORDINGS
        assert fact.answer
    counted = Counter(fact.relation for fact in facts())
    assert min(counted.values()) >= 10
    assert sum(counted.values()) > 1200


def test_a_fact_is_asked_in_text_and_about_its_picture() -> None:
    fact = next(one for one in facts() if (one.relation, one.subject) == ("capital", "Netherlands"))
    assert fact.prompts()[0] == "Which city is the capital of the Netherlands?"
    assert "State the capital of the Netherlands." in fact.prompts(unseen=True)
    assert fact.seen_prompts()[0] == "Which city is the capital of this country?"
    assert not any("Netherlands" in prompt for prompt in fact.seen_prompts() + fact.seen_prompts(unseen=True))
    assert this_one("dog") == ("this animal",)
    assert not fact.two_hop
    assert next(one for one in facts() if one.relation in TWO_HOP).two_hop
