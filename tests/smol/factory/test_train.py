"""What is asked in training, of what, and how parameters are stepped."""

from __future__ import annotations

import random

import pytest
import torch

from fastedit.smol import templates
from fastedit.smol.concepts import concepts
from fastedit.smol.factory import measure, teacher
from fastedit.smol.factory.mixture import Mixture
from fastedit.smol.factory.optimiser import Optimiser
from fastedit.smol.factory.teacher import Taught
from fastedit.smol.factory.train import _asked
from fastedit.smol.facts import facts
from fastedit.smol.grammar import SCENE_KINDS
from fastedit.smol.split import concepts_of

TEXTS = [(f"What is {number}?", str(number)) for number in range(9)]


def taught(answer: str | None = None) -> list[Taught]:
    return [
        Taught(fact.relation, fact.subject, fact.prompts()[0], answer or fact.answer, fact.answer) for fact in facts()
    ]


def words(kinds: dict[str, tuple[str, ...]]) -> set[str]:
    return {template for each in kinds.values() for template in each if "{}" not in template}


class TestMixture:
    def test_no_question_is_put_in_unseen_words(self) -> None:
        mixture = Mixture(_asked(taught()), TEXTS, seed=0)
        lines = [line for _ in range(200) for line in mixture.draw()[1]]
        asked = {line.question for line in lines}
        assert asked & words(templates.TEMPLATES)
        assert not asked & (words(templates.UNSEEN) - words(templates.TEMPLATES))

    def test_every_kind_is_asked_and_texts_without_the_picture(self) -> None:
        mixture = Mixture(_asked(taught()), TEXTS, seed=0)
        lines = [line for _ in range(300) for line in mixture.draw()[1]]
        assert {line.kind for line in lines} >= {*SCENE_KINDS, "text"}
        short = [line for _ in range(300) for line in mixture.draw_short()[1]]
        assert {line.kind for line in short} == {"name", "flag", "at", "flag_at"}
        assert any(line.kind.startswith("knows:") for line in lines)
        assert all(line.with_image == (line.kind != "text") for line in lines)

    def test_what_was_not_named_is_drawn_more_often(self) -> None:
        mixture = Mixture({}, TEXTS, seed=0)
        for _ in range(30):
            mixture.note("banana", is_right=False)
            for concept in concepts():
                if concept.name != "banana":
                    mixture.note(concept.name, is_right=True)
        drawn = [name for _ in range(600) for name in mixture.draw()[0].names]
        assert drawn.count("banana") > 2 * len(drawn) / len(concepts())


class TestAsked:
    def test_only_train_concepts_are_asked_what_they_are_known_for(self) -> None:
        asked = _asked(taught())
        assert asked
        assert set(asked) <= set(concepts_of("train"))
        assert not any(
            teacher.kept_for_measuring(fact.relation, fact.subject) for each in asked.values() for fact in each
        )

    def test_what_the_language_model_gets_wrong_is_not_asked(self) -> None:
        assert not _asked(taught("a sentence"))


def test_a_quarter_of_the_facts_is_kept_for_measuring() -> None:
    kept = [teacher.kept_for_measuring(fact.relation, fact.subject) for fact in facts()]
    assert 0.2 < sum(kept) / len(kept) < 0.3


def test_patterns_are_answered_questions_of_the_relation() -> None:
    text, subjects = teacher.pattern("capital")
    assert text.count("Question: ") == text.count(" Short answer: ") == text.count("\n") == len(subjects) == 3


def test_measured_pictures_ask_in_both_sets_of_wordings() -> None:
    scene, lines = next(measure.names(1))
    assert [line.kind for line in lines] == ["name", "name/unseen"]
    assert lines[0].answer == lines[1].answer == scene.names[0]
    assert lines[1].question in templates.UNSEEN["name"]
    kinds = [line.kind for _, lines in measure.others(5) for line in lines]
    assert all(kinds.count(kind) == 5 for kind in SCENE_KINDS if kind not in ("name", "flag"))


def test_measured_knowledge_says_what_was_trained() -> None:
    asked = _asked(taught())
    for scene, lines in measure.knowledge(taught()):
        for line in lines:
            relation, where = line.kind.split("/")
            trained = relation in {fact.relation for fact in asked.get(scene.names[0], ())}
            assert where == "text" or (where == "trained") == trained
            assert line.with_image == (where != "text")


class TestOptimiser:
    def test_matrices_that_are_no_embedding_and_no_adapter_are_stepped_by_muon(self) -> None:
        named = {name: torch.nn.Parameter(torch.ones(4, 4)) for name in ("map.weight", "embed.weight", "adapter_up")}
        optimiser = Optimiser(named.items(), 10, matrix_lr=0.1, rest_lr=0.01, warm_up=1)
        muon, adam = (part.param_groups[0]["params"] for part in optimiser._parts)
        assert [id(each) for each in muon] == [id(named["map.weight"])]
        assert len(adam) == 2

    def test_a_gradient_that_is_not_finite_changes_nothing(self) -> None:
        weight = torch.nn.Parameter(torch.ones(3))
        optimiser = Optimiser([("bias", weight)], 10, matrix_lr=0.1, rest_lr=0.1, warm_up=1)
        optimiser.step((weight * torch.tensor([1.0, float("inf"), 1.0])).sum())
        assert weight.tolist() == [1, 1, 1]
        optimiser.step(weight.sum())
        assert (weight < 1).all()

    def test_gradients_are_averaged_before_the_step(self) -> None:
        weight = torch.nn.Parameter(torch.ones(3))
        optimiser = Optimiser([("bias", weight)], 10, matrix_lr=0.1, rest_lr=0.1, warm_up=1)

        def average() -> None:
            assert weight.grad is not None
            weight.grad.zero_()

        assert optimiser.step(weight.sum(), average) == pytest.approx(0)


def test_names_are_measured_on_pictures_of_their_own() -> None:
    first = [scene.seed for scene, _ in measure.names(2)]
    assert len(set(first)) == 2 * len(concepts())
    assert first == [scene.seed for scene, _ in measure.names(2)]
    assert first[0] != random.Random(0).getrandbits(32)
