from __future__ import annotations

import functools
import random

import pytest

from fastedit.pocket import templates, unseen
from fastedit.pocket.edits import FURTHER, Record, draw
from fastedit.pocket.further import polite
from fastedit.pocket.names import SETS
from fastedit.pocket.world import AnyScene

ALWAYS = {"text_generality_unseen", "polite", "near_unseen", "text_locality_unseen", "image_locality_unseen",
          "negated", "contrary", "image_generality_unseen", "same_unseen"}  # fmt: skip


@functools.cache
def records(name: str) -> list[Record[AnyScene]]:
    return [record for record in (draw(name, "eval", number) for number in range(60)) if record]


@pytest.mark.parametrize("name", SETS)
def test_a_record_asks_each_further_question_once(name: str) -> None:
    for record in records(name):
        kinds = [one.kind for one in record.further]
        assert len(kinds) == len(set(kinds)) <= FURTHER
        assert set(kinds) >= ALWAYS
    assert any(one.kind == "sibling" for record in records(name) for one in record.further) == (name == "pocket-vqa")


@pytest.mark.parametrize("name", SETS)
def test_answers_before_the_edit(name: str) -> None:
    for record in records(name):
        asked = {one.kind: one for one in record.further}
        assert asked["text_generality_unseen"].answer == asked["polite"].answer == record.truth
        assert asked["text_generality_unseen"].prompt not in (record.prompt, record.rephrase)
        assert asked["near_unseen"].answer == record.near[0].answer
        assert asked["text_locality_unseen"].answer == record.fact.answer
        assert asked["text_locality_unseen"].scene is None
        assert asked["image_locality_unseen"].scene == record.locality.scene
        assert asked["contrary"].answer == "no"
        assert asked["image_generality_unseen"].scene == record.rephrased
        assert asked["image_generality_unseen"].answer == record.truth
        assert asked["same_unseen"].scene == record.scene
        assert asked["same_unseen"].answer == record.same[0].answer
        worded = {asked[kind].prompt for kind in asked if kind.endswith("_unseen")}
        assert not worded & {one.prompt for one in record.unedited()}
        for kind in ("negated", "contrary", "sibling"):
            if kind in asked:
                assert asked[kind].scene == record.scene
        if "sibling" in asked:
            assert asked["sibling"].answer not in (record.truth, record.target)
            assert asked["sibling"].prompt != record.prompt


def test_negated_questions_are_answered_both_ways() -> None:
    answers = [one.answer for record in records("pocket-vqa") for one in record.further if one.kind == "negated"]
    assert {"yes", "no"} == set(answers)
    assert all("no" in one.prompt or "not" in one.prompt or "false" in one.prompt
               for record in records("pocket-vqa") for one in record.further if one.kind == "negated")  # fmt: skip


def test_a_polite_question_is_of_neither_set() -> None:
    rng = random.Random(0)
    sets = (templates.TEMPLATES, templates.MORE, unseen.TEMPLATES)
    every = {template for each in sets for wordings in each.values() for template in wordings}
    forms = {polite("What colour is the {}?", rng) for _ in range(60)}
    assert {"What colour is the {}, please?", "What colour is the {} ?", "Please, what colour is the {}?"} <= forms
    assert not forms & every
