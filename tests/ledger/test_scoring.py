"""What acts in a ledger is scored without being made again, here and by workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fastedit
from fastedit import EditRequest, Ledger, LedgerError
from fastedit.backbone import EditableModel
from fastedit.engine import Run
from fastedit.ledger.scoring import LedgerScores, score_edits
from tests.ledger.conftest import FEW

QUIET: dict[str, Any] = {"show_progress": False, "batch_size": 2}


def assert_same(found: LedgerScores, run: Run) -> None:
    assert list(found.edits) == sorted(found.edits)
    for mine, wanted in zip(found.edits.values(), run.edit_scores, strict=True):
        assert mine.answers == wanted.answers
        assert mine.strict == pytest.approx(wanted.strict, abs=1e-8, nan_ok=True)
    assert found.scores.keys() == run.scores.keys()


@pytest.mark.parametrize(("method", "mode"), [("lora", "single"), ("grace", "sequential"), ("lora", "sequential")])
def test_scores_are_those_of_a_run_that_was_scored(
    model: EditableModel, edits: list[EditRequest], ledger: Ledger, method: str, mode: str
) -> None:
    given = {**FEW, "method": method, "mode": mode}
    wanted = fastedit.edit(model, edits[:3], **given)
    ledger.edit(edits[:3], evaluate=False, **given)
    first = score_edits(ledger, **QUIET)
    assert first.new == 3
    assert_same(first, wanted)
    # They are kept: the run that is asked for again has them, and nothing is asked twice
    again = score_edits(ledger, **QUIET)
    assert again.new == 0
    assert_same(again, wanted)
    assert ledger.verify().sound


def test_workers_score_what_acts(model: EditableModel, edits: list[EditRequest], ledger: Ledger) -> None:
    given = {**FEW, "method": "grace", "mode": "sequential"}
    wanted = fastedit.edit(model, edits[:3], **given)
    ledger.edit(edits[:3], evaluate=False, **given)
    found = score_edits(ledger, engine="processes", workers=1, **QUIET)
    assert found.new == 3
    assert_same(found, wanted)


def test_an_empty_ledger_is_refused(ledger: Ledger, tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="edits act whose questions can be asked"):
        score_edits(ledger)
    with pytest.raises(ValueError, match="engine is one of"):
        score_edits(ledger, engine="threads")
    with pytest.raises(ValueError, match="batch_size is at least 1"):
        score_edits(ledger, batch_size=0)
