"""A case as data: its name, its way through JSON, its records and trained parts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import fastedit
from fastedit.published import case as cases
from fastedit.published.case import Case, arguments, case_of, trained_part
from tests.engine.conftest import make_edits


def test_a_case_goes_through_json_and_back() -> None:
    case = Case("sequential", "m", "a+b", "lora", "two layers", {"layers": (1, 2)}, {"steps": 3}, 7, (1, 5))
    stored = json.loads(json.dumps({**dataclasses.asdict(case), "name": case.name}))
    assert case_of(stored) == case
    assert (case.name, case.mode) == ("sequential/m/a+b/two layers", "sequential")
    assert Case("single", "m", "d", "lora").mode == "single"


def test_records_of_several_sets_come_by_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_edits(6)
    sets = {"a": made[:3], "b": made[3:]}
    monkeypatch.setattr(cases, "read_edits", lambda name, *, split, limit: sets[name][:limit])
    assert [edit.id for edit in cases.records("a+b", "eval", 5)] == [made[n].id for n in (0, 3, 1, 4, 2)]
    assert [edit.id for edit in cases.records("a", "eval", None)] == [edit.id for edit in made[:3]]


def test_a_trained_part_is_made_once(tmp_path: Path) -> None:
    model, pool = fastedit.load("random:llava-tiny"), make_edits(4)
    case = Case(
        "single",
        "random:llava-tiny",
        "d",
        "mend",
        training={"trainer": {"steps": 1, "batch_size": 2}, "valid_records": 1},
    )
    made = trained_part(case, model, pool, tmp_path)
    assert made is not None
    assert made[0].name.startswith("random:llava-tiny-d-mend-")
    written = made[0].stat().st_mtime_ns
    assert trained_part(case, model, pool, tmp_path) == made
    assert made[0].stat().st_mtime_ns == written
    assert arguments(case, pool, made, 5) == {"pool": pool, "seed": 5, "artifact": made[0]}
    untrained = Case("single", "random:llava-tiny", "d", "lora", settings={"rank": 2})
    assert trained_part(untrained, model, pool, tmp_path) is None
    assert arguments(untrained, pool, None, 0) == {"pool": pool, "seed": 0, "rank": 2}
