from __future__ import annotations

import random

import pytest

from fastedit.pocket import facts, templates, unseen
from fastedit.pocket.factory.mixture import KINDS
from fastedit.pocket.factory.wording import normal
from fastedit.pocket.grammar import ask
from fastedit.pocket.phrases import AFTER, FACT_PARTS, PARTS, POLITE, THANKS, base_forms
from fastedit.pocket.world import draw_flag, draw_scene


def _undressed(text: str) -> set[str]:
    """The normal form of a wording, and what is left of it without the politeness that training puts around."""
    whole = normal(text)
    forms = {whole}
    for start in map(normal, POLITE):
        forms |= {form.removeprefix(f"{start} ") for form in forms}
    for end in map(normal, (*THANKS, *AFTER)):
        forms |= {form.removesuffix(f" {end}") for form in forms}
    return forms


@pytest.mark.parametrize("kind", [*KINDS, "caption"])
def test_no_wording_is_in_both_sets(kind: str) -> None:
    shown = {normal(form) for form in base_forms(PARTS["exist" if kind == "exist_pair" else kind])}
    shown |= {normal(form) for form in templates.MORE[kind]}
    shown |= {normal(form) for form in (templates.CAPTION_PROMPTS if kind == "caption" else templates.TEMPLATES[kind])}
    wordings = unseen.TEMPLATES[kind]
    assert len({normal(form) for form in wordings}) == len(wordings) == 9
    for wording in wordings:
        assert not _undressed(wording) & shown, wording


@pytest.mark.parametrize("relation", list(facts.RELATIONS))
def test_no_wording_of_a_fact_is_in_both_sets(relation: str) -> None:
    shown = {normal(form) for form in (*base_forms(FACT_PARTS[relation]), *facts.RELATIONS[relation][1])}
    for wording in unseen.FACTS[relation]:
        assert not _undressed(wording) & shown, wording
    assert unseen.fact("sound", "owl")[0] == "Report the sound of an owl."


def test_a_template_that_training_shows_would_be_found() -> None:
    shown = {normal(form) for form in base_forms(PARTS["colour"])}
    assert _undressed("Please, tell me THE COLOUR of the {} - thank you") & shown
    assert _undressed("what colour is the {}") & shown


def test_every_kind_is_asked_in_unseen_wording_about_the_same_thing() -> None:
    rng = random.Random(0)
    for kind in KINDS:
        question = None
        while question is None:
            question = ask(draw_flag(rng) if kind in templates.FLAG_KINDS else draw_scene(rng), kind, rng)
        assert len(question.unseen) == 9
        assert not set(question.unseen) & set(question.prompts)
        for prompt in question.unseen:
            assert all(slot in prompt for slot in question.slots)
            assert "{" not in prompt
