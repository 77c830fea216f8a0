"""WISE: side memories, single and in sequence, on a random model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import fastedit
from fastedit import EditRequest
from fastedit.backbone import EditableModel, Site
from fastedit.deltas import EditDelta
from fastedit.deltas.random_mask import apply_mask_, mask_key
from fastedit.methods.wise import WISE, WISEConfig
from tests.deltas.test_side import memory, spec
from tests.engine.conftest import make_edits

#: One token each: a random model learns them in few steps.
WORDS = ("blue", "red", "cat", "one")
QUICK: dict[str, Any] = {"steps": 4, "evaluate": False, "show_progress": False}


def short_edits(count: int) -> list[EditRequest]:
    return [replace(edit, target=word) for edit, word in zip(make_edits(count), WORDS, strict=False)]


@pytest.fixture(scope="module", params=["llava", "blip2", "qwen2vl"])
def model(request: pytest.FixtureRequest) -> EditableModel:
    return fastedit.load(f"random:{request.param}-tiny", dtype="float32")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"name": "o"}, "name is 'up' or 'down'"),
        ({"tokens": "first"}, r"tokens is one of \['all', 'after_image', 'last'\]"),
        ({"keep": 0.0}, "keep lies in 0 to 1"),
        ({"share": 1.5}, r"share lies in 0 to 1 \(got share=1.5\)"),
        ({"alpha": 2.0, "beta": 1.0}, r"margins .* \(got alpha=2.0, beta=1.0"),
        ({"shard": 0}, r"shard is at least 1, or None \(got shard=0\)"),
        ({"merge_every": 0}, "merge_every is at least 1, or None"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=f"wise: {told}"):
        WISEConfig(**settings)


@pytest.mark.parametrize("method", ["wise", "odedit+wise"])
def test_edits_hold(model: EditableModel, method: str) -> None:
    edits = short_edits(4)
    run = fastedit.edit(model, edits, method, steps=60, show_progress=False)
    assert run.scores["strict"]["reliability"].mean == 1.0
    for edit, delta in zip(edits, run.deltas, strict=True):
        (name,) = (name for name in delta.tensors if name.endswith(":delta"))
        change, place = delta.tensors[name], name.removesuffix("delta")
        # what the edit's mask drops was never touched
        left = change.clone().view(1, -1)
        apply_mask_(left, delta.tensors[f"{place}mask"][None], 0.2)
        assert torch.equal(left.view_as(change), change)
        assert 0 < int((change != 0).sum()) < 0.3 * change.numel()
        assert float(delta.tensors[f"{place}threshold"]) > 0
        assert edit.id == delta.request_id


def test_masks_follow_from_the_edit_and_the_seed(model: EditableModel) -> None:
    def masks(**settings: Any) -> list[torch.Tensor]:
        run = fastedit.edit(model, make_edits(2), "wise", **QUICK, **settings)
        return [t for delta in run.deltas for name, t in delta.tensors.items() if name.endswith(":mask")]

    first, second = masks()
    assert not torch.equal(first, second)
    assert torch.equal(masks(batch_size=1)[1], second)
    other = fastedit.edit(model, make_edits(1), "wise", pool=make_edits(3), **QUICK).deltas[0].tensors
    assert torch.equal(next(t for name, t in other.items() if name.endswith(":mask")), first)
    config, requests = WISEConfig(seed=1), make_edits(1)
    assert config != WISEConfig()
    assert mask_key(1, requests[0].id) != mask_key(0, requests[0].id)


def test_an_edit_is_the_same_in_any_batch() -> None:
    model = fastedit.load("random:llava-tiny", dtype="float64")
    together = fastedit.edit(model, make_edits(3), "wise", batch_size=3, **QUICK)
    alone = fastedit.edit(model, make_edits(3), "wise", batch_size=1, **QUICK)
    for one, other in zip(together.deltas, alone.deltas, strict=True):
        for name, tensor in one.tensors.items():
            torch.testing.assert_close(tensor, other.tensors[name], rtol=1e-6, atol=1e-8)


def test_questions_that_are_not_moved_far_are_answered_by_the_frozen_model(model: EditableModel) -> None:
    """To the bit: what the frozen model says of tokens is what the edited one says."""
    run = fastedit.edit(model, short_edits(4), "wise", steps=40, show_progress=False)
    found = 0
    for scores in run.edit_scores:
        for answer in scores.answers:
            if not answer["acted"]:
                assert answer["before"] == answer["after"]
                found += 1
    assert found > 0


def test_the_newest_edit_of_a_sequence_holds(model: EditableModel) -> None:
    """Fitted on top of the memory that is being filled, and stored as the sum."""
    edits = short_edits(3)
    run = fastedit.edit(model, edits, "wise", mode="sequential", steps=80, shard=9, share=0.2, show_progress=False)
    assert run.edit_scores[-1].strict["reliability"] == 1.0


def test_edits_in_memories_of_their_own_find_theirs(model: EditableModel) -> None:
    run = fastedit.edit(model, short_edits(3), "wise", mode="sequential", steps=80, shard=1, show_progress=False)
    assert run.scores["strict"]["reliability"].mean >= 2 / 3


def names(memories: list[EditDelta]) -> list[str]:
    """What each holds: its edits, "M" for a merged one."""
    return [("M" if float(m.tensors["2.down:merged"]) else "") + str(int(m.tensors["2.down:edits"])) for m in memories]


EARLY = [["1"], ["2", "0"], ["2", "1"], ["M4", "0"], ["M4", "1"], ["M4", "2", "0"], ["M4", "2", "1"]]


@pytest.mark.parametrize(("retrieve", "last"), [(True, ["M4", "M4", "0"]), (False, ["M8", "0"])])
def test_memories_are_filled_closed_and_merged(retrieve: bool, last: list[str]) -> None:
    config = WISEConfig(shard=2, merge_every=4, retrieve=retrieve)
    committed: list[EditDelta] = []
    for number, wanted in enumerate([*EARLY, last]):
        committed = WISE.combine(config, committed, memory(number + 1))
        assert names(committed) == wanted


def test_memories_are_as_large_as_the_matrix_has_room_and_not_merged_unless_wished() -> None:
    committed: list[EditDelta] = []
    for number in range(3):
        committed = WISE.combine(WISEConfig(), committed, memory(number))
    assert names(committed) == ["1", "1", "1", "0"]
    large = [replace(memory(1), spec=replace(spec(), sites=(Site(2, "down", "down", 11008, 4096),)))]
    assert len(WISE.combine(WISEConfig(), [], large[0])) == 1


def test_applied_edits_answer_from_files(model: EditableModel, tmp_path: Any) -> None:
    edits = short_edits(2)
    run = fastedit.edit(model, edits, "wise", steps=60, evaluate=False, show_progress=False)
    run.save(tmp_path)
    loaded = fastedit.Run.load(tmp_path).deltas
    before = model.answer(edits[1].image, edits[1].prompt)
    with fastedit.applied(model, loaded[1]):
        assert model.answer(edits[1].image, edits[1].prompt) == edits[1].target
    assert model.answer(edits[1].image, edits[1].prompt) == before
