from __future__ import annotations

import dataclasses
import random

import pytest

from fastedit.pocket.further import polite
from fastedit.smol.edits import draw
from fastedit.smol.further import _siblings
from fastedit.smol.grammar import PLACES, Question
from fastedit.smol.names import SETS
from fastedit.smol.templates import TEMPLATES, UNSEEN


@pytest.mark.parametrize("name", SETS)
def test_further_questions_are_in_words_that_the_record_does_not_use(name: str) -> None:
    scores = set()
    for record in (draw(name, "eval", number) for number in range(50)):
        if record is None:
            continue
        own = {record.prompt, record.rephrase}
        for one in record.further:
            scores.add(one.kind)
            assert one.answer is not None
            if one.kind.startswith(("text_generality", "image_generality")):
                assert one.prompt not in own
                assert one.answer == record.truth
            if one.kind == "sibling":
                assert one.answer not in (record.truth, record.target)
                assert one.scene == record.scene
            if one.kind == "polite":
                assert one.prompt != record.prompt
            if one.kind == "contrary":
                assert one.answer == "no"
        wordings = [one.prompt for one in record.further if one.kind == "text_generality_unseen"]
        assert len(set(wordings)) == 2
    assert scores >= {"text_generality_unseen", "image_generality_unseen", "polite", "near_unseen", "same_unseen"}
    assert ("sibling" in scores) == (name == "icon-vqa")


def test_a_polite_question_is_none_of_either_set() -> None:
    rng = random.Random(0)
    every = {template for both in (TEMPLATES, UNSEEN) for templates in both.values() for template in templates}
    forms = {polite("What is this?", rng) for _ in range(60)}
    assert {"What is this, please?", "What is this ?", "Please, what is this?"} <= forms
    assert not forms & every


def test_the_other_thing_is_no_sibling_where_its_answer_is_the_target() -> None:
    record = next(one for one in (draw("icon-vqa", "eval", n) for n in range(50)) if one and one.kind == "at")
    question = Question("at", (PLACES[next(one.cell for one in record.scene.shown if one.name == record.truth)],), "")
    (sibling,) = _siblings(record, question)
    assert sibling.answer in record.scene.names
    assert _siblings(dataclasses.replace(record, target=str(sibling.answer)), question) == []
