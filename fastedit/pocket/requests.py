"""Edit records as `EditRequest`s: numbers drawn in order, those left out that the model does not know."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fastedit.pocket.edits import FURTHER, HARD_EVERY, SIZE, Asked, Record, SceneT, draw
from fastedit.pocket.world import AnyScene, render
from fastedit.requests import PARAPHRASE_KINDS, EditRequest, Probe, Query

if TYPE_CHECKING:
    from PIL import Image

SKIPPED = "skipped.json"


def requests(name: str, split: str, limit: int | None, folder: Path) -> list[EditRequest]:
    """Return the first `limit` requests of a set's split for the model in `folder`."""
    left_out = json.loads((folder / SKIPPED).read_text(encoding="utf-8"))[name][split]
    unasked = {int(number): frozenset(places) for number, places in (left_out["unasked"] or {}).items()}
    # A model that was asked none of the further questions before it was released is asked none of them.
    otherwise = frozenset(range(FURTHER)) if left_out["unasked"] is None else frozenset()
    chosen = itertools.islice(records(name, split, frozenset(left_out["skipped"])), limit)
    return [
        request(name, split, place, record, render, unasked.get(record.number, otherwise))
        for place, record in enumerate(chosen)
    ]


def records(name: str, split: str, skipped: frozenset[int] = frozenset()) -> Iterator[Record[AnyScene]]:
    """Yield the records of a split in order of their numbers, SIZE[split] in all, one hard one in HARD_EVERY."""
    return numbered(functools.partial(draw, name, split), SIZE[split], skipped)


def numbered(
    drawn: Callable[[int], Record[SceneT] | None], size: int, skipped: frozenset[int], end: int | None = None
) -> Iterator[Record[SceneT]]:
    """Yield `size` records in order of their numbers, one hard one in HARD_EVERY.

    Args:
        drawn: gives the record of a number; None for the few numbers that give none.
        skipped: numbers that are left out. end: the first number that is not looked at, if there is one.
    """
    hard_left = size // HARD_EVERY
    other_left = size - hard_left
    for number in itertools.count() if end is None else range(end):
        hard = number % HARD_EVERY == 0
        if number in skipped or (hard_left if hard else other_left) == 0:
            continue
        record = drawn(number)
        if record is None:
            continue
        yield record
        hard_left, other_left = hard_left - hard, other_left - (not hard)
        if hard_left == 0 == other_left:
            return


def request(
    name: str,
    split: str,
    place: int,
    record: Record[SceneT],
    draw_image: Callable[[SceneT], Image.Image],
    unasked: frozenset[int] = frozenset(),
) -> EditRequest:
    """Return a record with its images, drawn by `draw_image`; further questions are asked but those of `unasked`."""

    @functools.cache
    def image(scene: SceneT | None) -> Image.Image | None:
        return None if scene is None else draw_image(scene)

    def probes(kind: str, asked: tuple[Asked[SceneT], ...]) -> list[Probe]:
        return [Probe(kind, one.prompt, image(one.scene), one.answer) for one in asked]

    further = [one for number, one in enumerate(record.further) if number not in unasked]
    paraphrases = [one for one in further if one.kind in PARAPHRASE_KINDS]
    others = [(*wording_of(one.kind), one) for one in further if one.kind not in PARAPHRASE_KINDS]
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
        probes=(
            *probes("near", record.near),
            *probes("blind", record.blind),
            *probes("same", record.same),
            *(Probe(kind, one.prompt, image(one.scene), one.answer, wording) for kind, wording, one in others),
        ),
        prediction=record.truth,
        id=f"{name}/{split}#{place}",
        tags=("hard", record.kind) if record.hard else (record.kind,),
        paraphrases=tuple(Query(one.prompt, image(one.scene), record.target, one.kind) for one in paraphrases),
    )


def wording_of(score: str) -> tuple[str, str]:
    """Return the kind and the wording of the probes that count for a score."""
    kind = score.removesuffix("_unseen")
    return kind, "" if kind == score else "unseen"
