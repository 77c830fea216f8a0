from __future__ import annotations

import functools
import itertools

import pytest

from fastedit.pocket.edits import Record, belongs, draw
from fastedit.pocket.grammar import caption
from fastedit.pocket.names import SETS
from fastedit.pocket.templates import NOVEL
from fastedit.pocket.world import FLAGS, AnyScene, FlagScene, Scene

NUMBERS = range(120)
NOVEL_WORDS = {word for both in NOVEL.values() for words in both for word in words}


@functools.cache
def records(name: str, split: str = "eval") -> list[Record[AnyScene]]:
    return [record for record in (draw(name, split, number) for number in NUMBERS) if record]


@pytest.mark.parametrize("name", SETS)
def test_a_record_is_a_function_of_its_number(name: str) -> None:
    assert records(name)[:20] == [record for record in (draw(name, "eval", n) for n in range(25)) if record][:20]
    assert records(name)[0] != records(name, "train")[0]


@pytest.mark.parametrize("name", SETS)
def test_records_are_complete(name: str) -> None:
    drawn = records(name)
    assert len(drawn) > 0.95 * len(NUMBERS)
    for record in drawn:
        assert record.target != record.truth
        assert record.prompt != record.rephrase
        assert record.portability
        assert len(record.near) == 2
        assert len(record.blind) == 1
        assert record.same
        assert record.scene != record.rephrased
        if name == "pocket-caption":
            assert record.truth == caption(record.scene)


def test_about_half_of_the_targets_are_words_no_model_was_trained_on() -> None:
    drawn = records("pocket-vqa")
    novel = [record for record in drawn if NOVEL_WORDS & set(record.target.split())]
    assert 0.3 < len(novel) / len(drawn) < 0.6


@pytest.mark.parametrize("name", SETS)
def test_portability_answers_change_and_probes_do_not(name: str) -> None:
    for record in records(name):
        for asked in record.portability:
            assert asked.kind in ("entailed", "two-hop", "two-hop-untrained")
            assert asked.scene == record.scene
            assert asked.answer
        for asked in record.near:
            assert asked.prompt == record.prompt
            assert asked.scene != record.scene
            assert asked.answer not in (None, record.target)
        for asked in record.blind:
            assert (asked.prompt, asked.scene, asked.answer) == (record.prompt, None, None)
        for asked in record.same:
            assert asked.scene == record.scene
            assert asked.prompt != record.prompt
            assert asked.answer
        assert len({asked.kind for asked in record.same}) == len(record.same)


def test_same_probes_are_not_about_what_changed() -> None:
    # Shapes and colours are distinct within a scene, so an answer that names the old value is about the edited object.
    for record in records("pocket-vqa"):
        if record.kind in ("colour", "shape", "background"):
            for asked in record.same:
                assert record.truth not in str(asked.answer).split(), (record, asked)


def test_known_portability() -> None:
    flags = [r for r in records("pocket-vqa") if r.kind == "flag" and r.target in FLAGS]
    asked = {
        a.prompt: (r, a) for r in flags for a in r.portability if "capital" in a.prompt or "flag of" in str(a.answer)
    }
    assert asked
    for record, one in asked.values():
        assert one.answer == f"the flag of {record.target}" or one.kind.startswith("two-hop")


def test_hard_records_have_their_locality_near_the_edit() -> None:
    drawn = [record for record in records("pocket-vqa") if record.hard]
    assert len(drawn) >= 20
    for record in drawn:
        near = record.locality.scene
        if near == record.scene:
            continue
        assert isinstance(near, Scene)
        assert isinstance(record.scene, Scene)
        assert near.pairs() & record.scene.pairs()
        assert near.pairs() != record.scene.pairs()


def combinations(record: Record[AnyScene]) -> set[object]:
    asked = itertools.chain([record.locality], record.near, record.same, record.portability)
    scenes = [record.scene, record.rephrased, *(one.scene for one in asked)]
    return {s.country if isinstance(s, FlagScene) else s.pairs() for s in scenes if s is not None}


def test_train_and_eval_share_no_object_combination() -> None:
    train = {c for name in SETS for record in records(name, "train") for c in combinations(record)}
    evaluation = {c for name in SETS for record in records(name) for c in combinations(record)}
    assert train
    assert evaluation
    assert not train & evaluation
    assert all(belongs(record.scene, "eval") and not belongs(record.scene, "train") for record in records("pocket-vqa"))
