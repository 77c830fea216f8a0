"""The ledger's deltas: safetensors files that are never changed, mapped and read when a delta is asked for."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

from torch import Tensor

from fastedit.deltas import EditDelta
from fastedit.deltas.storage import opened, save_deltas
from fastedit.ledger.database import DamagedLedger, Database, Transaction, sync_folder

#: Folder of the segments below that of the ledger.
SEGMENTS = "segments"
#: Files that are kept open.
MOST_OPEN = 64


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a version of an edit lies.

    Args:
        version, edit: numbers in the ledger. name: the request's id. segment, row: of the delta.
        delta: its checksum. fitted_on: the company that it counts as fitted in; None is as it was saved.
    """

    version: int
    edit: int
    name: str
    segment: int
    row: int
    delta: str
    fitted_on: tuple[str, ...] | None = None


#: What a query selects to make ``Stored`` of it.
COLUMNS = "v.id, v.edit, e.name, v.segment, v.row, v.delta, v.fitted_on"


def stored_of(row: Sequence[Any]) -> Stored:
    """The ``Stored`` of a row of ``COLUMNS``."""
    version, edit, name, segment, number, delta, fitted_on = row
    company = None if fitted_on is None else tuple(json.loads(fitted_on))
    return Stored(version, edit, name, segment, number, delta, company)


class Segments:
    """Files of deltas.

    Args:
        database: of the ledger, which says what they hold.
    """

    def __init__(self, database: Database) -> None:
        self.database, self.folder = database, database.folder / SEGMENTS
        self._open: OrderedDict[int, tuple[ExitStack, Any]] = OrderedDict()
        self._lock = threading.RLock()

    def path(self, number: int) -> Path:
        """The file of a segment."""
        return self.folder / segment_name(number)

    def write(self, transaction: Transaction, deltas: Sequence[EditDelta]) -> int:
        """Write deltas as a new segment; returns its number. It counts once the transaction is committed.

        Raises:
            OSError: the disk is full, or cannot be written.
        """
        number = 1 + (transaction.rows("SELECT max(id) FROM segments")[0][0] or 0)
        path = self.path(number)
        if not path.parent.exists():
            path.parent.mkdir(exist_ok=True)
            sync_folder(path.parent.parent)
        # A transaction that broke off may have had a file of this number, which was read meanwhile
        self._forget(number)
        save_deltas(deltas, path)
        sync_folder(path.parent)
        transaction.insert(
            "segments", id=number, file=path.name, sha256=file_checksum(path), bytes=path.stat().st_size,
            deltas=len(deltas),
        )  # fmt: skip
        return number

    def read(self, stored: Stored) -> EditDelta:
        """Read a delta, checked.

        Raises:
            DamagedLedger: it is not what was written, or its file is missing.
        """
        with self._lock:
            try:
                delta: EditDelta = self._file(stored.segment).read(stored.row)
            except (FileNotFoundError, ValueError) as error:
                stored = self._moved(stored) or stored
                delta = self._read_again(stored, error)
        if delta.id != stored.delta:
            raise DamagedLedger(
                f"ledger: {SEGMENTS}/{segment_name(stored.segment)} holds the delta of edit {stored.edit} (got another)"
            )
        return delta if stored.fitted_on is None else replace(delta, fitted_on=stored.fitted_on)

    def _read_again(self, stored: Stored, error: Exception) -> EditDelta:
        """Read it from the file as it is now. What reads tensors hides an interrupt in an error of its own."""
        self._forget(stored.segment)
        try:
            delta: EditDelta = self._file(stored.segment).read(stored.row)
        except (FileNotFoundError, ValueError) as again:
            raise DamagedLedger(f"ledger: {again} (edit {stored.edit})") from error
        return delta

    def _moved(self, stored: Stored) -> Stored | None:
        """Where the delta lies now, if the ledger was compacted since it was looked up."""
        row = self.database.row("versions", stored.version)
        if row is None or (row["segment"], row["row"]) == (stored.segment, stored.row):
            return None
        return replace(stored, segment=row["segment"], row=row["row"])

    def _forget(self, number: int) -> None:
        with self._lock:
            entered, _ = self._open.pop(number, (None, None))
            if entered is not None:
                entered.close()

    def _file(self, number: int) -> Any:
        if number not in self._open:
            with ExitStack() as entered:
                file = entered.enter_context(opened(self.path(number)))
                self._open[number] = entered.pop_all(), file
            while len(self._open) > MOST_OPEN:
                self._open.popitem(last=False)[1][0].close()
        self._open.move_to_end(number)
        return self._open[number][1]

    def problem(self, row: dict[str, Any]) -> str:
        """What is wrong with a segment's file; "" where nothing is."""
        name = f"{SEGMENTS}/{row['file']}"
        if row["file"] != segment_name(row["id"]):
            return f"{name}: is not the name of segment {row['id']}"
        try:
            found = file_checksum(self.folder / row["file"])
        except OSError as error:
            return f"{name}: cannot be read, {error.strerror}"
        return "" if found == row["sha256"] else f"{name}: is not what was written (its checksum differs)"

    def remove_unknown(self) -> list[str]:
        """Remove files that no committed segment has, which killed writers left; only for who writes."""
        known = {file for (file,) in self.database.rows("SELECT file FROM segments")}
        unknown = [path for path in self.folder.glob("*") if path.name not in known and path.is_file()]
        for path in unknown:
            path.unlink(missing_ok=True)
        return [path.name for path in unknown]

    def close(self) -> None:
        """Close the files; they are opened again when something is read."""
        with self._lock:
            # None that is closed stays in the table, whatever comes between
            while self._open:
                self._open.popitem()[1][0].close()


class LedgerDeltas(Sequence[EditDelta]):
    """Deltas of a ledger in order, read when asked for.

    Args:
        segments: that hold them. listed: where each lies.
        changed: by position what a method has changed of a delta since it was fitted: its id now, and those tensors.
    """

    #: Memory does not grow with them: what stacks them keeps what decides and reads the rest when it acts.
    is_mapped = True

    def __init__(
        self,
        segments: Segments,
        listed: Sequence[Stored],
        changed: Mapping[int, tuple[str, Mapping[str, Tensor]]] | None = None,
    ) -> None:
        self._segments, self._listed, self._changed = segments, list(listed), dict(changed or {})

    def __repr__(self) -> str:
        return f"<LedgerDeltas: {len(self)} deltas in {self._segments.database.folder}>"

    @property
    def request_ids(self) -> list[str]:
        """Whose they are, without reading them."""
        return [stored.name for stored in self._listed]

    @property
    def edit_ids(self) -> list[int]:
        """Numbers of the edits in the ledger."""
        return [stored.edit for stored in self._listed]

    @property
    def ids(self) -> list[str]:
        """``EditDelta.id`` of each, without reading them."""
        found = [stored.delta for stored in self._listed]
        for number, (each, _) in self._changed.items():
            found[number] = each
        return found

    def __len__(self) -> int:
        return len(self._listed)

    def __iter__(self) -> Iterator[EditDelta]:
        for number in range(len(self)):
            yield self._read(number)

    @overload
    def __getitem__(self, index: int) -> EditDelta: ...
    @overload
    def __getitem__(self, index: slice) -> LedgerDeltas: ...
    def __getitem__(self, index: int | slice) -> EditDelta | LedgerDeltas:
        """Read one delta; or the sequence of a slice, without reading any."""
        if isinstance(index, slice):
            chosen = range(len(self))[index]
            changed = {new: self._changed[old] for new, old in enumerate(chosen) if old in self._changed}
            return LedgerDeltas(self._segments, self._listed[index], changed)
        return self._read(range(len(self))[index])

    def _read(self, number: int) -> EditDelta:
        delta = self._segments.read(self._listed[number])
        if number not in self._changed:
            return delta
        return replace(delta, tensors={**delta.tensors, **self._changed[number][1]})


def segment_name(number: int) -> str:
    """File name of a segment."""
    return f"{number:08d}.safetensors"


def file_checksum(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
