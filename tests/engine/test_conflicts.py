"""Two answers to one question in a sequence: the later stands, whatever the method and whoever chooses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import fastedit
from fastedit import EditRequest, Query
from fastedit.backbone import EditableModel
from fastedit.deltas import EditDelta, Rows, installed, stack
from fastedit.deltas.questions import questions_of
from fastedit.engine import Run
from fastedit.methods.registry import resolve
from fastedit.training import Artifact
from tests.test_conformance import HASTY, run

#: Those that learn an edit on a model of this size without a long training. What networks compute that were trained in
#: a moment (mend, ke) is no answer to anything.
METHODS = ["ft", "lora", "tpatcher", "grace", "wise", "ldke", "unike"]

_artifacts: dict[str, Artifact] = {}


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return fastedit.load("pocket-llava")


@pytest.fixture(scope="module")
def records() -> list[EditRequest]:
    return fastedit.read_edits("pocket-vqa", limit=6)


@pytest.fixture(scope="module")
def pool() -> list[EditRequest]:
    return fastedit.read_edits("pocket-vqa", split="train", limit=40)


def sequence(model: EditableModel, edits: list[EditRequest], pool: list[EditRequest], name: str, **given: Any) -> Run:
    plan = resolve(name, {})
    if plan.artifact_kind is not None:
        if name not in _artifacts:
            settings = {"trainer": {**HASTY, "batch_size": 4}, "valid_records": 2, "show_progress": False}
            _artifacts[name] = fastedit.train(model, name, pool[10:30], **settings)
        given["artifact"] = _artifacts[name]
    settings = {"mode": "sequential", "conflicts": "last", "pool": pool, "show_progress": False, **given}
    return fastedit.edit(model, edits, name, **settings)


def pair(record: EditRequest, *, reworded: bool) -> tuple[EditRequest, EditRequest]:
    """Two answers to one question; the second time it is asked without its mark."""
    bare = EditRequest(record.prompt, "teal", record.image, id="first")
    assert record.prompt.endswith("?")
    return bare, replace(
        bare, prompt=record.prompt.rstrip("? ") if reworded else record.prompt, target="pink", id="2nd"
    )


@pytest.mark.parametrize("reworded", [False, True], ids=["same", "reworded"])
@pytest.mark.parametrize("name", METHODS)
def test_the_later_answer_stands(
    model: EditableModel, records: list[EditRequest], pool: list[EditRequest], name: str, reworded: bool
) -> None:
    first, second = pair(records[1], reworded=reworded)
    others = [] if not reworded else [each for each in records if each.prompt != first.prompt][:2]
    made = sequence(model, [first, *others, second], pool, name)
    with fastedit.applied(model, made.deltas):
        for wording in {first.prompt, second.prompt}:
            assert model.answer(first.image, wording) == "pink"
    # Each is scored by what it asked for
    values = [scores.strict["reliability"] for scores in made.edit_scores]
    assert (values[0], values[-1]) == (0.0, 1.0)


@pytest.mark.parametrize(("shard", "merge"), [(1, None), (3, None), (2, 4)])
def test_a_memory_that_has_the_question_takes_up_the_later_answer(
    model: EditableModel, records: list[EditRequest], pool: list[EditRequest], shard: int, merge: int | None
) -> None:
    first, second = pair(records[1], reworded=False)
    others = [replace(each, target="teal") for each in records if each.prompt != first.prompt][:3]
    settings = {"shard": shard, "merge_every": merge}
    made = sequence(model, [others[0], first, *others[1:], second], pool, "wise", **settings)
    assert [scores.strict["reliability"] for scores in made.edit_scores][1::3] == [0.0, 1.0]
    if merge is None:
        # Memories are the sums of the deltas that were fitted on top of one another
        with fastedit.applied(model, made.deltas):
            assert model.answer(first.image, first.prompt) == "pink"
    else:
        with (
            pytest.raises(ValueError, match="which are not those before it here"),
            fastedit.applied(model, made.deltas),
        ):
            pass


def test_of_one_delta_alone_its_own_answer_stands(
    model: EditableModel, records: list[EditRequest], pool: list[EditRequest]
) -> None:
    first, second = pair(records[1], reworded=False)
    made = sequence(model, [first, second], pool, "grace", evaluate=False)
    for delta, answer in zip(made.deltas, ("teal", "pink"), strict=True):
        with fastedit.applied(model, delta):
            assert model.answer(first.image, first.prompt) == answer


def test_another_image_or_question_is_no_conflict(
    model: EditableModel, records: list[EditRequest], pool: list[EditRequest]
) -> None:
    first, second = pair(records[1], reworded=False)
    elsewhere = replace(second, image=records[2].image)
    made = sequence(model, [first, elsewhere], pool, "grace", evaluate=False)
    with fastedit.applied(model, made.deltas):
        assert model.answer(first.image, first.prompt) == "teal"
        assert model.answer(elsewhere.image, elsewhere.prompt) == "pink"


def test_the_text_of_the_later_edit_is_asked(edits: list[EditRequest]) -> None:
    tiny = fastedit.load("random:llava-tiny", dtype="float64")
    both = [edits[0], replace(edits[0], target="red", id="later")]
    made = run(tiny, both, "serac", mode="sequential", conflicts="last")
    with installed(tiny, stack(list(made.deltas)), Rows()) as holder:
        (asked,) = holder.rewrite_prompts([Query(edits[0].prompt, edits[0].image)])
    assert " red\n" in asked.prompt


def decided(model: EditableModel, deltas: list[EditDelta], edits: list[EditRequest]) -> list[int] | None:
    """Which delta acts on each edit's question."""
    from fastedit.backbone.packed_forward import packed_prefix, packed_start

    with installed(model, stack(deltas), Rows()) as holder:
        encoded = model.encode([Query(edit.prompt, edit.image) for edit in edits], answers=False)
        holder.route(packed_prefix(model, packed_start(model, encoded), *holder.point))
        return holder.choice


def test_of_equally_near_edits_the_latest_acts_and_what_is_no_number_does_not(edits: list[EditRequest]) -> None:
    tiny = fastedit.load("random:llava-tiny", dtype="float64")
    made = list(run(tiny, edits[:2], "grace").deltas)
    # Made by a version that did not write down whose question it is
    nameless = [replace(delta, texts={}) for delta in [*made, made[0], made[1], made[0]]]
    assert decided(tiny, nameless, edits[:2]) == [4, 3]
    (name,) = (name for name in made[0].tensors if name.endswith("key"))
    broken = replace(made[0], tensors={**made[0].tensors, name: torch.full_like(made[0].tensors[name], torch.nan)})
    assert decided(tiny, [*made, replace(broken, texts={})], edits[:2]) == [0, 1]


def test_a_delta_names_its_question(edits: list[EditRequest]) -> None:
    tiny = fastedit.load("random:llava-tiny", dtype="float64")
    reworded = replace(edits[0], prompt=f' "{edits[0].prompt.upper()}" ')
    made = run(tiny, [edits[0], reworded, edits[1], replace(edits[0], image=None)], "lora", steps=1)
    names = [questions_of(delta.texts) for delta in made.deltas]
    assert names[0] == names[1]
    assert len(set(names)) == 3
