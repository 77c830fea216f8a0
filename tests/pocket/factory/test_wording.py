from __future__ import annotations

import random

import pytest

from fastedit.pocket import facts, templates, unseen
from fastedit.pocket.factory.wording import dressed, filled, normal, worded, worded_fact

SLOTS = {0: (), 1: ("orange object",), 2: ("circle", "at the top left"), 3: ("circle", "left of", "star")}


@pytest.mark.parametrize("kind", ["colour", "check", "relation", "count", "exist_pair", "flag_denied", "caption"])
def test_a_question_names_what_it_asks_about_in_many_wordings(kind: str) -> None:
    rng = random.Random(0)
    template = templates.CAPTION_PROMPTS[0] if kind == "caption" else templates.TEMPLATES[kind][0]
    slots = SLOTS[template.count("{}")]
    drawn = [worded(kind, slots, rng) for _ in range(300)]
    assert len(set(drawn)) > 200
    assert all(slot in prompt for slot in slots for prompt in drawn)
    assert not any("{" in prompt for prompt in drawn)
    second = {with_slots.lower() for with_slots in unseen.worded(kind, slots)} if kind in unseen.TEMPLATES else set()
    assert not second & {prompt.lower() for prompt in drawn}


def test_the_untrained_template_of_a_fact_is_never_shown() -> None:
    rng = random.Random(0)
    for fact in facts.FACTS[::40]:
        untrained = normal(fact.prompts[fact.untrained])
        drawn = [worded_fact(fact, rng) for _ in range(200)]
        assert all(fact.subject.lower() in prompt.lower() for prompt in drawn)
        assert untrained not in {normal(prompt) for prompt in drawn}


def test_a_slot_that_comes_first_has_a_capital_letter_as_a_rule() -> None:
    """As the templates are filled where a fact is asked: what was trained on small letters alone gets it wrong."""
    rng = random.Random(0)
    (hot,) = (fact for fact in facts.FACTS if (fact.relation, fact.subject) == ("opposite", "hot"))
    drawn = [worded_fact(hot, rng) for _ in range(400)]
    first = [sum(prompt.startswith(word) for prompt in drawn) for word in ("Hot ", "hot ")]
    assert first[0] > first[1] > 0


def test_dressing_keeps_the_slots_open() -> None:
    rng = random.Random(0)
    drawn = {dressed("Is the {} {} the {}?", rng) for _ in range(2000)}
    assert all(one.count("{}") == 3 for one in drawn)
    assert "Is the {} {} the {}?" in drawn
    assert "is the {} {} the {}" in drawn
    assert any(one.startswith("Please") for one in drawn)


def test_filled_minds_the_article_and_keeps_the_case() -> None:
    assert filled("is there a {}", ("orange star",)) == "is there an orange star"
    assert filled("A {} is there?", ("owl",)) == "An owl is there?"
