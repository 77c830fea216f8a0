from __future__ import annotations

from collections.abc import Sequence

from fastedit.pocket.edits import Record
from fastedit.smol.factory.sets import look_on
from fastedit.smol.requests import Checked, records
from fastedit.smol.scenes import Scene


def knows_all_but_every_seventh(drawn: Sequence[Record[Scene]]) -> list[frozenset[int] | None]:
    return [None if record.number % 7 == 3 else frozenset(range(record.number % 2)) for record in drawn]


def test_numbers_are_looked_at_until_the_set_is_whole() -> None:
    *_, checked = look_on("icon-entity", "eval", Checked(), knows_all_but_every_seventh, size=20)
    kept = list(records("icon-entity", "eval", checked))
    assert len(kept) >= 20
    assert {record.number for record in kept if record.number % 2} <= set(checked.unasked)
    assert set(checked.unasked.values()) == {(0,)}
    assert sum(record.hard for record in kept) >= 4
    assert all(record.number % 7 != 3 and record.number < checked.numbers for record in kept)


def test_records_of_a_kind_that_is_complete_are_not_asked() -> None:
    asked: list[Record[Scene]] = []

    def knows_no_hard_one(drawn: Sequence[Record[Scene]]) -> list[frozenset[int] | None]:
        asked.extend(drawn)
        return [None if record.hard else frozenset() for record in drawn]

    looked = look_on("icon-entity", "train", Checked(), knows_no_hard_one, size=20)
    next(looked)
    done = next(looked)
    before = len(asked)
    after = next(looked)
    assert all(record.hard for record in asked[before:])
    assert set(done.skipped) == {record.number for record in asked[:before] if record.hard}
    assert set(after.skipped) - set(done.skipped) == {record.number for record in asked[before:]}


def test_work_that_was_stopped_goes_on_where_it_ended() -> None:
    half = next(look_on("icon-vqa", "train", Checked(), knows_all_but_every_seventh, size=60))
    *_, whole = look_on("icon-vqa", "train", half, knows_all_but_every_seventh, size=60)
    *_, at_once = look_on("icon-vqa", "train", Checked(), knows_all_but_every_seventh, size=60)
    assert whole == at_once
    assert 0 < half.numbers < 60 < whole.numbers
