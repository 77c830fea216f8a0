"""What ``retain`` keeps of a sequence's earlier edits."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastedit
from fastedit import EditRequest, Query
from fastedit.backbone import EditableModel
from fastedit.backbone.packed_forward import packed_start, packed_tail
from fastedit.deltas import EditDelta, Rows, installed, stack
from fastedit.deltas.nullspace import Keys
from fastedit.engine import retention
from fastedit.methods.captured import wanted_inputs
from tests.engine.conftest import assert_scored_alike, make_edits

KINDS = ("nullspace", "replay")


def run(model: EditableModel, edits: list[EditRequest], method: str = "ft", **given: Any) -> fastedit.Run:
    settings = {"mode": "sequential", "evaluate": False, "show_progress": False, "stop_loss": None, "steps": 8, **given}
    return fastedit.edit(model, edits, method, **settings)


def logits(model: EditableModel, edit: EditRequest, deltas: list[EditDelta]) -> Tensor:
    """(T, V) at the answer's tokens, with deltas that act together."""
    state = packed_start(model, model.encode([Query(edit.prompt, edit.image, edit.target)], answers=True))
    with torch.no_grad(), fastedit.applied(model, deltas) if deltas else nullcontext():
        return model.head(packed_tail(model, state))


@pytest.mark.parametrize("method", ["ft", "lora"])
def test_later_edits_do_not_move_the_answers_of_earlier_ones(exact_model: EditableModel, method: str) -> None:
    """In the last layer every input of an answer's tokens is known: what is read from them stays to rounding."""
    edits = make_edits(4)
    made = run(exact_model, edits, method, layers=1, retain="nullspace", retain_share=1.0).deltas
    plain = run(exact_model, edits, method, layers=1).deltas
    for number, edit in enumerate(edits[:3]):
        then, now = (logits(exact_model, edit, list(made[:count])) for count in (number + 1, 4))
        assert float((logits(exact_model, edit, []) - now).abs().max()) > 1e-2
        assert float((then - now).abs().max()) < 1e-10
        before, after = (logits(exact_model, edit, list(plain[:count])) for count in (number + 1, 4))
        assert float((before - after).abs().max()) > 1e-3


def test_a_change_is_zero_for_the_keys_of_earlier_edits(exact_model: EditableModel) -> None:
    edits = make_edits(3)
    made = run(exact_model, edits, layers=2, retain="nullspace", retain_share=1.0).deltas
    sites = made[0].spec.sites
    for number, edit in enumerate(edits[:2]):
        state = packed_start(exact_model, exact_model.encode([edit.query], answers=True))
        with fastedit.applied(exact_model, list(made[: number + 1])):
            inputs, _ = wanted_inputs(exact_model, state, sites)
        for later in made[number + 1 :]:
            for site in sites:
                change = inputs[site] @ later.tensors[f"{site.layer}.{site.name}:delta"].T
                assert float(change.abs().max()) < 1e-12


def test_only_a_share_of_the_directions_is_kept(exact_model: EditableModel) -> None:
    """The second edit may change the directions that the first one uses least."""
    edits = make_edits(2)
    found = Keys(exact_model.hidden_size, 1)
    made = run(
        exact_model, edits, layers=1, names=("up",), retain="nullspace", retain_share=1.5 / exact_model.hidden_size
    )
    (site,) = made.deltas[0].spec.sites
    state = packed_start(exact_model, exact_model.encode([edits[0].query], answers=True))
    inputs, _ = wanted_inputs(exact_model, state, [site])
    found.add(inputs[site])
    matrix = made.deltas[1].tensors[f"{site.layer}.{site.name}:delta"]
    assert float((matrix @ found.basis).abs().max()) < 1e-12
    assert float((inputs[site] @ matrix.T).abs().max()) > 1e-4


def kept(model: EditableModel, edits: list[EditRequest], deltas: list[EditDelta]) -> float:
    """Share of the edits whose every token is said, with all deltas."""
    right = 0
    for edit in edits:
        state = packed_start(model, model.encode([edit.query], answers=True))
        labels = model.encode([edit.query], answers=True)
        with torch.no_grad(), fastedit.applied(model, deltas):
            said = model.head(packed_tail(model, state)).argmax(-1)
        right += torch.equal(said, labels.labels[labels.label_mask])
    return right / len(edits)


def test_more_of_32_edits_are_left(model: EditableModel) -> None:
    edits = make_edits(32)
    given = {"layers": 1, "steps": 25, "stop_loss": 0.02}
    left = {}
    for retain in ("none", *KINDS):
        # All earlier edits, as the questions differ by a number alone
        deltas = run(model, edits, "ft", retain=retain, retain_replayed=31, retain_weight=10.0, **given).deltas
        left[retain] = kept(model, edits, list(deltas))
    assert left["nullspace"] > left["none"] + 0.1, left
    assert left["replay"] > left["none"] + 0.1, left


def test_what_is_replayed_has_the_reference_of_the_sequence(
    exact_model: EditableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not that of the frozen model, which knows none of the edits."""
    edits, seen = make_edits(3), []
    plain = retention.Retention.with_earlier

    def watched(self: Any, number: int, rows: Any, beneath: Any) -> Any:
        made = plain(self, number, rows, beneath)
        seen.append((number, made))
        return made

    monkeypatch.setattr(retention.Retention, "with_earlier", watched)
    deltas = list(run(exact_model, edits, "lora", retain="replay", retain_replayed=1).deltas)
    assert [number for number, _ in seen] == [0, 1, 2]
    assert seen[0][1].reference is None
    torch.testing.assert_close(seen[1][1].reference, logits(exact_model, edits[0], deltas[:1]))
    assert len(seen[2][1].state) == 2


@pytest.mark.parametrize("method", ["kl+lora", "odedit+ft"])
def test_replay_joins_an_objective_that_has_a_kl_term(model: EditableModel, method: str) -> None:
    edits, pool = make_edits(3), make_edits(8)[4:]
    with_it = run(model, edits, method, pool=pool, retain="replay").deltas
    without = run(model, edits, method, pool=pool).deltas
    # Views whose states were kept of the first run were computed beside other rows there, whose rounding is another
    assert distance(with_it[0], without[0]) < 1e-4
    assert distance(with_it[2], without[2]) > 0.01
    model.caches.clear()
    assert run(model, edits[:1], method, pool=pool).deltas[0].id == with_it[0].id


def distance(one: fastedit.EditDelta, other: fastedit.EditDelta) -> float:
    """Of two changes, over the size of the second."""
    squares = [
        torch.stack([(one.tensors[name] - tensor).float().square().sum(), tensor.float().square().sum()])
        for name, tensor in other.tensors.items()
    ]
    apart, size = torch.stack(squares).sum(0).tolist()
    return float((apart / size) ** 0.5)


@pytest.mark.parametrize("retain", KINDS)
def test_a_sequence_that_goes_on_is_the_same(model: EditableModel, retain: str, tmp_path: Path) -> None:
    edits = make_edits(4)
    whole = run(model, edits, "lora", retain=retain)
    with fastedit.open_ledger(tmp_path / "edits", model) as ledger:
        for count in (2, 4):
            parts = run(model, edits[:count], "lora", retain=retain, ledger=ledger)
        assert [delta.id for delta in parts.deltas] == [delta.id for delta in whole.deltas]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"retain": "all"}, r"lora: retain is one of \['none', 'nullspace', 'replay'\] \(got retain='all'\)"),
        ({"retain_share": 1.5}, r"lora: retain_share is a share, 0 to 1 \(got retain_share=1.5\)"),
        ({"retain_replayed": 0}, r"lora: retain_replayed is at least 1 \(got retain_replayed=0\)"),
        ({"retain": "replay", "mode": "single"}, r"retain belongs to mode='sequential'"),
    ],
)
def test_settings_that_cannot_be(model: EditableModel, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(model, make_edits(2), "lora", **given)


def test_a_stack_is_not_restricted_where_nothing_is_kept(exact_model: EditableModel) -> None:
    edits = make_edits(1)
    assert run(exact_model, edits, retain="nullspace").deltas[0].id == run(exact_model, edits).deltas[0].id
    with installed(exact_model, stack(list(run(exact_model, edits).deltas)), Rows()) as holder:
        assert not holder.stacked.kept_inputs


def test_a_sample_of_a_sequence_is_scored_as_the_whole_is(model: EditableModel) -> None:
    edits = make_edits(4)
    given = {"evaluate": True, "score_at": (1, 3), "steps": 2}
    whole, some = run(model, edits, **given), run(model, edits, score_sample=2, **given)
    scored = [number for number, each in enumerate(some.edit_scores) if each.strict]
    assert len(scored) == 2
    found, expected = ([each.edit_scores[n] for n in scored] for each in (some, whole))
    assert_scored_alike(found, expected, rel=1e-5, abs=1e-8)
    assert {count: scores["strict"]["reliability"].n for count, scores in some.checkpoints.items()} == {1: 1, 3: 2}
    assert some.scores["strict"]["reliability"].n == 2
