"""Connections to the ledger's SQLite file, each of one process, and their errors in our words."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastedit.ledger.schema import FILE

#: Seconds that a statement waits for another one to end.
PATIENCE_S = 30.0


class LedgerError(ValueError):
    """The ledger cannot do what was asked; it is as it was."""


class DamagedLedger(LedgerError):
    """A file of the ledger is not what was written."""


class Connection(sqlite3.Connection):
    """A connection that knows which process opened it."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.process = os.getpid()


class Reader:
    """A thread's connection for reading, closed when the thread has ended.

    Args:
        path: of the database.
    """

    def __init__(self, path: Path) -> None:
        self.connection = open_reader(path)
        self.process = self.connection.process

    def close(self) -> None:
        """Close it, if it is this process's."""
        if self.process == os.getpid():
            with suppress(sqlite3.Error):
                self.connection.close()

    def __del__(self) -> None:
        if hasattr(self, "process"):
            self.close()


def _connect(path: str | Path, **options: Any) -> Connection:
    return sqlite3.connect(
        path, timeout=PATIENCE_S, isolation_level=None, check_same_thread=False, factory=Connection, **options
    )


def open_writer(path: Path) -> Connection:
    """A connection whose commits are on the disk when they return."""
    connection = _connect(path)
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=OFF")
    connection.execute("PRAGMA trusted_schema=OFF")
    connection.execute("PRAGMA cell_size_check=ON")
    return connection


def open_reader(path: Path) -> Connection:
    """A connection that cannot write; of a folder that nobody can write to, as the file stands."""
    quoted = path.absolute().as_uri()
    for options in ("mode=ro", "mode=ro&immutable=1"):
        connection = _connect(f"{quoted}?{options}", uri=True)
        try:
            connection.execute("PRAGMA trusted_schema=OFF")
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.OperationalError:
            connection.close()
            if options != "mode=ro" or os.access(path.parent, os.W_OK):
                raise
            continue
        return connection
    raise AssertionError


_FULL = ("full", "no space")


@contextmanager
def translated(folder: Path) -> Iterator[None]:
    """Inside the block errors of SQLite are ours.

    Raises:
        OSError: the disk is full, or cannot be read or written. LedgerError: another process holds the database.
        DamagedLedger: it is not what was written.
    """
    try:
        yield
    except sqlite3.OperationalError as error:
        name = getattr(error, "sqlite_errorname", "") or ""
        text = f"{error}"
        if name in ("SQLITE_FULL",) or any(word in text.lower() for word in _FULL):
            raise OSError(errno.ENOSPC, "ledger: the disk is full; what was committed is there", str(folder)) from error
        if name.startswith(("SQLITE_IOERR", "SQLITE_CANTOPEN", "SQLITE_READONLY")):
            raise OSError(errno.EIO, f"ledger: the database cannot be read or written, {text}", str(folder)) from error
        if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_PROTOCOL")):
            raise LedgerError(
                f"ledger: the database could not be locked within {PATIENCE_S:.0f} s; another process holds it, or "
                f"the folder does not lie on a local disk (got {text!r} in folder={str(folder)!r})"
            ) from error
        raise DamagedLedger(
            f"ledger: {FILE} holds a ledger's tables (got {text!r} in folder={str(folder)!r})"
        ) from error
    except sqlite3.ProgrammingError as error:
        raise LedgerError(
            f"ledger: it stays open while it is in use (got {error} in folder={str(folder)!r})"
        ) from error
    except sqlite3.DatabaseError as error:
        raise DamagedLedger(f"ledger: {FILE} is a whole database (got {error} in folder={str(folder)!r})") from error
