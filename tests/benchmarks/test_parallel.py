"""What is measured of several workers: on a tiny model, with one kill."""

from __future__ import annotations

from typing import Any

import pytest

import fastedit
from benchmarks import parallel
from fastedit.backbone import EditableModel
from fastedit.engine.parallel.dispatch import Taken
from fastedit.engine.parallel.worker import ShardResult
from tests.engine.conftest import make_edits

GIVEN: dict[str, Any] = {"method": "lora", "steps": 2, "batch_size": 2, "show_progress": False}


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return fastedit.load("random:llava-tiny", dtype="float64")


def test_a_kill_loses_nothing(model: EditableModel) -> None:
    told = parallel.kills(model, make_edits(6), GIVEN, engine="processes", workers=1, count=1, every_s=0.2)
    assert (told["kills"], told["committed"], told["committed_twice"]) == (1, 6, 0)
    assert (told["lost"], told["unequal"], told["answers_differ"], told["set_aside"]) == (0, 0, 0, 0)
    assert told["ledger_sound"]


def test_seconds_of_workers(model: EditableModel) -> None:
    edits = make_edits(4)
    told = parallel.efficiency(model, edits, GIVEN, counts=(1,))
    (row,) = told["rows"]
    assert told["speedup"] == 1
    assert row["shards"] == len(row["shard_s"]) == len(row["commit_s"]) == len(row["bytes"]) == 2
    # The seconds of a run are those of its shards, what is between them, and the last commit
    assert row["seconds"] >= sum(row["shard_s"])
    assert row["shard_edits"] == [2, 2]
    assert row["images_twice"] == 0


def test_differences_are_counted(model: EditableModel) -> None:
    edits = make_edits(3)
    run = fastedit.edit(model, edits, **GIVEN)
    same = parallel.differences(run, run)
    assert same == {"lost": 0, "largest_difference": 0.0, "unequal": 0, "answers_differ": 0}
    other = fastedit.edit(model, edits[:2], **{**GIVEN, "steps": 3})
    told = parallel.differences(other, run)
    assert (told["lost"], told["unequal"]) == (1, 2)


def test_images_that_two_workers_saw() -> None:
    edits = make_edits(2)
    apart = [Taken(place, ShardResult({place: (None, None, None)}), 0, 0.0, 0.0) for place in (0, 1)]
    assert parallel.seen_twice(edits, apart) == 0
    both = [*apart, Taken(1, ShardResult({0: (None, None, None)}), 0, 0.0, 0.0)]
    # Three images of the edit, and that of its nearest probe
    assert 0 < parallel.seen_twice(edits, both) <= 0.5
