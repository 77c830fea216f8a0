"""Few files of what is of use, instead of many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastedit.deltas import EditDelta
from fastedit.ledger.segments import COLUMNS, Segments, Stored, stored_of

if TYPE_CHECKING:
    from fastedit.ledger.ledger import Ledger

#: Most deltas and bytes of a segment.
MOST_DELTAS, MOST_BYTES = 256, 256 << 20


@dataclass(frozen=True)
class Compacted:
    """What was written anew.

    Args:
        segments, bytes: of the files, before and after. removed: versions that are gone.
    """

    segments: tuple[int, int]
    bytes: tuple[int, int]
    removed: int

    def __str__(self) -> str:
        return (
            f"{self.segments[0]} files of {self.bytes[0] / 2**20:,.1f} MiB are {self.segments[1]} of "
            f"{self.bytes[1] / 2**20:,.1f} MiB; {self.removed} versions are gone"
        )


def compact(ledger: Ledger) -> Compacted:
    """See ``Ledger.compact``. One transaction; who reads meanwhile finds what it looked up before."""
    contents = ledger.contents
    with contents.writing():
        kept, removed = _kept(ledger)
        before = contents.database.rows("SELECT id, file, bytes FROM segments")
        with contents.transaction() as transaction:
            for group in _groups(contents.segments, kept):
                number = contents.segments.write(transaction, [delta for _, delta in group])
                for row, (stored, _) in enumerate(group):
                    transaction.update("versions", stored.version, segment=number, row=row)
            for version in removed:
                transaction.delete("versions", version)
            for number, _, _ in before:
                transaction.delete("segments", number)
            event = transaction.event("compact", removed=len(removed), kept=len(kept))
            transaction.update("meta", "compacted", value=str(event))
        for _, file, _ in before:
            (contents.segments.folder / file).unlink(missing_ok=True)
        # What was asked for is done; a disk that is too full for this goes without
        with suppress(OSError), contents.database.translated():
            contents.database.writer().execute("VACUUM")
        after = contents.database.rows("SELECT id, bytes FROM segments")
        _remove_images(ledger)
    return Compacted(
        (len(before), len(after)), (sum(row[2] for row in before), sum(row[1] for row in after)), len(removed)
    )


def _kept(ledger: Ledger) -> tuple[list[Stored], list[int]]:
    """Versions that act now, did at a tag, or could act again; and the numbers of all others."""
    database = ledger.contents.database
    wanted: dict[int, None] = {}
    for moment in (None, *ledger.tags().values()):
        wanted |= dict.fromkeys(stored.version for _, stored in ledger.contents.acting(moment))
    # What was taken back can be made to act again: its newest version
    for (version,) in database.rows("SELECT max(id) FROM versions GROUP BY edit"):
        wanted[version] = None
    rows: Sequence[Any] = database.rows(
        f"SELECT {COLUMNS} FROM versions v JOIN edits e ON e.id = v.edit ORDER BY v.place, v.id"
    )
    every = [stored_of(row) for row in rows]
    kept = [stored for stored in every if stored.version in wanted]
    return kept, [stored.version for stored in every if stored.version not in wanted]


def _groups(segments: Segments, kept: Sequence[Stored]) -> Iterator[list[tuple[Stored, EditDelta]]]:
    """Deltas that go into a file together, each read once."""
    group: list[tuple[Stored, EditDelta]] = []
    size = 0
    for stored in kept:
        delta = segments.read(stored)
        count = sum(tensor.numel() * tensor.element_size() for tensor in delta.tensors.values())
        if group and (len(group) >= MOST_DELTAS or size + count > MOST_BYTES):
            yield group
            group, size = [], 0
        group.append((stored, delta))
        size += count
    if group:
        yield group


def _remove_images(ledger: Ledger) -> None:
    """Remove images that no record names."""
    contents = ledger.contents
    named = set(contents.image_names())
    if contents.images.folder.exists():
        for path in contents.images.folder.iterdir():
            if path.name not in named and path.is_file():
                path.unlink(missing_ok=True)
    contents.images.forget()
