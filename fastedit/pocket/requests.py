"""Edit records as `EditRequest`s: numbers drawn in order, those left out that the model does not know."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fastedit.pocket.edits import HARD_EVERY, SIZE, Asked, Record, draw
from fastedit.pocket.world import AnyScene, render
from fastedit.requests import EditRequest, Probe, Query

if TYPE_CHECKING:
    from PIL import Image

SKIPPED = "skipped.json"


def requests(name: str, split: str, limit: int | None, folder: Path) -> list[EditRequest]:
    """Return the first `limit` requests of a set's split for the model in `folder`."""
    skipped = json.loads((folder / SKIPPED).read_text(encoding="utf-8"))[name][split]
    chosen = itertools.islice(records(name, split, frozenset(skipped)), limit)
    return [_request(name, split, place, record) for place, record in enumerate(chosen)]


def records(name: str, split: str, skipped: frozenset[int] = frozenset()) -> Iterator[Record]:
    """Yield the records of a split in order of their numbers, SIZE[split] in all, one hard one in HARD_EVERY."""
    hard_left = SIZE[split] // HARD_EVERY
    other_left = SIZE[split] - hard_left
    for number in itertools.count():
        hard = number % HARD_EVERY == 0
        if number in skipped or (hard_left if hard else other_left) == 0:
            continue
        record = draw(name, split, number)
        if record is None:
            continue
        yield record
        hard_left, other_left = hard_left - hard, other_left - (not hard)
        if hard_left == 0 == other_left:
            return


def _request(name: str, split: str, place: int, record: Record) -> EditRequest:
    @functools.cache
    def image(scene: AnyScene | None) -> Image.Image | None:
        return None if scene is None else render(scene)

    def probes(kind: str, asked: tuple[Asked, ...]) -> list[Probe]:
        return [Probe(kind, one.prompt, image(one.scene), one.answer) for one in asked]

    return EditRequest(
        prompt=record.prompt,
        target=record.target,
        image=image(record.scene),
        rephrase=record.rephrase,
        image_rephrase=image(record.rephrased),
        locality_prompt=record.fact.prompt,
        locality_answer=record.fact.answer,
        image_locality_image=image(record.locality.scene),
        image_locality_prompt=record.locality.prompt,
        image_locality_answer=record.locality.answer,
        portability=tuple(Query(one.prompt, image(one.scene), one.answer, one.kind) for one in record.portability),
        probes=(*probes("near", record.near), *probes("blind", record.blind), *probes("same", record.same)),
        prediction=record.truth,
        id=f"{name}/{split}#{place}",
        tags=("hard", record.kind) if record.hard else (record.kind,),
    )
