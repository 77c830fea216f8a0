"""Edits taken back and made to act again, each in one transaction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fastedit
from fastedit import EditRequest, Ledger, LedgerError
from fastedit.backbone import EditableModel
from fastedit.engine.apply import require_sequence
from fastedit.ledger import undo as undoing
from tests.engine.test_editing import largest_difference
from tests.ledger.conftest import FEW

SURE = {"steps": 60, "lr": 1e-2, "show_progress": False}


@pytest.mark.parametrize("method", ["grace", "lora"])
def test_edits_that_stand_beside_each_other_go_and_come_back(
    ledger: Ledger, edits: list[EditRequest], method: str
) -> None:
    ledger.edit(edits[:4], method, mode="single", **FEW)
    before = list(ledger.state().deltas)
    assert str(ledger.undo_cost(2)) == "1 edit"
    assert len(ledger) == 4
    done = ledger.undo([2, "edit-2"])
    assert (done.ids, done.refitted, done.kept) == ((2, 3), (), ())
    assert ledger.state().edit_ids == [1, 4]
    assert [shown.status for shown in ledger.edits()] == ["acts", "undone", "undone", "acts"]
    with pytest.raises(LedgerError, match=r"what is taken back acts \(got edit 2, which is 'undone'"):
        ledger.undo(2)
    with pytest.raises(LedgerError, match=r"what acts again was taken back \(got edit 1, which is 'acts'"):
        ledger.redo(1)
    ledger.redo([3, 2])
    assert ledger.state().edit_ids == [1, 2, 3, 4]
    assert largest_difference(list(ledger.state().deltas), before) == 0
    assert [event.action for event in ledger.history()[-2:]] == ["undo", "redo"]


@pytest.mark.parametrize("method", ["ft", "lora", "wise", "tpatcher"])
def test_later_edits_are_fitted_again_as_if_the_one_had_never_been_made(
    ledger: Ledger, model: EditableModel, edits: list[EditRequest], method: str
) -> None:
    ledger.edit(edits[:4], method, evaluate=False, views="record", **FEW)
    before = list(ledger.state().deltas)
    ledger.tag("four")
    cost = ledger.undo_cost(2)
    assert (cost.refitted, cost.event, str(cost)) == ((3, 4), 0, "1 edit; 2 edits behind fitted again")
    done = ledger.undo(2)
    assert (done.ids, done.refitted) == ((2,), (3, 4))
    never = fastedit.edit(
        model, [edits[0], edits[2], edits[3]], method, mode="sequential", evaluate=False, views="record", **FEW
    )
    now = list(ledger.state().deltas)
    assert largest_difference(now, list(never.deltas)) < 1e-8
    with ledger.state().applied():
        pass
    # What was there is there: at the tag, and by taking the taking back back
    assert largest_difference(list(ledger.at("four").deltas), before) == 0
    assert ledger.redo(2).refitted == ()
    assert largest_difference(list(ledger.state().deltas), before) == 0
    # Once something else has happened it is fitted anew, behind the others
    ledger.undo(2)
    ledger.edit(edits[4:5], method, evaluate=False, views="record", **FEW)
    assert ledger.redo(2).refitted == (2,)
    assert ledger.state().edit_ids == [1, 3, 4, 5, 2]
    with ledger.state().applied():
        pass


def test_later_edits_are_kept_and_asked_again(ledger: Ledger, edits: list[EditRequest]) -> None:
    ledger.edit(edits[:4], "ft", views="record", **SURE)
    before = list(ledger.state().deltas)
    done = ledger.undo(1, later="keep")
    assert (done.kept, done.refitted) == ((2, 3, 4), ())
    now = list(ledger.state().deltas)
    assert largest_difference(now, before[1:]) == 0
    require_sequence(now)
    lost = ledger.verify(ask=True).lost
    assert [each.edit for each in done.lost] == [each.edit for each in lost]
    with ledger.state().applied() as edited:
        for each in lost:
            assert edited.answer(each.request.image, each.request.prompt) == each.answer != each.request.target
    with pytest.raises(LedgerError, match=r"later is one of \['refit', 'keep'\]"):
        ledger.undo(2, later="drop")


def test_the_records_that_edits_were_fitted_with_are_needed_again(ledger: Ledger, edits: list[EditRequest]) -> None:
    pool = edits[3:]
    ledger.edit(edits[:3], "kl+lora", pool=pool, evaluate=False, **FEW)
    events = ledger.history()
    for given in (None, pool[:2]):
        with pytest.raises(LedgerError, match=r"fitted again with the records that they were fitted with: pool="):
            ledger.undo(1, pool=given)
    assert ledger.history() == events
    assert ledger.undo(1, pool=pool).refitted == (2, 3)
    assert ledger.undo(2, later="keep").kept == (3,)


def test_what_breaks_off_on_the_way_changes_nothing(
    ledger: Ledger, model: EditableModel, edits: list[EditRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger.edit(edits[:4], "ft", evaluate=False, views="record", **FEW)
    before, events = list(ledger.state().deltas), ledger.history()
    real, calls = undoing.refit, []

    def broken(*details: Any) -> Any:
        real(*details)
        calls.append(1)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(undoing, "refit", broken)
        with pytest.raises(KeyboardInterrupt):
            ledger.undo(2)
    assert calls
    assert (ledger.history(), ledger.state().edit_ids) == (events, [1, 2, 3, 4])
    assert largest_difference(list(ledger.state().deltas), before) == 0
    # The files that were written for it are gone
    assert len(list((ledger.folder / "segments").iterdir())) == 4
    assert ledger.verify().sound


def test_edits_of_several_runs_are_fitted_again_as_each_was(
    tmp_path: Path, model: EditableModel, edits: list[EditRequest]
) -> None:
    with fastedit.open_ledger(tmp_path / "one", model) as ledger:
        ledger.edit(edits[:2], "ft", evaluate=False, views="record", **FEW)
        ledger.edit(edits[2:4], "kl+ft", evaluate=False, views="record", steps=3, lr=1e-3, show_progress=False)
        assert ledger.undo(1).refitted == (2, 3, 4)
        now = list(ledger.state().deltas)
    with fastedit.open_ledger(tmp_path / "two", model) as other:
        other.edit(edits[1:2], "ft", evaluate=False, views="record", **FEW)
        other.edit(edits[2:4], "kl+ft", evaluate=False, views="record", steps=3, lr=1e-3, show_progress=False)
        assert largest_difference(now, list(other.state().deltas)) < 1e-8


def test_the_last_of_a_sequence_is_taken_back_without_the_model(ledger: Ledger, edits: list[EditRequest]) -> None:
    ledger.edit(edits[:3], "lora", evaluate=False, **FEW)
    with fastedit.open_ledger(ledger.folder) as reader:
        assert reader.undo(3).refitted == ()
        assert reader.redo_cost(3).refitted == ()
        assert reader.state().edit_ids == [1, 2]
    ledger.edit(edits[3:4], "lora", evaluate=False, **FEW)
    assert ledger.redo_cost(3).refitted == (3,)
    assert ledger.state().edit_ids == [1, 2, 4]
    assert ledger.redo(3).refitted == (3,)
