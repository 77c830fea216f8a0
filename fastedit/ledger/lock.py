"""One writer at a time: a locked file with its owner's name and a sign of life. A dead writer's lock is taken over."""

from __future__ import annotations

import datetime
import errno
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastedit.ledger.database import LedgerError

LOCK = "writer.lock"
#: Seconds between two signs of life, and after which a writer that has given none is believed dead.
BEAT_S, STALE_S = 1.0, 15.0


@dataclass(frozen=True)
class WriterLock:
    """A lock that is held.

    Args:
        check: refuses to go on where it was taken over all the same; called before every commit.
        was_left: whether the writer before was killed, and may have left files half written.
    """

    check: Callable[[], None]
    was_left: bool


@contextmanager
def writing(folder: Path) -> Iterator[WriterLock]:
    """Inside the block this process writes the ledger and no other does.

    The lock is one of the operating system, which ends with the process however that dies. A child that it left behind
    may hold the lock on: where the owner is dead and has given no sign of life for ``STALE_S`` seconds, it is
    taken over.

    Yields:
        WriterLock.
    Raises:
        LedgerError: another process writes, naming it; or the file system cannot lock.
        OSError: the folder cannot be written to.
    """
    descriptor, left = _locked(folder)
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(descriptor, ended), name="fastedit-ledger-lock", daemon=True)
    beating.start()

    def check() -> None:
        path = folder / LOCK
        if not path.exists() or not os.path.samestat(path.stat(), os.fstat(descriptor)):
            raise LedgerError(f"ledger: the writer's lock stays with its owner (it was taken over in {str(folder)!r})")

    try:
        yield WriterLock(check, left)
    finally:
        ended.set()
        beating.join()
        with suppress(OSError):
            os.ftruncate(descriptor, 0)
        os.close(descriptor)


def owner_of(folder: Path) -> dict[str, Any] | None:
    """Who writes the ledger now: pid, host, start and seconds since the last sign of life; None where nobody does."""
    path = folder / LOCK
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        return _owner(descriptor)
    finally:
        os.close(descriptor)


def _locked(folder: Path) -> tuple[int, bool]:
    import fcntl

    path, taken_over = folder / LOCK, False
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = _owner(descriptor)
            os.close(descriptor)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise LedgerError(
                    "ledger: the folder lies on a local disk, whose files can be locked (got "
                    f"{error.strerror!r} in folder={str(folder)!r})"
                ) from error
            if owner is None or not _is_dead(owner):
                raise LedgerError(
                    f"ledger: one process writes at a time; {_told(owner)} (got folder={str(folder)!r})"
                ) from None
            # Who holds the file now is a child of a dead writer: the name goes to a file of our own
            fresh = path.with_name(f"{LOCK}.{secrets.token_hex(4)}")
            fresh.touch()
            fresh.replace(path)
            taken_over = True
            continue
        # Another one may have replaced the file between opening and locking
        if path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor)):
            started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            text = json.dumps(
                {"pid": os.getpid(), "host": socket.gethostname(), "start": started, "born": _born(os.getpid())}
            )
            left = os.fstat(descriptor).st_size > 0
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, text.encode(), 0)
            return descriptor, left or taken_over
        os.close(descriptor)


def _beat(descriptor: int, ended: threading.Event) -> None:
    process = os.getpid()
    while not ended.wait(BEAT_S):
        if os.getpid() != process:
            return
        with suppress(OSError):
            os.utime(descriptor)


def _owner(descriptor: int) -> dict[str, Any] | None:
    try:
        owner = json.loads(os.pread(descriptor, 1000, 0))
        return {
            "pid": int(owner["pid"]), "host": str(owner["host"]), "start": str(owner["start"]),
            "born": str(owner.get("born", "")),
            "silent_s": max(0.0, time.time() - os.fstat(descriptor).st_mtime),
        }  # fmt: skip
    except (ValueError, KeyError, TypeError, OSError):
        return None


def _is_dead(owner: dict[str, Any]) -> bool:
    if owner["host"] != socket.gethostname() or owner["silent_s"] < STALE_S:
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    # A pid that was given to another process since. One that is only stopped may go on at any time
    return bool(owner["born"]) and _born(owner["pid"]) not in ("", owner["born"])


def _born(pid: int) -> str:
    """When a process began, in the system's ticks; "" where that is not to be had."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _told(owner: dict[str, Any] | None) -> str:
    if owner is None:
        return "another process writes"
    return (
        f"process {owner['pid']} on {owner['host']} has been writing since {owner['start']}, its last sign of life was "
        f"{owner['silent_s']:.0f} s ago"
    )
