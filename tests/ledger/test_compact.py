"""Few files of what is of use; who reads meanwhile finds what it looked up."""

from __future__ import annotations

import pytest

import fastedit
from fastedit import EditRequest, Ledger, LedgerError
from fastedit.ledger import compact as compacting
from fastedit.ledger.segments import Segments
from tests.engine.test_editing import largest_difference
from tests.ledger.conftest import FEW


def test_what_is_of_use_stays(ledger: Ledger, edits: list[EditRequest], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compacting, "MOST_DELTAS", 3)
    ledger.edit(edits[:4], "ft", evaluate=False, views="record", **FEW)
    ledger.tag("four")
    tagged = list(ledger.at("four").deltas)
    ledger.undo(2)
    untagged = ledger.history()[-1].id
    ledger.undo(1)
    now, reader = list(ledger.state().deltas), ledger.state().deltas
    old = ledger.at(untagged).deltas
    done = ledger.compact()
    # Four at the tag and two now; two that were fitted again in between are gone
    assert (done.segments, done.removed) == ((8, 2), 2)
    assert sorted(path.name for path in (ledger.folder / "segments").iterdir()) == [
        "00000009.safetensors",
        "00000010.safetensors",
    ]
    assert largest_difference(list(ledger.state().deltas), now) == 0
    assert largest_difference(list(reader), now) == 0
    assert largest_difference(list(ledger.at("four").deltas), tagged) == 0
    with pytest.raises(LedgerError, match=r"of moments before event \d+, at which it was compacted, those with a tag"):
        ledger.at(untagged)
    with pytest.raises(fastedit.DamagedLedger, match=r"segments/|safetensors"):
        list(old)
    assert ledger.redo(2).refitted == (2,)
    assert ledger.verify().sound
    assert str(done).startswith("8 files of ")


def test_what_breaks_off_on_the_way_changes_nothing(
    ledger: Ledger, edits: list[EditRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger.edit(edits[:3], "grace", evaluate=False, **FEW)
    before, events = list(ledger.state().deltas), ledger.history()
    with monkeypatch.context() as patched:
        patched.setattr(Segments, "write", lambda *_details: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(OSError, match="full"):
            ledger.compact()
    assert ledger.history() == events
    assert largest_difference(list(ledger.state().deltas), before) == 0
    ledger.compact()
    assert largest_difference(list(ledger.state().deltas), before) == 0
    assert ledger.compact().segments == (1, 1)
