"""All edits of a ledger in one change of weights."""

from __future__ import annotations

from pathlib import Path

import pytest

import fastedit
from fastedit import EditRequest, Ledger, LedgerError
from fastedit.backbone import EditableModel
from fastedit.ledger import consolidate as consolidate_module
from tests.ledger.conftest import FEW


def test_one_change_holds_all_edits(model: EditableModel, edits: list[EditRequest], ledger: Ledger) -> None:
    ledger.edit(edits[:3], "ft", mode="single", evaluate=False, **FEW)
    before = model.fingerprint
    acting = ledger.state().id
    found = fastedit.consolidate(model, ledger, "kl+lora", steps=80, lr=1e-2)
    assert found.edits == tuple(ledger.state().edit_ids)
    assert found.outcome.nll < 0.5 * found.outcome.first_nll
    assert found.lost == ()
    # What it says is what the model answers with the change
    with fastedit.applied(model, found.delta):
        assert [model.answer(each.image, each.prompt) for each in edits[:3]] == [each.target for each in edits[:3]]
    # Neither the model nor what acts in the ledger is another one
    assert (model.fingerprint, ledger.state().id) == (before, acting)
    event = ledger.history()[-1]
    assert (event.id, event.action, event.detail["delta"]) == (found.event, "consolidate", found.delta.id)
    assert event.detail["edits"] == list(found.edits)
    assert ledger.verify().problems == ()


def test_minibatches_see_every_edit_and_hold_all(
    model: EditableModel, edits: list[EditRequest], ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger.edit(edits[:3], "ft", mode="single", evaluate=False, **FEW)
    drawn, draw = [], consolidate_module._Packed.of
    monkeypatch.setattr(
        consolidate_module._Packed,
        "of",
        staticmethod(lambda rows, numbers: drawn.append(numbers) or draw(rows, numbers)),
    )
    found = fastedit.consolidate(model, ledger, "kl+lora", batch_size=2, steps=160, lr=1e-2)
    assert found.lost == ()
    # An epoch is a step of two edits and one of the third
    assert len(drawn) == found.outcome.steps + (found.outcome.status == "converged")
    assert [sorted(first + second) for first, second in zip(drawn[::2], drawn[1::2])] == [[0, 1, 2]] * (len(drawn) // 2)
    assert len({tuple(each) for each in drawn}) > 2
    # A batch of all is what no batches are
    whole, all_at_once = (
        fastedit.consolidate(model, ledger, "lora", batch_size=size, steps=4).delta for size in (None, 9)
    )
    assert whole.id == all_at_once.id
    with pytest.raises(ValueError, match=r"batch_size counts the edits of a step, from 1 up \(got batch_size=0\)"):
        fastedit.consolidate(model, ledger, batch_size=0)


def test_what_does_not_hold_is_reported(model: EditableModel, edits: list[EditRequest], ledger: Ledger) -> None:
    ledger.edit(edits[:3], "ft", mode="single", evaluate=False, **FEW)
    found = fastedit.consolidate(model, ledger, "ft", steps=1, lr=1e-6)
    assert found.lost == found.edits
    assert found.scores.scores["strict"]["reliability"].mean == 0.0
    # A change of next to nothing keeps what must stay
    assert found.scores.scores["strict"]["text_locality"].mean == 1.0
    assert ledger.history()[-1].detail["lost"] == list(found.lost)
    assert str(found) == "3 edits in one change, 3 of which do not hold"


def test_a_kl_term_keeps_more(model: EditableModel, edits: list[EditRequest], ledger: Ledger) -> None:
    ledger.edit(edits[:2], "ft", mode="single", evaluate=False, **FEW)
    kept = {}
    for method in ("ft", "kl+ft"):
        found = fastedit.consolidate(model, ledger, method, steps=20, lr=1e-2, stop_loss=None)
        legacy = found.scores.scores["legacy"]
        kept[method] = legacy["text_locality_top10"].mean + legacy["image_locality_top10"].mean
    assert kept["kl+ft"] > kept["ft"]


def test_what_cannot_be_is_refused(
    model: EditableModel, edits: list[EditRequest], ledger: Ledger, tmp_path: Path
) -> None:
    with pytest.raises(LedgerError, match=r"where edits act \(got none\)"):
        fastedit.consolidate(model, ledger)
    for method in ("ldke", "odedit+ft", "ike"):
        with pytest.raises(ValueError, match="method makes one change of weights"):
            fastedit.consolidate(model, ledger, method)
    with pytest.raises(LedgerError, match="model that it was opened with"):
        fastedit.consolidate(fastedit.load("random:llava-tiny", dtype="float64"), ledger)
    with pytest.raises(ValueError, match="stpes"):
        fastedit.consolidate(model, ledger, "ft", stpes=3)
