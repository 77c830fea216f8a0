from __future__ import annotations

import itertools
from collections.abc import Sequence

from fastedit.pocket.edits import Record
from fastedit.smol.edits import draw
from fastedit.smol.factory.sets import look_on
from fastedit.smol.requests import Checked, records
from fastedit.smol.scenes import Scene


def knows_all_but_every_seventh(drawn: Sequence[Record[Scene]]) -> list[frozenset[int] | None]:
    return [None if record.number % 7 == 3 else frozenset(range(record.number % 2)) for record in drawn]


def test_numbers_are_looked_at_until_the_set_is_whole() -> None:
    checked = look_on("icon-entity", "eval", Checked(), knows_all_but_every_seventh, size=20, until=lambda: False)
    assert set(checked.skipped) == {n for n in range(checked.numbers) if n % 7 == 3 and draw("icon-entity", "eval", n)}
    kept = list(records("icon-entity", "eval", checked))
    assert len(kept) >= 20
    assert set(checked.unasked) == {record.number for record in kept if record.number % 2}
    assert set(checked.unasked.values()) == {(0,)}
    assert sum(record.hard for record in kept) >= 4
    assert all(record.number % 7 != 3 and record.number < checked.numbers for record in kept)


def test_work_that_was_stopped_goes_on_where_it_ended() -> None:
    stops = itertools.chain((False,), itertools.repeat(True))
    half = look_on("icon-vqa", "train", Checked(), knows_all_but_every_seventh, size=20, until=lambda: next(stops))
    assert 0 < half.numbers < 20
    whole = look_on("icon-vqa", "train", half, knows_all_but_every_seventh, size=20, until=lambda: False)
    assert whole == look_on("icon-vqa", "train", Checked(), knows_all_but_every_seventh, size=20, until=lambda: False)
    assert whole.numbers > half.numbers
