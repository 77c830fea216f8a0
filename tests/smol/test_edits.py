from __future__ import annotations

import functools

import pytest

from fastedit.pocket.edits import HARD_EVERY, Record
from fastedit.smol import facts
from fastedit.smol.concepts import concepts
from fastedit.smol.edits import SIZE, draw
from fastedit.smol.grammar import phrase
from fastedit.smol.names import SETS
from fastedit.smol.requests import read_checked
from fastedit.smol.requests import records as kept
from fastedit.smol.scenes import Scene, by_name
from fastedit.smol.split import concepts_of
from fastedit.smol.templates import prompts

KINDS = {
    "icon-entity": {"name", "flag"},
    "icon-vqa": {"at", "flag_at", "background"},
    "icon-caption": {"caption"},
}


@functools.cache
def records(name: str, split: str = "eval") -> list[Record[Scene]]:
    return [record for record in (draw(name, split, number) for number in range(80)) if record]


@pytest.mark.parametrize("name", SETS)
def test_nearly_every_number_gives_a_record_and_every_kind_occurs(name: str) -> None:
    assert len(records(name)) >= 76
    assert {record.kind for record in records(name)} == KINDS[name]
    assert sum(record.hard for record in records(name)) >= 15
    assert records(name)[:5] == [draw(name, "eval", record.number) for record in records(name)[:5]]


@pytest.mark.parametrize("name", SETS)
def test_the_target_is_wanted_and_the_truth_is_not_it(name: str) -> None:
    for record in records(name):
        assert record.truth != record.target
        assert record.prompt != record.rephrase
        assert (record.rephrased.shown, record.rephrased.background) == (record.scene.shown, record.scene.background)
        assert record.rephrased.seed != record.scene.seed
        assert len(record.near) == len(record.same) == 2
        for probe in record.near:
            assert probe.prompt == record.prompt
            assert probe.answer not in (None, record.target)
        for probe in record.same:
            assert probe.scene == record.scene
            assert probe.prompt not in (record.prompt, record.rephrase)
        negated = record.further[-1]
        assert (negated.kind, negated.scene) == ("negated", record.scene)
        shown = [one for one in record.scene.names if negated.prompt in prompts("absent", (phrase(one),))]
        assert negated.answer == ("no" if shown else "yes")
        # An edit says that its target is there, and that the truth is not
        if record.kind in ("name", "flag", "at", "flag_at"):
            for moved in (record.target, record.truth):
                assert negated.prompt not in prompts("absent", (phrase(moved),))


@pytest.mark.parametrize("name", SETS)
def test_what_follows_is_new_and_the_language_model_knows_it(name: str) -> None:
    hops = {"entailed": 0, "one-hop": 0, "two-hop": 0}
    known = {(fact.relation, fact.answer) for fact in facts.known()}
    for record in records(name):
        for query in record.portability:
            hops[query.kind] += 1
            assert query.scene == record.scene
            if query.kind != "entailed":
                assert any(query.answer == answer for _, answer in known)
        assert record.fact.answer in {answer for _, answer in known}
        named = {by_name()[one][1].name.casefold() for one in record.scene.names}
        assert not any(f" {one}?" in record.fact.prompt.casefold() for one in named)
    assert hops["entailed"] >= 70
    assert hops["one-hop"] >= 30
    assert hops["two-hop"] >= 2


@pytest.mark.parametrize("name", SETS)
def test_the_splits_edit_different_concepts(name: str) -> None:
    for split in ("train", "eval"):
        allowed = set(concepts_of(split))
        for record in records(name, split):
            assert set(record.scene.names) <= allowed
            edited = record.target if record.kind in ("name", "flag", "at", "flag_at") else None
            assert edited is None or edited in allowed
    assert not set(concepts_of("train")) & set(concepts_of("eval"))


def test_an_entity_becomes_another_one_of_its_kind() -> None:
    kinds = {concept.name: concept.kind for concept in concepts()}
    for record in records("icon-entity"):
        assert kinds[record.truth] == kinds[record.target]


def test_an_edit_of_something_else_leaves_the_background() -> None:
    ground = set(prompts("background"))
    for record in records("icon-vqa"):
        asked = {query.prompt for query in record.portability if query.kind == "entailed"}
        assert record.kind == "background" or not asked & ground


def test_what_the_old_thing_has_too_is_no_news() -> None:
    answers = {(fact.relation, fact.subject): fact.answer for fact in facts.facts()}
    told = 0
    for record in (*records("icon-entity"), *records("icon-entity", "train")):
        for query in record.portability:
            if query.kind != "entailed":
                relations = {relation for relation, subject in answers if subject == record.target}
                asked = {one for one in relations if query.prompt in _through_pictures(one, record.target)}
                assert asked
                assert all(answers.get((one, record.truth)) != query.answer for one in asked)
                told += 1
    assert told > 100


def _through_pictures(relation: str, subject: str) -> tuple[str, ...]:
    return next(fact for fact in facts.of(subject) if fact.relation == relation).seen_prompts()


@pytest.mark.parametrize("split", SIZE)
@pytest.mark.parametrize("name", SETS)
def test_every_split_is_whole(name: str, split: str) -> None:
    whole = list(kept(name, split, read_checked(name, split)))
    assert len(whole) == SIZE[split]
    assert sum(record.hard for record in whole) == SIZE[split] // HARD_EVERY
