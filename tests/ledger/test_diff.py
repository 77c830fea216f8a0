"""Which answers differ between two moments."""

from __future__ import annotations

import pytest

import fastedit
from fastedit import EditRequest, Ledger, LedgerError, Query
from fastedit.backbone import EditableModel

SURE = {"steps": 60, "lr": 1e-2, "evaluate": False, "show_progress": False}


@pytest.mark.parametrize("mode", ["sequential", "single"])
def test_answers_before_and_after(ledger: Ledger, model: EditableModel, edits: list[EditRequest], mode: str) -> None:
    base = [model.answer(edit.image, edit.prompt) for edit in edits[:2]]
    ledger.edit(edits[:1], "lora", mode=mode, views="record", **SURE)
    ledger.tag("one")
    assert [(c.edit, c.before, c.after) for c in ledger.diff()] == [(1, base[0], "blue")]
    ledger.edit(edits[1:2], "lora", mode=mode, views="record", **SURE)
    found = {change.edit: (change.before, change.after) for change in ledger.diff("one")}
    assert found[2][1] == "seven red"
    assert ledger.diff("one", "one") == []
    ledger.undo(1)
    found = {change.edit: (change.before, change.after) for change in ledger.diff("one")}
    with ledger.state().applied() as edited:
        with_the_other = edited.answer(edits[0].image, edits[0].prompt)
    assert found[1] == ("blue", with_the_other if mode == "sequential" else base[0])
    assert ledger.diff("one", 0)[0].after == base[0]
    for change in ledger.diff("one"):
        assert change.query.prompt in {edit.prompt for edit in edits}


def test_questions_of_ones_own(ledger: Ledger, edits: list[EditRequest]) -> None:
    ledger.edit(edits[:1], "lora", **{**SURE, "views": "record"})
    asked = [Query(edits[0].prompt, edits[0].image), Query("Unrelated?", None)]
    changed = ledger.diff(questions=asked)
    assert changed[0].query is asked[0]
    assert changed[0].edit is None
    with pytest.raises(LedgerError, match=r"questions are fastedit.Query .got questions\[0\]='What"):
        ledger.diff(questions=["What?"])


def test_edits_that_act_alone_are_asked_each_with_its_own(ledger: Ledger, edits: list[EditRequest]) -> None:
    ledger.edit(edits[:2], "lora", mode="single", **SURE)
    assert {change.edit: change.after for change in ledger.diff()} == {1: "blue", 2: "seven red"}
    with pytest.raises(LedgerError, match="were fitted each alone and do not act together"):
        ledger.diff(questions=[fastedit.Query("What?")])
