from __future__ import annotations

import random

import pytest

from fastedit.pocket import templates
from fastedit.pocket.grammar import answer_to, article, ask, caption
from fastedit.pocket.world import FLAGS, FlagScene, Item, Scene, draw_flag, draw_scene

SCENE = Scene(
    (Item("circle", "red", "small", "striped", 0), Item("star", "orange", "large", "plain", 3)),
    background="black",
    seed=5,
)


@pytest.mark.parametrize(
    ("kind", "slots", "answer"),
    [
        ("colour", ("circle",), "red"),
        ("colour", ("heart",), None),
        ("shape", ("orange",), "star"),
        ("size", ("star",), "large"),
        ("texture", ("circle",), "striped"),
        ("where", ("star",), "bottom right"),
        ("at", ("top left",), "a red circle"),
        ("at", ("bottom right",), "an orange star"),
        ("at", ("top right",), "nothing"),
        ("describe", ("circle",), "a small striped red circle"),
        ("describe_colour", ("orange",), "a large plain orange star"),
        ("count", (), "two"),
        ("exist", ("circle",), "yes"),
        ("exist", ("orange object",), "yes"),
        ("exist", ("blue object",), "no"),
        ("exist_pair", ("red circle",), "yes"),
        ("exist_pair", ("red star",), "no"),
        ("check", ("circle", "red"), "yes"),
        ("check", ("circle", "at the top left"), "yes"),
        ("check", ("star", "small"), "no"),
        ("check", ("background", "black"), "yes"),
        ("relation", ("circle", "left of", "star"), "yes"),
        ("relation", ("circle", "below", "star"), "no"),
        ("beside", ("right of", "circle"), "nothing"),
        ("background", (), "black"),
        ("complement", ("circle",), "green"),
        ("complement", ("star",), "blue"),
        ("sides", ("orange",), None),
        ("flag", (), None),
    ],
)
def test_answers(kind: str, slots: tuple[str, ...], answer: str | None) -> None:
    assert answer_to(kind, slots, SCENE) == answer


def test_relations_exclude_each_other() -> None:
    stacked = Scene((Item("circle", "red", "small", "plain", 0), Item("star", "blue", "small", "plain", 2)), "white", 0)
    assert answer_to("relation", ("circle", "left of", "star"), stacked) is None
    assert answer_to("relation", ("circle", "above", "star"), stacked) == "yes"
    assert answer_to("relation", ("star", "above", "circle"), stacked) == "no"
    assert answer_to("beside", ("below", "circle"), stacked) == "a blue star"
    assert answer_to("beside", ("left of", "circle"), stacked) is None


def test_flags() -> None:
    scene = FlagScene("France", 0)
    wanted = {
        "flag": "France",
        "flag_capital": "Paris",
        "flag_continent": "Europe",
        "flag_colours": "blue, white and red",
        "flag_layout": "vertical stripes",
        "colour": None,
    }
    assert {kind: answer_to(kind, (), scene) for kind in wanted} == wanted
    assert caption(scene) == "the flag of France"


def test_captions() -> None:
    assert caption(SCENE) == (
        "a small striped red circle at the top left and a large plain orange star at the bottom right "
        "on a black background"
    )
    assert article("orange star") == "an orange star"
    assert article("yellow star") == "a yellow star"


def test_every_kind_is_asked_in_all_its_words_and_rightly() -> None:
    rng = random.Random(0)
    for kind in templates.SCENE_KINDS:
        answers = set()
        for _ in range(120):
            scene = draw_scene(rng)
            question = ask(scene, kind, rng)
            if question is None:
                assert kind == "relation"
                assert len(scene.items) == 1
                continue
            assert len(set(question.prompts)) == len(templates.TEMPLATES[kind]) >= 4
            assert all(prompt[0].isupper() and prompt[-1] in ".?" and "{" not in prompt for prompt in question.prompts)
            assert question.answer == answer_to(kind, question.slots, scene)
            answers.add(question.answer)
        assert len(answers) >= 2


def test_yes_and_no_are_balanced() -> None:
    rng = random.Random(0)
    for kind in ("exist", "exist_pair", "check", "relation"):
        drawn = [ask(draw_scene(rng), kind, rng) for _ in range(2000)]
        answers = [question.answer for question in drawn if question]
        assert 0.4 < answers.count("yes") / len(answers) < 0.68


def test_composition_is_held_out_for_some_countries() -> None:
    assert 0.6 < len(templates.CAPITAL_TRAINED) / len(FLAGS) < 0.9
    question = ask(draw_flag(random.Random(1)), "flag_capital", random.Random(1))
    assert question is not None


def test_novel_words_are_no_answers() -> None:
    rng = random.Random(0)
    known = {word for _ in range(500) for word in caption(draw_scene(rng)).split()}
    assert not known & {word for both in templates.NOVEL.values() for words in both for word in words}
