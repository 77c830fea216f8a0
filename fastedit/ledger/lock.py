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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

from fastedit.ledger.database import LedgerError

LOCK = "writer.lock"
#: Seconds between two signs of life, and after which a writer that has given none is believed dead.
BEAT_S, STALE_S = 1.0, 15.0


class LedgerTaken(LedgerError):
    """Another process writes."""


class WriterLock:
    """The lock of this thread, as long as its file is open; a file object, so that it goes when nothing refers to it.

    Args:
        file: locked. path: under which others look for it.
        was_left: whether the writer before was killed, or left files half written for another reason.
    """

    def __init__(self, file: FileIO, path: Path, was_left: bool) -> None:
        self.file, self.path, self.was_left = file, path, was_left
        #: Whether nothing is half written; else the next writer is told.
        self.is_clean = True
        self._owner = (os.getpid(), threading.get_ident())
        self._guard, self._ended = threading.Lock(), threading.Event()

    @property
    def is_held(self) -> bool:
        """Whether this thread of this process has it: no other one has, nor a forked child."""
        return not self.file.closed and self._owner == (os.getpid(), threading.get_ident())

    def check(self) -> None:
        """Refuse to go on where it was taken over all the same.

        Raises:
            LedgerError: it is not held, or another process has it.
        """
        held = self.is_held and self.path.exists()
        if not held or not os.path.samestat(self.path.stat(), os.fstat(self.file.fileno())):
            raise LedgerError(
                f"ledger: the writer's lock stays with its owner (it was taken over in {str(self.path.parent)!r})"
            )

    def beat(self) -> None:
        """Give signs of life until it ends."""
        while not self._ended.wait(BEAT_S):
            # The descriptor is that of this file meanwhile
            with self._guard:
                if self._ended.is_set() or self.file.closed:
                    return
                with suppress(OSError):
                    os.utime(self.file.fileno())

    def release(self) -> None:
        """Let others write; whatever interrupts this, they can."""
        try:
            self._ended.set()
            if not self.file.closed and self._owner[0] == os.getpid() and self._guard.acquire(timeout=BEAT_S):
                with suppress(OSError):
                    if self.is_clean:
                        os.ftruncate(self.file.fileno(), 0)
        finally:
            self.file.close()


@contextmanager
def writing(folder: Path) -> Iterator[WriterLock]:
    """Inside the block this thread writes the ledger and no other does.

    The lock is one of the operating system, which ends with the process however that dies. A child that it left behind
    may hold the lock on: where the owner is dead and has given no sign of life for ``STALE_S`` seconds, it is
    taken over.

    Yields:
        The lock; its ``check`` is called before every commit.
    Raises:
        LedgerError: another process writes, naming it; or the file system cannot lock.
        OSError: the folder cannot be written to.
    """
    lock = WriterLock(*_locked(folder))
    try:
        threading.Thread(target=lock.beat, name="fastedit-ledger-lock", daemon=True).start()
        yield lock
    finally:
        # Twice: an interrupt may come before the first one begins
        try:
            lock.release()
        finally:
            lock.release()


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


def _locked(folder: Path) -> tuple[FileIO, Path, bool]:
    """The lock file, locked and signed; its path; and whether it still had a name in it."""
    path, taken_over = folder / LOCK, False
    while True:
        # What fails or is interrupted on the way leaves no lock behind
        file = open(path, "r+b", buffering=0, opener=_opened)  # noqa: SIM115
        try:
            left = os.fstat(file.fileno()).st_size > 0
            taken = _is_taken(file, path)
            if taken:
                return file, path, left or taken_over
            taken_over = taken is None or taken_over
        except BaseException:
            file.close()
            raise
        file.close()


def _opened(path: str, _flags: int) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _is_taken(file: FileIO, path: Path) -> bool | None:
    """Lock and sign the file; False where it is not the lock any more, None where a dead writer's was taken over."""
    import fcntl

    descriptor = file.fileno()
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = _owner(descriptor)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise LedgerError(
                "ledger: the folder lies on a local disk, whose files can be locked (got "
                f"{error.strerror!r} in folder={str(path.parent)!r})"
            ) from error
        if owner is None or not _is_dead(owner):
            raise LedgerTaken(
                f"ledger: one process writes at a time; {_told(owner)} (got folder={str(path.parent)!r})"
            ) from None
        # Who holds the file now is a child of a dead writer: the name goes to a file of our own
        fresh = path.with_name(f"{LOCK}.{secrets.token_hex(4)}")
        fresh.touch()
        fresh.replace(path)
        return None
    # Another one may have replaced the file between opening and locking
    if not path.exists() or not os.path.samestat(path.stat(), os.fstat(descriptor)):
        return False
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "start": started, "born": _born(os.getpid())})
    # At no moment nameless: who is killed here has not removed yet what the writer before left
    os.pwrite(descriptor, text.encode(), 0)
    os.ftruncate(descriptor, len(text.encode()))
    return True


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
