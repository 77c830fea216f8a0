from __future__ import annotations

import random

import pytest

from fastedit.smol.concepts import flags, icons
from fastedit.smol.grammar import SCENE_KINDS, answer_to, ask, askable, caption, knowledge, seen_as
from fastedit.smol.scenes import Scene, Shown, draw_scene
from fastedit.smol.templates import TEMPLATES, UNSEEN, WORDINGS

DOG = Scene((Shown("dog", "centre"),), "blue", 0)
JAPAN = Scene((Shown("Japan", "centre"),), "orange", 0)
PAIR = Scene((Shown("dog", "left"), Shown("grapes", "right")), "red", 0)
STACK = Scene((Shown("Japan", "top"), Shown("Netherlands", "bottom")), "white", 0)
THREE = Scene((Shown("cat", "top left"), Shown("cat", "top right"), Shown("cat", "bottom right")), "green", 0)


@pytest.mark.parametrize(
    ("kind", "slots", "scene", "answer"),
    [
        ("name", (), DOG, "dog"),
        ("name", (), JAPAN, None),
        ("flag", (), JAPAN, "Japan"),
        ("at", ("on the right",), PAIR, "grapes"),
        ("at", ("at the top",), PAIR, None),
        ("at", ("at the top",), STACK, None),
        ("flag_at", ("at the bottom",), STACK, "Netherlands"),
        ("where", ("the dog",), PAIR, "left"),
        ("where", ("the flag of the Netherlands",), STACK, "bottom"),
        ("where", ("the dog",), DOG, None),
        ("beside", ("the grapes",), PAIR, "dog"),
        ("count", (), THREE, "three"),
        ("count", (), PAIR, "two"),
        ("background", (), JAPAN, "orange"),
        ("exist", ("a cat",), THREE, "yes"),
        ("exist", ("a cat",), PAIR, "no"),
        ("exist", ("the flag of Japan",), JAPAN, "yes"),
        ("absent", ("a cat",), PAIR, "yes"),
        ("absent", ("a cat",), THREE, "no"),
        ("is_count", ("three",), THREE, "yes"),
        ("is_count", ("three",), PAIR, "no"),
        ("is_background", ("red",), PAIR, "yes"),
        ("is_background", ("blue",), PAIR, "no"),
        ("caption", (), DOG, "a dog on a blue background"),
        ("caption", (), JAPAN, "the flag of Japan on an orange background"),
        ("caption", (), PAIR, "a dog to the left of grapes on a red background"),
        ("caption", (), STACK, "the flag of Japan above the flag of the Netherlands on a white background"),
        ("caption", (), THREE, None),
    ],
)
def test_right_answers_follow_from_the_scene(
    kind: str, slots: tuple[str, ...], scene: Scene, answer: str | None
) -> None:
    assert answer_to(kind, slots, scene) == answer


def test_every_kind_is_asked_and_its_answer_is_that_of_its_slots() -> None:
    rng = random.Random(0)
    asked = set()
    for number in range(300):
        group = icons() if number % 2 else flags()
        layout = ("one", "pair", "copies")[number % 3]
        scene = draw_scene(rng, tuple(concept.name for concept in group), layout=layout)
        for kind in askable(scene):
            question = ask(scene, kind, rng)
            assert question is not None
            assert question.answer == answer_to(kind, question.slots, scene)
            assert not any("{" in prompt for prompt in question.prompts + question.unseen)
            asked.add(kind)
    assert asked == set(SCENE_KINDS)
    assert caption(THREE) is None


def test_both_sets_of_wordings_are_large_enough_and_share_none() -> None:
    lowered = {
        name: {kind: {one.casefold().rstrip("?.") for one in templates[kind]} for kind in WORDINGS}
        for name, templates in (("seen", TEMPLATES), ("unseen", UNSEEN))
    }
    for kind in WORDINGS:
        assert len(lowered["seen"][kind]) >= 6
        assert len(lowered["unseen"][kind]) >= 8
        assert not lowered["seen"][kind] & lowered["unseen"][kind]
        assert any(one[0].islower() and one[-1] not in "?." for one in UNSEEN[kind]), kind
        assert max(len(one) for one in UNSEEN[kind]) > 60, kind


def test_a_question_reads_as_a_sentence() -> None:
    question = knowledge("sound", "dog", "bark", random.Random(0))
    assert question.prompts[0] == "What sound does this animal make?"
    assert "State the sound of this animal." in question.unseen
    assert "waht is the sound of this animal?" in question.unseen
    apple = ask(Scene((Shown("apple", "centre"),), "red", 0), "exist", random.Random(3))
    assert apple is not None
    assert "in the picture" in apple.prompts[0]


def test_a_thing_is_called_by_its_place_where_there_are_two() -> None:
    assert seen_as(DOG.shown[0], DOG) == ("this animal",)
    assert seen_as(PAIR.shown[1], PAIR) == ("the food on the right",)
    assert seen_as(STACK.shown[0], STACK) == ("the country whose flag is at the top",)
