"""Deltas that were made elsewhere stand in a ledger as its own."""

from __future__ import annotations

from pathlib import Path

import pytest

import fastedit
from fastedit import EditRequest, Ledger, LedgerError
from fastedit.backbone import EditableModel
from tests.engine.test_editing import largest_difference
from tests.ledger.conftest import FEW

SURE = {"steps": 60, "lr": 1e-2, "evaluate": False, "show_progress": False}


def test_an_adapter_of_others_is_kept_asked_and_taken_back(
    ledger: Ledger, model: EditableModel, edits: list[EditRequest], tmp_path: Path
) -> None:
    made = fastedit.edit(model, edits[:2], "lora", **SURE)
    made.export("peft", tmp_path / "adapters", model, each=True)
    folders = sorted(path for path in (tmp_path / "adapters").iterdir() if path.is_dir())
    foreign = [fastedit.from_peft(folder, model) for folder in folders]
    assert ledger.add(foreign, edits[:2]) == [1, 2]
    assert [delta.request_id for delta in ledger.state().deltas] == ["edit-0", "edit-1"]
    found = ledger.verify(ask=True)
    assert (found.sound, found.asked, found.lost) == (True, 2, ())
    assert [event.action for event in ledger.history()] == ["add"]
    with fastedit.attached(model, list(ledger.state().deltas)):
        pass
    ledger.undo(1)
    ledger.redo("edit-0")
    ledger.edit(edits[2:4], "lora", mode="single", **FEW)
    assert ledger.state().edit_ids == [1, 2, 3, 4]
    assert ledger.compact().removed == 1


def test_deltas_of_a_run_go_into_a_ledger(ledger: Ledger, model: EditableModel, edits: list[EditRequest]) -> None:
    made = fastedit.edit(model, edits[:3], "grace", **FEW)
    ledger.add(made.deltas, edits[:3])
    assert largest_difference(list(ledger.state().deltas), list(made.deltas)) == 0
    again = ledger.edit(edits[:4], "grace", **FEW)
    assert len(ledger) == 4
    assert largest_difference(list(again.deltas)[:3], list(made.deltas)) == 0
    with pytest.raises(LedgerError, match=r"a question has one answer"):
        ledger.add(made.deltas[0], [EditRequest(edits[0].prompt, "x", edits[0].image)])


def test_what_cannot_stand_there_is_refused(ledger: Ledger, model: EditableModel, edits: list[EditRequest]) -> None:
    row = fastedit.edit(model, edits[:3], "ft", mode="sequential", evaluate=False, **FEW)
    with pytest.raises(
        LedgerError, match=r"fitted each alone on the base model \(got deltas\[1\], of request 'edit-1'"
    ):
        ledger.add(row.deltas, edits[:3])
    with pytest.raises(LedgerError, match=r"every delta has a request \(got 1 for 3\)"):
        ledger.add(row.deltas, edits[:1])
    other = fastedit.edit(model, edits[:2], "tpatcher", evaluate=False, **FEW)
    with pytest.raises(LedgerError, match=r"method says what made deltas of kind 'key_value'"):
        ledger.add(other.deltas, edits[:2])
    assert ledger.add(other.deltas, edits[:2], method="tpatcher") == [1, 2]
    with pytest.raises(LedgerError, match="edits that act are of one method and mode"):
        ledger.add(row.deltas[0], edits[2:3])
