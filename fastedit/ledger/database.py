"""The ledger's SQLite file: its tables, transactions that are there whole or not at all, rows with checksums.

WAL mode with ``synchronous=FULL``: a commit is on the disk when it returns, and readers see the state of one moment
while another process writes. Every row carries the SHA-256 of its values. Each event's row is chained to the one before
it, and the newest is also written to a file of its own, so that rows that are lost with a damaged WAL file are missed.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from weakref import WeakSet

from fastedit.ledger.connections import (
    Connection,
    DamagedLedger,
    LedgerError,
    Reader,
    open_writer,
    translated,
)
from fastedit.ledger.schema import (
    CHECK,
    COMMIT_BYTES,
    COMMITS,
    FILE,
    FORMAT,
    INDEXES,
    NAMES,
    TABLES,
    as_text,
    commit_line,
    event_chain,
    row_checksum,
    utc_now,
)

__all__ = ["COMMIT_BYTES", "DamagedLedger", "Database", "LedgerError", "Transaction", "sync_folder"]


class Database:
    """Connections to a ledger's database, one for reading in each thread, one for writing.

    Args:
        folder: of the ledger; its database is there.
    Raises:
        DamagedLedger: it is no database, or not a ledger's.
        LedgerError: a ledger of another format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / FILE
        self._of_thread = threading.local()
        # Those of threads that have ended go with them
        self._opened: WeakSet[Reader] = WeakSet()
        self._lock = threading.Lock()
        self._writer: Connection | None = None
        self._current: Transaction | None = None
        #: A child that was forked uses no connection of its parent, and does not close any.
        self._inherited: list[Connection | Reader] = []
        with self.translated():
            found = self.one("SELECT value FROM meta WHERE name = 'format'")
        if found is None or found[0] != FORMAT:
            got = None if found is None else found[0]
            raise LedgerError(f"ledger: format is {FORMAT!r} (got format={got!r:.80} in file={str(self.path)!r})")

    @staticmethod
    def create(folder: Path, meta: Mapping[str, str]) -> None:
        """Make the database, whole or not at all.

        Raises:
            LedgerError: the file system cannot lock files or share memory, as WAL mode needs.
            OSError: it cannot be written.
        """
        path = folder / f"{FILE}.new"
        _remove(path)
        with translated(folder), _removed_if_broken(path):
            connection = open_writer(path)
            try:
                mode = connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
                if mode != "wal":
                    raise LedgerError(
                        "ledger: the folder lies on a local disk, whose files can be locked and mapped by several "
                        f"processes (got journal_mode={mode!r} in folder={str(folder)!r})"
                    )
                connection.execute("BEGIN IMMEDIATE")
                for table, columns in TABLES.items():
                    connection.execute(f"CREATE TABLE {table} ({', '.join(columns)}, {CHECK} TEXT NOT NULL) STRICT")
                for index in INDEXES:
                    connection.execute(index)
                for name, value in {"format": FORMAT, **meta}.items():
                    _insert(connection, "meta", {"name": name, "value": value})
                connection.execute("COMMIT")
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            finally:
                connection.close()
            path.replace(folder / FILE)
        sync_folder(folder)

    # Reading

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """All rows of a query, as of one moment."""
        with self.translated():
            return self._reader().execute(query, values).fetchall()

    def one(self, query: str, values: Sequence[Any] = ()) -> tuple[Any, ...] | None:
        """The first row of a query, or None."""
        with self.translated():
            row: tuple[Any, ...] | None = self._reader().execute(query, values).fetchone()
        return row

    def checked_rows(self, table: str, where: str = "", values: Sequence[Any] = ()) -> Iterator[dict[str, Any]]:
        """Rows of a table, each checked against its checksum.

        Raises:
            DamagedLedger: a row is not what was written; names table and key.
        """
        names = NAMES[table]
        columns = ", ".join([*names, CHECK])
        for row in self.rows(f"SELECT {columns} FROM {table} {where}", values):
            if row_checksum(table, row[:-1]) != row[-1]:
                raise DamagedLedger(
                    f"ledger: rows are what was written (the checksum differs of {table} {row[0]!r} in "
                    f"file={str(self.path)!r})"
                )
            yield dict(zip(names, row, strict=False))

    def row(self, table: str, key: Any) -> dict[str, Any] | None:
        """The row with a key, checked; None where there is none."""
        return next(self.checked_rows(table, f"WHERE {NAMES[table][0]} = ?", (key,)), None)

    def _reader(self) -> sqlite3.Connection:
        reader: Reader | None = getattr(self._of_thread, "reader", None)
        if reader is None or reader.process != os.getpid():
            if reader is not None:
                self._inherited.append(reader)
            reader = Reader(self.path)
            self._of_thread.reader = reader
            with self._lock:
                self._opened.add(reader)
        return reader.connection

    # Writing

    def writer(self) -> sqlite3.Connection:
        """The connection that writes; only for who holds the writer's lock."""
        if self._writer is None or self._writer.process != os.getpid():
            if self._writer is not None:
                self._inherited.append(self._writer)
            self._writer = open_writer(self.path)
        return self._writer

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """What is written inside the block is there whole when it ends well, and not at all else.

        Raises:
            OSError: the disk is full or cannot be written.
        """
        with self.translated():
            connection = self.writer()
            transaction = Transaction(connection, self.folder)
            try:
                self._current = transaction
                if connection.in_transaction:
                    # An interrupt came before the block could begin
                    connection.execute("ROLLBACK")
                connection.execute("BEGIN IMMEDIATE")
                yield transaction
                connection.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    if self._current is transaction and connection.in_transaction:
                        connection.execute("ROLLBACK")
                raise
            transaction.note_commit()

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Inside the block errors of SQLite are ours."""
        with translated(self.folder):
            yield

    def close(self) -> None:
        """Close every connection; what is in the WAL file goes to the database where nobody else reads."""
        with self._lock:
            # First no one finds them any more
            self._of_thread = threading.local()
            opened, self._opened = list(self._opened), WeakSet()
        writer, self._writer = self._writer, None
        self._inherited += [each for each in (*opened, writer) if each is not None and each.process != os.getpid()]
        # Readers first: who can write takes the WAL file away with the last connection
        for reader in opened:
            reader.close()
        if writer is not None and writer.process == os.getpid():
            with suppress(sqlite3.Error):
                writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            writer.close()


class Transaction:
    """Writes rows with their checksums, and events with their chain."""

    def __init__(self, connection: sqlite3.Connection, folder: Path) -> None:
        self._connection, self._folder = connection, folder
        self._last: tuple[int, str] | None = None

    def insert(self, table: str, **values: Any) -> int:
        """Insert a row; returns its number."""
        return _insert(self._connection, table, values)

    def update(self, table: str, key: Any, **values: Any) -> None:
        """Change a row."""
        names = NAMES[table]
        found = self._connection.execute(
            f"SELECT {', '.join(names)} FROM {table} WHERE {names[0]} = ?", (key,)
        ).fetchone()
        if found is None:
            raise LedgerError(f"ledger: {table} has row {key!r} (got none)")
        changed = {**dict(zip(names, found, strict=True)), **values}
        columns = [*values, CHECK]
        new = [*values.values(), row_checksum(table, [changed[name] for name in names])]
        settings = ", ".join(f"{column} = ?" for column in columns)
        self._connection.execute(f"UPDATE {table} SET {settings} WHERE {names[0]} = ?", (*new, key))

    def delete(self, table: str, key: Any) -> None:
        """Remove a row."""
        self._connection.execute(f"DELETE FROM {table} WHERE {NAMES[table][0]} = ?", (key,))

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """All rows of a query, as this transaction sees them."""
        return self._connection.execute(query, values).fetchall()

    def event(self, action: str, **detail: Any) -> int:
        """Add to the history; returns the event's number."""
        found = self._connection.execute("SELECT id, chain FROM events ORDER BY id DESC LIMIT 1").fetchone()
        number, before = (1, "") if found is None else (found[0] + 1, found[1])
        values = {"id": number, "time": utc_now(), "action": action, "detail": as_text(detail)}
        chain = event_chain(before, values)
        self.insert("events", **values, chain=chain)
        self._last = (number, chain)
        return number

    def note_commit(self) -> None:
        """Say in a file of its own which event is the newest, once it is committed."""
        if self._last is None:
            return
        # Where there is no room for it the commit stands all the same: the database is allowed to be ahead
        with suppress(OSError), (self._folder / COMMITS).open("ab") as file:
            if file.tell() % COMMIT_BYTES:
                file.truncate(file.tell() - file.tell() % COMMIT_BYTES)
                file.seek(0, os.SEEK_END)
            file.write(commit_line(*self._last))
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def _removed_if_broken(path: Path) -> Iterator[None]:
    """A database that cannot be finished takes no room on a disk that is full."""
    try:
        yield
    except BaseException:
        _remove(path)
        raise


def _remove(path: Path) -> None:
    for ending in ("", "-wal", "-shm"):
        path.with_name(path.name + ending).unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Put the names of new files on the disk, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _insert(connection: sqlite3.Connection, table: str, values: Mapping[str, Any]) -> int:
    names = NAMES[table]
    given = dict(values)
    if names[0] not in given:
        # Known before it is written: the checksum is of all values
        newest = connection.execute(f"SELECT max({names[0]}) FROM {table}").fetchone()[0]
        given[names[0]] = 1 + (newest or 0)
    row = [given.get(name) for name in names]
    marks = ", ".join("?" * (len(names) + 1))
    connection.execute(
        f"INSERT INTO {table} ({', '.join(names)}, {CHECK}) VALUES ({marks})", (*row, row_checksum(table, row))
    )
    key = row[0]
    return key if isinstance(key, int) else 0
