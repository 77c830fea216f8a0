"""Rewordings by rules: what is asked stays, and nothing is lost to them."""

from __future__ import annotations

import random

import pytest

from fastedit.fitting import wordings
from fastedit.fitting.wordings import SMALL, reworded
from fastedit.pocket import unseen
from fastedit.pocket.factory.wording import normal
from fastedit.pocket.templates import TEMPLATES

QUESTION = "What is the colour of the circle?"


def made(question: str, count: int = 300) -> set[str]:
    return {reworded(question, random.Random(seed)) for seed in range(count)}


def test_a_question_is_put_in_many_ways_and_the_same_for_the_same_state() -> None:
    assert len(made(QUESTION)) > 100
    assert reworded(QUESTION, random.Random(7)) == reworded(QUESTION, random.Random(7))


def test_words_that_matter_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the misspelt ones: no rule makes another question of one."""
    rules = [rule for rule in wordings._RULES if rule is not wordings._misspelt]
    monkeypatch.setattr(wordings, "_RULES", rules)
    for templates in TEMPLATES.values():
        for question in templates:
            matter = {word.strip("?.,{}").lower() for word in question.split()} - SMALL - {"", "tell", "name", "give"}
            for text in made(question, 40):
                assert matter <= {word.strip("?.,:;!{}").lower() for word in text.split()}, text


def test_no_rule_makes_a_wording_that_only_measures() -> None:
    """Rewordings of what training shows are none of the embedded sets' unseen wordings."""
    for kind, wordings_held_out in unseen.TEMPLATES.items():
        held_out = {normal(wording) for wording in wordings_held_out}
        for question in TEMPLATES.get(kind, ()):
            assert not held_out & {normal(text) for text in made(question, 200)}, question


@pytest.mark.parametrize("question", ["A picture of", "Why?", "is the", "?", "汉字是什么？", "x " * 200])
def test_any_text_comes_back_as_text(question: str) -> None:
    assert all(text.strip() for text in made(question, 60))


def test_one_word_is_misspelt_by_a_letter_or_two() -> None:
    for seed in range(50):
        text = wordings._misspelt(QUESTION, random.Random(seed))
        changed = [(a, b) for a, b in zip(QUESTION.split(), text.split(), strict=True) if a != b]
        for before, after in changed:
            assert before[0] == after[0]
            assert sorted(before) == sorted(after) or len(before) == len(after) + 1
        assert len(changed) <= 1
