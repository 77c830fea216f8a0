"""What every method promises, whatever it is made of: one suite over the whole registry."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastedit
from fastedit import EditRequest, Query
from fastedit.backbone import EditableModel, weights_hash
from fastedit.deltas import EditDelta, Rows, installed
from fastedit.deltas.kinds import new_stack
from fastedit.engine import Run
from fastedit.methods import METHODS, method_names, resolve
from fastedit.methods.base import is_computed
from fastedit.training import Artifact
from tests.engine.conftest import make_edits, picture
from tests.engine.test_editing import largest_difference

TINY = "random:llava-tiny"
#: Every way to spell an edit, except that a weight on the KL is one more objective and no more method.
NAMES = [name for name in method_names() if not name.startswith("kl+")]
#: Enough for a fit to be felt, on a model that knows nothing.
FEW: dict[str, Any] = {"steps": 3, "valid_records": 2}
#: Trained parts that are made in a moment; what they are worth is measured in benchmarks/quality.py.
HASTY: dict[str, Any] = {"steps": 2, "batch_size": 2, "valid_every": 2, "warmup": 0}
FITTED = [name for name in NAMES if not is_computed(resolve(name, {}).method)]
SEQUENTIAL = [name for name in NAMES if METHODS[name.rpartition("+")[2]].sequence != "none"]

_artifacts: dict[tuple[str, str, str], Artifact] = {}


def settings(name: str) -> dict[str, Any]:
    """Overrides of a method that its config has."""
    known = {field.name for field in dataclasses.fields(resolve(name, {}).config)}
    return {key: value for key, value in FEW.items() if key in known}


def records() -> list[EditRequest]:
    """To learn from: none of them is edited."""
    return [dataclasses.replace(edit, id=f"train-{edit.id}") for edit in make_edits(12)[6:]]


def trained(model: EditableModel, name: str) -> dict[str, Any]:
    """What ``edit`` is to be given beside the method's name."""
    plan = resolve(name, {})
    kind = plan.artifact_kind
    if kind is None:
        return {}
    key = (model.fingerprint, str(model.dtype), kind)
    if key not in _artifacts:
        _artifacts[key] = fastedit.train(model, kind, records(), trainer=HASTY, show_progress=False, **settings(kind))
    return {"artifact": _artifacts[key]}


def run(model: EditableModel, edits: Sequence[EditRequest], name: str, **given: Any) -> Run:
    """Edit without scores."""
    options: dict[str, Any] = {"evaluate": False, "show_progress": False, "pool": records(), "batch_size": 4}
    return fastedit.edit(model, edits, name, **{**options, **settings(name), **trained(model, name), **given})


def questions(edits: Sequence[EditRequest]) -> list[Query]:
    """Some of the edits' and some of nobody's."""
    asked = [Query(edit.prompt, edit.image) for edit in edits]
    return [*asked, Query("what is it ?", picture(91)), Query("of what colour ?")]


def logits(model: EditableModel, edits: Sequence[EditRequest]) -> Tensor:
    """Of the next tokens after every question."""
    from fastedit.backbone.generation import Reader

    asked: list[Query] = questions(edits)
    for holder in model.holders:
        asked = holder.rewrite_prompts(asked)
    reader = Reader(model, model.encode(asked, answers=False), 4)
    with torch.no_grad():
        return model.head(reader.read())


@pytest.fixture(scope="module")
def exact() -> EditableModel:
    return fastedit.load(TINY, dtype="float64")


@pytest.fixture(scope="module")
def edits() -> list[EditRequest]:
    return make_edits(3)


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_delta_changes_nothing(exact: EditableModel, edits: list[EditRequest], name: str) -> None:
    plan = resolve(name, settings(name))
    spec = plan.method.spec(exact, plan.config)
    for artifact in trained(exact, name).values():
        exact.artifacts[artifact.id] = artifact
        spec = dataclasses.replace(spec, options={**spec.options, "artifact": artifact.id})
    stacked = new_stack(spec, 1, dtype=torch.float64, trainable=False)
    before = logits(exact, edits)
    # What is shared by all edits of a method is not an edit's: without one no router lets it act
    with installed(exact, stacked, Rows(), route=is_computed(plan.method)):
        assert torch.equal(logits(exact, edits), before)


@pytest.mark.parametrize("name", FITTED)
def test_an_edit_without_steps_changes_nothing(exact: EditableModel, edits: list[EditRequest], name: str) -> None:
    """Where a value stands for a whole output (GRACE), that is said of the edit's own question: others in its ball get
    the same output."""
    made = run(exact, edits[:1], name, steps=0, pool=records())
    before = logits(exact, edits)
    with fastedit.applied(exact, made.deltas[0]):
        after = logits(exact, edits)
    if made.deltas[0].spec.options.get("replace"):
        torch.testing.assert_close(after[0], before[0], rtol=1e-12, atol=1e-12)
    else:
        assert torch.equal(after, before)


@pytest.mark.parametrize("name", NAMES)
def test_an_edit_acts_and_its_undoing_leaves_nothing(exact: EditableModel, edits: list[EditRequest], name: str) -> None:
    weights, before = weights_hash(exact.hf), logits(exact, edits)
    made = run(exact, edits[:1], name)
    assert weights_hash(exact.hf) == weights
    assert torch.equal(logits(exact, edits), before)
    with fastedit.applied(exact, made.deltas[0]):
        after = logits(exact, edits)
    assert torch.isfinite(after).all()
    router = made.deltas[0].spec.options.get("router")
    if router is None:
        assert not torch.equal(after[0], before[0]), "the edit's own question"
    assert torch.equal(logits(exact, edits), before)
    assert weights_hash(exact.hf) == weights
    assert exact.holders == []


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_equals_its_edits_one_by_one(exact: EditableModel, edits: list[EditRequest], name: str) -> None:
    together = run(exact, edits, name, batch_size=3)
    alone = run(exact, edits, name, batch_size=1)
    assert_alike(list(together.deltas), list(alone.deltas))


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_independent_edits_does_not_matter(
    exact: EditableModel, edits: list[EditRequest], name: str
) -> None:
    forward = run(exact, edits, name, batch_size=2)
    backward = run(exact, edits[::-1], name, batch_size=2)
    assert_alike(list(forward.deltas), list(backward.deltas)[::-1])


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_one_edit_in_sequence_is_one_edit(exact: EditableModel, edits: list[EditRequest], name: str) -> None:
    single = run(exact, edits[:1], name, evaluate=True)
    sequence = run(exact, edits[:1], name, evaluate=True, mode="sequential")
    assert_alike(list(single.deltas), list(sequence.deltas))
    for ours, theirs in zip(single.edit_scores, sequence.edit_scores, strict=True):
        assert ours.strict == pytest.approx(theirs.strict)
        assert ours.legacy == pytest.approx(theirs.legacy)
        assert [one["after"] for one in ours.answers] == [one["after"] for one in theirs.answers]


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_a_sequence_keeps_every_edit_and_is_scored_on_the_way(
    exact: EditableModel, edits: list[EditRequest], name: str
) -> None:
    made = run(exact, edits, name, evaluate=True, mode="sequential", score_at=(1, 2))
    assert [delta.request_id for delta in made.deltas] == [edit.id for edit in edits]
    assert list(made.checkpoints) == [1, 2]
    assert {score.n for score in made.checkpoints[2]["strict"].values()} <= {0, 1, 2}
    assert len(made.edit_scores) == 3


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_it_answers_the_same(
    exact: EditableModel, edits: list[EditRequest], name: str, tmp_path: Path
) -> None:
    made = run(exact, edits[:2], name, evaluate=True)
    made.save(tmp_path)
    found = Run.load(tmp_path)
    assert (found.artifact is None) == (made.artifact is None)
    # As in another process: nothing is known but what was saved
    fresh = fastedit.load(TINY, dtype="float64")
    again = Run.load(tmp_path, fresh)
    for ours, theirs in zip(made.deltas, again.deltas, strict=True):
        with fastedit.applied(exact, ours):
            expected = logits(exact, edits)
        with fastedit.applied(fresh, theirs):
            assert torch.equal(logits(fresh, edits), expected)
    for ours, theirs in zip(made.deltas, found.deltas, strict=True):
        assert ours.spec == theirs.spec
        assert ours.texts == theirs.texts
        with fastedit.applied(exact, ours):
            expected = logits(exact, edits)
        with fastedit.applied(exact, theirs):
            assert torch.equal(logits(exact, edits), expected)
    assert made.scores == found.scores


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_precision_leaves_the_kind_of_outcome(edits: list[EditRequest], name: str, quantize: str) -> None:
    """What an edit is worth at a precision is measured on the embedded model, see benchmarks/precision.py."""
    if quantize == "nf4":
        pytest.importorskip("bitsandbytes")
    model = fastedit.load(TINY, quantize=quantize)
    made = run(model, edits[:2], name, evaluate=True)
    assert {outcome.status for outcome in made.outcomes} <= {"converged", "max_steps", "computed"}
    for delta in made.deltas:
        assert all(bool(torch.isfinite(tensor).all()) for tensor in delta.tensors.values())
    assert "reliability" in made.scores["strict"]


@pytest.mark.parametrize("name", FITTED)
def test_a_fit_that_breaks_down_says_so_and_keeps_finite_values(
    exact: EditableModel, edits: list[EditRequest], name: str
) -> None:
    made = run(exact, edits[:2], name, lr=1e300, steps=4, **({"clip": None} if "clip" in fields(name) else {}))
    assert len(made.outcomes) == 2
    # lr=1e300 is right for no one: a fit has failed, unless the target was said before it could, or entries are bounded
    for outcome, delta in zip(made.outcomes, made.deltas, strict=True):
        assert outcome.status in ("diverged", "diverging", "converged", "max_steps")
        assert outcome.status != "max_steps" or outcome.nll < outcome.first_nll
        assert all(bool(tensor.isfinite().all()) for tensor in delta.tensors.values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"edits": []}, "at least one edit"),
        ({"batch_size": 0}, "batch_size is at least 1"),
        ({"mode": "sideways"}, "mode is one of"),
        ({"stepps": 3}, "field 'stepps' is not known"),
        ({"score_at": (1,)}, "score_at belongs to mode='sequential'"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_wrong_settings_are_refused_before_any_work(
    exact: EditableModel, edits: list[EditRequest], name: str, given: dict[str, Any], message: str
) -> None:
    chosen = given.get("edits", edits)
    with pytest.raises(ValueError, match=message):
        run(exact, chosen, name, **{key: value for key, value in given.items() if key != "edits"})


@pytest.mark.parametrize("name", NAMES)
def test_a_question_longer_than_the_model_is_named(exact: EditableModel, edits: list[EditRequest], name: str) -> None:
    limit = exact.adapter.text.config.max_position_embeddings
    long = dataclasses.replace(edits[0], prompt="what " * (limit + 1))
    with pytest.raises(ValueError, match=f"at most {limit} tokens"):
        run(exact, [long, edits[1]], name)
    assert exact.holders == []


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_edits_that_contradict_each_other_are_named(exact: EditableModel, edits: list[EditRequest], name: str) -> None:
    other = dataclasses.replace(edits[0], target="something else", id="other")
    with pytest.raises(ValueError, match=r"a question has one answer.*edits\[0\]\.target.*edits\[1\]\.target"):
        run(exact, [edits[0], other], name, mode="sequential")
    assert len(run(exact, [edits[0], other], name, mode="sequential", conflicts="last").deltas) == 2


@pytest.mark.parametrize("name", sorted({name.rpartition("+")[2] for name in NAMES}))
def test_what_a_method_cannot_do_is_said_before_any_work(
    exact: EditableModel, edits: list[EditRequest], name: str
) -> None:
    method = METHODS[name]
    if method.sequence == "none":
        with pytest.raises(ValueError, match=r"keeps no sequence \(got mode='sequential'\)"):
            run(exact, edits, name, mode="sequential")
    if f"odedit+{name}" not in NAMES:
        with pytest.raises(ValueError, match=f"'{name}' is spelled {name}"):
            resolve(f"odedit+{name}", {})
    if resolve(name, {}).artifact_kind:
        with pytest.raises(ValueError, match=r"fastedit\.train"):
            run(exact, edits, name, artifact=None)
        other = fastedit.load("random:qwen2vl-tiny", dtype="float64")
        with pytest.raises(ValueError, match="trained on the model in use"):
            run(other, edits, name, **trained(exact, name))
    else:
        with pytest.raises(ValueError, match="has no trained parts"):
            run(exact, edits, name, artifact="x.safetensors")


def fields(name: str) -> set[str]:
    """Names of the settings of a method."""
    return {field.name for field in dataclasses.fields(resolve(name, {}).config)}


def assert_alike(ours: Sequence[EditDelta], theirs: Sequence[EditDelta]) -> None:
    """Deltas that are equal up to the order of sums; what a float32 network made, to its precision."""
    assert [delta.texts for delta in ours] == [delta.texts for delta in theirs]
    narrow = any(tensor.dtype == torch.float32 for delta in ours for tensor in delta.tensors.values())
    if any(delta.tensors for delta in ours):
        assert largest_difference(list(ours), list(theirs)) < (1e-5 if narrow else 1e-8)
