"""The edits of a moment act, and those of now follow the ledger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fastedit
from fastedit import EditRequest, Ledger, LedgerError
from fastedit.backbone import EditableModel
from fastedit.deltas import EditDelta
from fastedit.methods.grace import GRACE, GRACEConfig
from tests.ledger.conftest import FEW

SURE = {"steps": 60, "lr": 1e-2, "show_progress": False}


@pytest.mark.parametrize("method", ["ft", "lora", "grace", "wise", "tpatcher"])
def test_what_acts_is_what_was_scored(
    ledger: Ledger, model: EditableModel, edits: list[EditRequest], method: str
) -> None:
    run = ledger.edit(edits[:4], method, views="record", **{**FEW, "steps": 25})
    ledger.close()
    with fastedit.open_ledger(ledger.folder, model) as opened, opened.state().applied() as edited:
        answers = [edited.answer(edit.image, edit.prompt, max_new_tokens=48) for edit in edits[:4]]
    assert answers == [scores.answers[0]["after"] for scores in run.edit_scores]


def test_now_follows_the_ledger_and_is_one_object_meanwhile(
    ledger: Ledger, model: EditableModel, edits: list[EditRequest]
) -> None:
    live = fastedit.open_ledger(ledger.folder, model).active()
    assert len(live.current()) == 0
    ledger.edit(edits[:2], "grace", evaluate=False, **FEW)
    first = live.current()
    assert live.current() is first
    assert [delta.request_id for delta in live] == ["edit-0", "edit-1"]
    ledger.tag("a tag changes nothing that acts")
    assert live.current() is first
    ledger.undo(1)
    assert live.current() is not first
    assert [delta.request_id for delta in live] == ["edit-1"]
    assert live[0].request_id == "edit-1"
    ledger.undo(2)
    assert len(live) == 0


def test_edits_that_were_fitted_each_alone_do_not_act_together(ledger: Ledger, edits: list[EditRequest]) -> None:
    ledger.edit(edits[:2], "lora", mode="single", evaluate=False, **FEW)
    for call in (lambda: ledger.active().current(), lambda: ledger.state().applied().__enter__()):
        with pytest.raises(LedgerError, match=r"mode='single' were fitted each alone .*use mode='sequential'"):
            call()
    assert len(ledger.state().deltas) == 2


def test_trained_parts_lie_in_the_ledger(model: EditableModel, edits: list[EditRequest], tmp_path: Path) -> None:
    from fastedit.training import TrainerConfig

    small: dict[str, Any] = {"valid_records": 2}
    own = fastedit.load("random:llava-tiny", dtype="float64")
    part = fastedit.train(
        own, "ldke", edits, trainer=TrainerConfig(steps=1, batch_size=2), show_progress=False, **small
    )
    with fastedit.open_ledger(tmp_path / "edits", own) as ledger:
        ledger.edit(edits[:2], "ldke", artifact=part, pool=edits[3:], evaluate=False, **FEW)
    fresh = fastedit.load("random:llava-tiny", dtype="float64")
    with fastedit.open_ledger(tmp_path / "edits", fresh) as ledger:
        assert set(fresh.artifacts) == {part.id}
        with ledger.state().applied() as edited:
            edited.answer(edits[0].image, edits[0].prompt)
        assert ledger.verify().sound
    path = next((tmp_path / "edits" / "artifacts").iterdir())
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(fastedit.DamagedLedger, match=path.name):
        fastedit.open_ledger(tmp_path / "edits", fastedit.load("random:llava-tiny", dtype="float64"))
    assert path.name in fastedit.open_ledger(tmp_path / "edits").verify().problems[0]


def test_a_codebook_in_sequence_is_what_the_method_made_of_it(
    ledger: Ledger, model: EditableModel, edits: list[EditRequest]
) -> None:
    """Balls that meet shrink; what follows the ledger goes on from what it had."""
    options = {**FEW, "epsilon": 50.0, "evaluate": False, "views": "record"}
    live = ledger.active()
    committed: list[EditDelta] = []
    for count in range(1, 6):
        ledger.edit(edits[count - 1 : count], "grace", **options)
        committed = GRACE.combine(GRACEConfig(), committed, ledger.state().deltas[-1])
        for deltas in (live.current(), ledger.state().acting()):
            assert [delta.id for delta in deltas] == [delta.id for delta in committed]
            assert deltas.ids == [delta.id for delta in committed]  # type: ignore[attr-defined]
    fitted = [delta.id for delta in ledger.state().deltas]
    assert sum(a != b for a, b in zip(fitted, live.current().ids, strict=True)) >= 2  # type: ignore[attr-defined]
    assert [delta.id for delta in live.current()[1:4]] == [delta.id for delta in committed[1:4]]
    ledger.undo(2)
    assert [delta.request_id for delta in live.current()] == ["edit-0", "edit-2", "edit-3", "edit-4"]
    assert live.current().ids == ledger.state().acting().ids  # type: ignore[attr-defined]
