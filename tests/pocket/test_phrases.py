from __future__ import annotations

import pytest

from fastedit.pocket import facts, templates
from fastedit.pocket.phrases import FACT_PARTS, FRAMES, PARTS, base_forms

ASKED = (*templates.SCENE_KINDS, *templates.FLAG_KINDS, *templates.CLAIM_KINDS, *templates.FLAG_CLAIM_KINDS, "caption")


@pytest.mark.parametrize("kind", [kind for kind in ASKED if kind != "exist_pair"])
def test_every_phrase_has_the_slots_of_its_kind(kind: str) -> None:
    slots = 0 if kind == "caption" else templates.TEMPLATES[kind][0].count("{}")
    forms = list(base_forms(PARTS[kind]))
    assert len(set(forms)) >= 25
    assert {form.count("{}") for form in forms} == {slots}
    assert {form.count("{}") for form in templates.MORE[kind]} == {slots}
    assert len(templates.MORE[kind]) == 8


def test_every_relation_has_phrases_with_its_subject() -> None:
    assert FACT_PARTS.keys() == facts.RELATIONS.keys()
    for parts in FACT_PARTS.values():
        assert {form.count("{}") for form in base_forms(parts)} == {1}


def test_every_frame_holds_one_phrase() -> None:
    assert all(frame.count("{}") == 1 for frames in FRAMES.values() for frame in frames)
