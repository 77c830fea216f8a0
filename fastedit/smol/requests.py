"""The edit sets of smol-llava as `EditRequest`s, with their pictures."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastedit.pocket.edits import Record
from fastedit.pocket.requests import SKIPPED, numbered, request
from fastedit.requests import EditRequest
from fastedit.smol.edits import SIZE, draw
from fastedit.smol.names import SETS
from fastedit.smol.scenes import Scene, render

_log = logging.getLogger(__name__)
_ASSETS = Path(__file__).parent / "assets"


@dataclasses.dataclass(frozen=True, slots=True)
class Checked:
    """Which records of a split the model was asked.

    numbers: how many numbers were looked at, from 0 on; the set ends there; 0: none was, and every record is in the
    set. skipped: those of them at which the model does not answer every unedited question rightly. unasked: by
    number, which of the further questions it does not answer rightly, so that they are not asked.
    """

    numbers: int = 0
    skipped: tuple[int, ...] = ()
    unasked: Mapping[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)


def edit_set(name: str, split: str = "eval", limit: int | None = None) -> list[EditRequest]:
    """Return an edit set of icons, the same on every machine; images are PIL images, rendered here.

    Args:
        name: "icon-entity", "icon-vqa" or "icon-caption".
        split: "train" (at most 1,000 records) or "eval" (at most 500, a fifth of them tagged "hard"), which edit
            different concepts.
        limit: only the first so many.
    Raises:
        ValueError: unknown name or split, or a negative limit.
        ModuleNotFoundError: a package of the extra "smol" is not installed; says what to install.
    """
    if name not in SETS:
        raise ValueError(f"edit_set: name must be one of {', '.join(SETS)} (got name={name!r})")
    if split not in SIZE:
        raise ValueError(f"edit_set: split must be one of {', '.join(SIZE)} (got split={split!r})")
    if limit is not None and limit < 0:
        raise ValueError(f"edit_set: limit must not be negative (got limit={limit})")
    checked = read_checked(name, split)
    if not checked.numbers:
        _log.warning(
            "%s/%s: the shipped model was not asked these records: it may answer some of their questions wrongly "
            "before any edit; python -m fastedit.smol.factory.sets --only %s/%s looks for those",
            name, split, name, split,
        )  # fmt: skip
    chosen = itertools.islice(records(name, split, checked), limit)
    return [
        request(name, split, place, record, render, frozenset(checked.unasked.get(record.number, ())))
        for place, record in enumerate(chosen)
    ]


def records(name: str, split: str, checked: Checked) -> Iterator[Record[Scene]]:
    """Yield the records of a split in order of their numbers, at most SIZE[split], of those that were looked at."""
    return numbered(
        functools.partial(draw, name, split), SIZE[split], frozenset(checked.skipped), checked.numbers or None
    )


def read_checked(name: str, split: str) -> Checked:
    """Return which records of a split the shipped model was asked; none where the file does not say."""
    stored = _stored().get(f"{name}/{split}", {})
    unasked = {int(number): tuple(which) for number, which in stored.get("unasked", {}).items()}
    return Checked(stored.get("numbers", 0), tuple(stored.get("skipped", ())), unasked)


def write_checked(name: str, split: str, checked: Checked) -> None:
    """Put the numbers of a split into the file of all splits, in its place at once."""
    stored = _stored() | {f"{name}/{split}": dataclasses.asdict(checked)}
    part = _ASSETS / f"{SKIPPED}.part"
    part.write_text(json.dumps(stored, separators=(",", ":"), sort_keys=True) + "\n", encoding="utf-8")
    part.replace(_ASSETS / SKIPPED)


def _stored() -> dict[str, Any]:
    path = _ASSETS / SKIPPED
    stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return stored
