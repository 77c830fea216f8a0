"""What is asked in training, of what, and how parameters are stepped."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastedit.smol import templates
from fastedit.smol.concepts import concepts
from fastedit.smol.factory import measure, teacher
from fastedit.smol.factory.mixture import Mixture
from fastedit.smol.factory.optimiser import Optimiser, orthogonal
from fastedit.smol.factory.packing import Line
from fastedit.smol.factory.speaker import tower_of
from fastedit.smol.factory.teacher import Taught
from fastedit.smol.factory.train import BEGIN, _asked, begin_from, text_lines
from fastedit.smol.facts import facts
from fastedit.smol.grammar import SCENE_KINDS
from fastedit.smol.split import concepts_of

TEXTS = [Line("text", f"What is {number}?", str(number), False) for number in range(9)]
AFTER = [Line("after", "What is it?", "one", False, "Question: What was it? Short answer: two\n")]


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
        assert {line.kind for line in short} == {"name", "flag", "at", "flag_at", "text"}
        assert any(line.kind.startswith("knows:") for line in lines)
        assert all(line.with_image == (line.kind != "text") for line in lines)

    def test_a_text_behind_a_pattern_is_asked_of_some_pictures(self) -> None:
        mixture = Mixture({}, TEXTS, seed=0, after=AFTER)
        rows = [lines for _, lines in (mixture.draw(after=0.5) for _ in range(300))]
        assert 100 < sum(AFTER[0] in lines for lines in rows) < 200
        assert not any(AFTER[0] in mixture.draw(after=0.0)[1] for _ in range(50))
        several = Mixture({}, TEXTS, seed=0, after=[AFTER[0], AFTER[0]])
        assert mixture.draw(after=1.0)[1].count(AFTER[0]) == 1
        assert several.draw(after=2.0)[1].count(AFTER[0]) == 2

    def test_so_many_texts_as_are_asked_for_go_with_a_picture(self) -> None:
        mixture = Mixture({}, TEXTS, seed=0)
        rows = (mixture.draw(texts=5)[1], mixture.draw_short(texts=4)[1])
        assert [sum(line.kind == "text" for line in lines) for lines in rows] == [5, 4]

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

    def test_further_wordings_say_nothing_of_what_is_known(self) -> None:
        more = [dataclasses.replace(one, answer="a sentence", truth="") for one in taught()]
        assert _asked(taught() + more) == _asked(taught())
        assert list(measure.knowledge(taught() + more)) == list(measure.knowledge(taught()))


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

    def test_newton_schulz_in_float32_is_what_torch_computes_in_bfloat16(self) -> None:
        from torch.optim._muon import _zeropower_via_newtonschulz

        coefficients = (3.4445, -4.775, 2.0315)
        for shape in ((24, 40), (40, 24)):
            gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            found = orthogonal(gradient, coefficients, 5, 1e-7)
            torch.testing.assert_close(
                found, _zeropower_via_newtonschulz(gradient, coefficients, 5, 1e-7).float(), rtol=0.05, atol=0.02
            )

    def test_processes_share_a_step(self, tmp_path: Path) -> None:
        alone = shared_step(0, 1, None)
        # Not a Pool, which waits for ever for what a process that ended was asked
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
            asked = [pool.submit(shared_step, rank, 2, tmp_path / "meeting") for rank in range(2)]
            found = [each.result(timeout=300) for each in asked]
        for name, weight in alone.items():
            for each in found:
                np.testing.assert_allclose(each[name], weight, rtol=1e-4, atol=1e-5)


def shared_step(rank: int, processes: int, meeting: Path | None) -> dict[str, Any]:
    """Two steps on a batch of four rows that processes share; returns what is learned."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    module = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Linear(6, 3), torch.nn.Linear(3, 4))
    rows = torch.randn(4, 5)
    if meeting is not None:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=processes, timeout=timedelta(minutes=2)
        )
        rows = rows[2 * rank : 2 * rank + 2]
    optimiser = Optimiser(module.named_parameters(), 10, matrix_lr=0.1, rest_lr=0.01, warm_up=1)
    for _ in range(2):
        optimiser.step(module(rows).square().mean(), rank, processes)
    if meeting is not None:
        torch.distributed.destroy_process_group()
    return {name: weight.detach().numpy() for name, weight in module.named_parameters()}


class TestTextLines:
    def test_a_line_s_end_is_an_end(self) -> None:
        alone, after = text_lines([one_taught("cat"), one_taught("cat", likely=())], Tokens(2, 7))
        assert [line.likely for line in alone] == [(((5, 0.9), (2, 0.1)), ((2, 1.0),)), ()]
        assert [line.likely for line in after] == [alone[0].likely]
        assert after[0].before == teacher.pattern("class")[0]

    def test_what_is_measured_is_not_asked(self) -> None:
        subjects = {fact.subject for fact in facts() if fact.relation == "class"}
        kept = next(name for name in sorted(subjects) if teacher.kept_for_measuring("class", name))
        assert text_lines([one_taught(kept)], Tokens(2, 7)) == ([], [])


class Tokens:
    """An end, and what a line's end is."""

    def __init__(self, end: int, line: int) -> None:
        self.eos_token_id, self._line = end, line

    def __call__(self, _text: str) -> Any:
        return SimpleNamespace(input_ids=[self._line])


def one_taught(subject: str, likely: teacher.Likely = (((5, 0.9), (7, 0.1)), ((7, 1.0),))) -> Taught:
    return Taught("class", subject, "Which class?", "mammal", "mammal", likely)


def test_questions_without_a_known_answer_are_no_facts_and_never_measured() -> None:
    asked = teacher.others()
    every = {(fact.relation, fact.subject) for fact in facts()}
    assert len(asked) > 100
    assert not every & {(fact.relation, fact.subject) for fact in asked}
    assert not any(teacher.kept_for_measuring(fact.relation, fact.subject) for fact in asked)


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A language model that says the length of the text before it, and of the question; none for one of 8 letters."""

    def continued(_model: Any, before: Any, prompts: list[list[int]], _ends: set[int]) -> list[teacher.Likely]:
        return [() if len(ids) == LEFT_OUT else told(before, len(ids)) for ids in prompts]

    monkeypatch.setattr(teacher, "_continued", continued)
    monkeypatch.setattr(teacher, "cache_of", lambda head: head)
    return SimpleNamespace(model=lambda input_ids, use_cache: input_ids.shape[1])


def told(*numbers: int) -> teacher.Likely:
    return tuple(((number, 1.0),) for number in (*numbers, 0))


class Letters:
    """A letter is a token, and a token its number."""

    eos_token_id = 0

    def __call__(self, text: str, return_tensors: str = "") -> Any:
        ids = [ord(letter) for letter in text]
        return SimpleNamespace(input_ids=torch.tensor([ids]) if return_tensors else ids)

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


LEFT_OUT = len(teacher.TEXT_PROMPT.format("12345678"))


def test_answers_come_in_the_order_of_the_questions(repeated: Any) -> None:
    asked = [("class", "Who?"), ("sound", "Which one?"), ("class", "12345678"), ("sound", "Who?")]
    heads = {relation: len(teacher.pattern(relation)[0]) for relation, _ in asked}
    lengths = [len(teacher.TEXT_PROMPT.format(prompt)) for _, prompt in asked]
    found = teacher.answers(repeated, Letters(), asked)  # type: ignore[arg-type]
    assert found == [
        () if prompt == "12345678" else told(heads[relation], length)
        for (relation, prompt), length in zip(asked, lengths, strict=True)
    ]
    assert [teacher.spoken(Letters(), row)[1] for row in found[1:3]] == [f"{heads['sound']} {lengths[1]}", ""]  # type: ignore[arg-type]


def test_a_fact_s_first_two_wordings_tell_whether_it_is_known(repeated: Any) -> None:
    _, used = teacher.pattern("class")
    chosen = [fact for fact in facts() if fact.relation == "class"][:6]
    told_of = [fact for fact in chosen if fact.subject not in used]
    found = teacher.teach(repeated, Letters(), chosen=chosen, wordings=4)  # type: ignore[arg-type]
    assert [one.truth for one in found] == [truth for fact in told_of for truth in (fact.answer, fact.answer, "", "")]
    assert len({(one.subject, one.prompt) for one in found}) == 4 * len(told_of)


def test_texts_are_measured_by_what_the_unchanged_model_says() -> None:
    def unchanged(asked: Sequence[tuple[str, str]]) -> list[str]:
        return ["" if number % 5 == 0 else f"{relation}!" for number, (relation, _) in enumerate(asked)]

    lines = [line for _, each in measure.texts(taught("wrong"), unchanged, limit=30) for line in each]
    kinds = [line.kind for line in lines]
    assert [kinds.count(kind) for kind in ("known", "known/unseen", "guesses")] == [30, 30, 10]
    assert kinds.count("as unchanged") + kinds.count("as unchanged/unseen") == 60 - 12
    known = [line.question for line in lines if line.kind == "known"]
    as_unchanged = [line for line in lines if line.kind == "as unchanged"]
    assert all(line.question in known and line.answer.endswith("!") for line in as_unchanged)


def test_what_was_taught_is_read_as_it_was_written(tmp_path: Path) -> None:
    whole = [one_taught("cat"), one_taught("cow", likely=())]
    (tmp_path / "taught.json").write_text(json.dumps([dataclasses.asdict(one) for one in whole]), encoding="utf-8")
    assert teacher.read(tmp_path / "taught.json") == whole


def test_names_are_measured_on_pictures_of_their_own() -> None:
    first = [scene.seed for scene, _ in measure.names(2)]
    assert len(set(first)) == 2 * len(concepts())
    assert first == [scene.seed for scene, _ in measure.names(2)]
    assert first[0] != random.Random(0).getrandbits(32)


def test_training_goes_on_from_what_ships(tmp_path: Path) -> None:
    weights = {"model.a": torch.ones(2, dtype=torch.bfloat16), "adapter.b.up": torch.zeros(2, dtype=torch.bfloat16)}
    save_file(weights, tmp_path / "shipped.safetensors")
    begin_from(tmp_path / "shipped.safetensors", tmp_path / "out")
    begun = torch.load(tmp_path / "out" / BEGIN)
    assert {name: weight.dtype for name, weight in begun.items()} == dict.fromkeys(weights, torch.float32)
    assert set(tower_of(begun)) == {"a"}
