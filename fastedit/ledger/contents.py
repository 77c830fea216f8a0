"""What a ledger holds, read and written by every one of its operations."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakSet

from fastedit.deltas import EditDelta
from fastedit.engine.run import LOSSES, plain
from fastedit.evaluation import EditScores
from fastedit.files import clear_partial, replacing
from fastedit.fitting.solver import FitOutcome
from fastedit.ledger.database import DamagedLedger, Database, LedgerError, Transaction, sync_folder
from fastedit.ledger.lock import WriterLock, writing
from fastedit.ledger.records import ImageStore, from_record, image_names
from fastedit.ledger.schema import ARTIFACTS, COMMIT_BYTES, COMMITS, FILE, SEAL, as_text
from fastedit.ledger.segments import COLUMNS, Segments, Stored, file_checksum, stored_of
from fastedit.requests import EditRequest

#: Edits that act now; in SQL, of versions ``v``.
NOW = "v.until IS NULL"
# Values in one SQL statement
_MOST_VALUES = 500


class Follower(Protocol):
    """Looks at the ledger when it has changed."""

    def follow(self) -> None:
        """Something was committed."""


class Contents:
    """A ledger's database, segments and images.

    Args:
        folder: of the ledger.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.database = Database(folder)
        self.segments = Segments(self.database)
        self.images = ImageStore(folder)
        #: What this object writes with, and whether it ever did.
        self._writer: WriterLock | None = None
        self._wrote = False
        #: What serves edits of this object, and is told of every commit.
        self.followers: WeakSet[Follower] = WeakSet()
        self.check_commits()

    # Writing

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Inside the block this process writes and no other does; what a killed writer left is removed first.

        Raises:
            LedgerError: another process writes. DamagedLedger: commits are missing.
        """
        if self._writes():
            yield
            return
        with writing(self.folder) as lock:
            lock.is_clean = False
            self.check_commits()
            if (self.folder / SEAL).exists():
                (self.folder / SEAL).unlink()
                # On the disk before what it would contradict
                sync_folder(self.folder)
            if lock.was_left:
                self._clear()
            self.images.forget()
            self._writer, self._wrote = lock, True
            try:
                yield
            except BaseException:
                # At once: a disk that is full has room again. Where this fails too, the next writer does it
                with suppress(LedgerError, OSError):
                    lock.check()
                    self._clear()
                    lock.is_clean = True
                raise
            lock.is_clean = True

    def _writes(self) -> bool:
        """Whether this thread has the writer's lock."""
        return self._writer is not None and self._writer.is_held

    def _clear(self) -> None:
        """Remove what was written and never committed."""
        for folder in (self.folder, self.images.folder, self.folder / ARTIFACTS):
            clear_partial(folder)
        self.segments.remove_unknown()

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """What is written inside the block is there whole or not at all; only inside of ``writing``."""
        lock = self._writer
        if lock is None or not lock.is_held:
            raise LedgerError("ledger: who writes has its lock (got none)")
        with self.database.transaction() as transaction:
            lock.check()
            yield transaction
            # Before a commit names them
            self.images.sync()
        for follower in list(self.followers):
            follower.follow()

    def check_commits(self) -> None:
        """Refuse a database that lacks the newest commit.

        Raises:
            DamagedLedger: the database, or its WAL file, has lost commits.
        """
        path = self.folder / COMMITS
        try:
            with path.open("rb") as file:
                whole = file.seek(0, 2) // COMMIT_BYTES
                if not whole:
                    return
                file.seek((whole - 1) * COMMIT_BYTES)
                line = file.read(COMMIT_BYTES).decode("ascii", "replace")
        except FileNotFoundError:
            return
        number, _, chain = line.strip().partition(" ")
        row = self.database.row("events", int(number)) if number.isdigit() else None
        if row is None or row["chain"] != chain:
            raise DamagedLedger(
                f"ledger: {FILE} and {FILE}-wal hold every commit (got none for event {number!r:.20} of {COMMITS} in "
                f"folder={str(self.folder)!r}); verify() says more"
            )

    # What there is

    def meta(self, name: str) -> str:
        """A value of the ledger itself."""
        row = self.database.row("meta", name)
        if row is None:
            raise DamagedLedger(f"ledger: {FILE} says its {name!r} (got none)")
        return str(row["value"])

    def newest_event(self) -> int:
        """Number of the last event; 0 before the first."""
        found = self.database.one("SELECT max(id) FROM events")
        return int(found[0] or 0) if found else 0

    def acting(self, event: int | None = None) -> list[tuple[int, Stored]]:
        """What acts now, or did after an event, in order, each with its place."""
        where, values = (
            (NOW, ()) if event is None else ("v.since <= ? AND (v.until IS NULL OR v.until > ?)", (event, event))
        )
        rows = self.database.rows(
            f"SELECT v.place, {COLUMNS} FROM versions v JOIN edits e ON e.id = v.edit WHERE {where} ORDER BY v.place",
            values,
        )
        return [(row[0], stored_of(row[1:])) for row in rows]

    def run_of(self, edit: int) -> dict[str, Any]:
        """The run that asked for an edit: its row, with settings, spec and provenance read."""
        row = self.edit(edit)
        return self.run(row["run"])

    def run(self, number: int) -> dict[str, Any]:
        """A run's row, with settings, spec and provenance read."""
        row = self.database.row("runs", number)
        if row is None:
            raise DamagedLedger(f"ledger: {FILE} has run {number} (got none)")
        return {**row, **{name: json.loads(row[name]) for name in ("settings", "spec", "provenance")}}

    def newest_run(self) -> dict[str, Any] | None:
        """The run of an edit that acts now; None where none does."""
        found = self.database.one(
            f"SELECT e.run FROM versions v JOIN edits e ON e.id = v.edit WHERE {NOW} ORDER BY v.place DESC LIMIT 1"
        )
        return None if found is None else self.run(found[0])

    def edit(self, number: int) -> dict[str, Any]:
        """An edit's row.

        Raises:
            LedgerError: there is none of this number.
        """
        row = self.database.row("edits", number)
        if row is None:
            last = self.database.one("SELECT max(id) FROM edits")
            raise LedgerError(f"ledger: edits are numbered 1 to {last[0] or 0 if last else 0} (got {number})")
        return row

    def request(self, number: int) -> EditRequest:
        """The request of an edit, its images as paths in the ledger."""
        return from_record(json.loads(self.edit(number)["request"]), self.images)

    def requests(self, numbers: Sequence[int]) -> list[EditRequest]:
        """Requests of edits, in order."""
        rows = {row["id"]: row for row in self._where("edits", "id", numbers)}
        return [from_record(json.loads(rows[number]["request"]), self.images) for number in numbers]

    def image_names(self) -> list[str]:
        """Names of all the images that records name, each once."""
        named: dict[str, None] = {}
        for row in self.database.checked_rows("edits"):
            named |= dict.fromkeys(image_names(json.loads(row["request"])))
        return list(named)

    def keep(
        self, transaction: Transaction, delta: EditDelta, outcome: FitOutcome, *, edit: int, event: int, place: int
    ) -> Stored:
        """Write the delta of an edit as a segment of its own, which acts from an event on."""
        segment = self.segments.write(transaction, [delta])
        version = transaction.insert(
            "versions", edit=edit, since=event, until=None, place=place, segment=segment, row=0, delta=delta.id,
            fitted_on=None, outcome=as_text(plain(asdict(outcome))),
        )  # fmt: skip
        return Stored(version, edit, delta.request_id, segment, 0, delta.id)

    def outcomes(self, versions: Iterable[int]) -> dict[int, FitOutcome]:
        """How the fits of versions ended."""
        return {row["id"]: outcome_of(row["outcome"]) for row in self._where("versions", "id", list(versions))}

    def standing(self, questions: Iterable[str]) -> dict[str, tuple[str, int]]:
        """Question -> target and number of the edit that answers it now."""
        found: dict[str, tuple[int, str, int]] = {}
        listed = list(dict.fromkeys(questions))
        for start in range(0, len(listed), _MOST_VALUES):
            part = listed[start : start + _MOST_VALUES]
            marks = ", ".join("?" * len(part))
            for question, target, edit, place in self.database.rows(
                f"SELECT e.question, e.target, e.id, v.place FROM edits e JOIN versions v ON v.edit = e.id WHERE {NOW} "
                f"AND e.question IN ({marks})",
                part,
            ):
                if question not in found or place > found[question][0]:
                    found[question] = (place, target, edit)
        return {question: (target, edit) for question, (_, target, edit) in found.items()}

    def resolve(self, ids: int | str | Sequence[int | str]) -> list[int]:
        """Numbers of edits, which are named by number or by the id of their request.

        Raises:
            LedgerError: none of that name, or several.
        """
        listed = [ids] if isinstance(ids, (int, str)) else list(ids)
        found: list[int] = []
        for each in listed:
            if isinstance(each, bool) or not isinstance(each, (int, str)):
                raise LedgerError(f"ledger: ids are numbers of edits, or names of requests (got {each!r:.80})")
            if isinstance(each, int):
                self.edit(each)
                found.append(each)
                continue
            named = [row[0] for row in self.database.rows("SELECT id FROM edits WHERE name = ?", (each,))]
            if len(named) != 1:
                raise LedgerError(
                    f"ledger: a name is that of one edit; give its number else (got {each!r:.80} of {named})"
                )
            found += named
        return list(dict.fromkeys(found))

    def _where(self, table: str, column: str, values: Sequence[Any]) -> Iterator[dict[str, Any]]:
        for start in range(0, len(values), _MOST_VALUES):
            part = values[start : start + _MOST_VALUES]
            yield from self.database.checked_rows(table, f"WHERE {column} IN ({', '.join('?' * len(part))})", part)

    def close(self) -> None:
        """Close every file; write down the database's checksum where nobody else uses it and it has changed."""
        self.segments.close()
        self.database.close()
        self._seal()

    def _seal(self) -> None:
        seal, wal = self.folder / SEAL, self.folder / f"{FILE}-wal"
        # Who only read keeps nobody from writing
        if not self._wrote or seal.exists():
            return
        with suppress(LedgerError, OSError), writing(self.folder) as lock:
            lock.is_clean = not lock.was_left
            if not (wal.exists() and wal.stat().st_size):
                with replacing(seal) as file:
                    file.write(f"{file_checksum(self.folder / FILE)}\n".encode())


def outcome_of(text: str) -> FitOutcome:
    """A stored outcome."""
    content = json.loads(text)
    return FitOutcome(content["status"], content["steps"], *(_number(content.get(name)) for name in LOSSES))


def scores_of(text: str) -> EditScores:
    """Stored scores."""
    content: Mapping[str, Any] = json.loads(text)
    kinds = {name: {key: _number(value) for key, value in content[name].items()} for name in ("legacy", "strict")}
    return EditScores(kinds["legacy"], kinds["strict"], content["answers"])


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
