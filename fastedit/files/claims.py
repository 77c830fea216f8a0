"""Who writes a file or folder: one process at a time; a claim ends with its owner, also where that is killed.

A claim is a lock on a file that lies beside what is claimed and goes with the claim. It is also the first thing that is
written: where it cannot be, nothing else can.
"""

from __future__ import annotations

import datetime
import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from fastedit.files.atomic import clear_partial

#: Name of the lock file in a folder that is claimed.
LOCK = ".fastedit.lock"
_HELD: ContextVar[frozenset[tuple[int, str]]] = ContextVar("_HELD", default=frozenset())
# What file systems without locks say
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextmanager
def claim_folder(folder: str | Path, owner: str) -> Iterator[Path]:
    """Inside the block nobody else claims the folder. It is made where it is absent, and goes if it stays empty.

    What writers that were killed left half written there is removed.

    Raises:
        ValueError: another process or thread has claimed it, or it cannot be made or written to; names it.
    """
    path = _usable(folder, owner, "folder")
    with _made(path, owner), _claim(path / LOCK, owner, f"folder={str(folder)!r}"):
        clear_partial(path)
        yield path


@contextmanager
def claim_file(file: str | Path, owner: str) -> Iterator[Path]:
    """The same for a file, whether it is there or not; its folder may be used by others."""
    path = _usable(file, owner, "file")
    lock = path.with_name(f".{path.name}.lock")
    with _made(path.parent, owner), _claim(lock, owner, f"file={str(file)!r}"):
        clear_partial(path.parent, path.name)
        yield path


def _usable(given: str | Path, owner: str, kind: str) -> Path:
    """The path, if it is one of this kind or of nothing yet, and nothing but folders lies above it."""
    text = os.fspath(given)
    if not text or "\0" in text:
        raise ValueError(f"{owner}: {kind} is a path (got {kind}={text!r})")
    path = Path(text)
    try:
        if path.exists() and path.is_dir() != (kind == "folder"):
            other = {"folder": "file", "file": "folder"}[kind]
            raise ValueError(f"{owner}: the {kind} is no {other} (got {kind}={text!r})")
        for parent in path.absolute().parents:
            if parent.exists():
                if not parent.is_dir():
                    raise ValueError(f"{owner}: what {kind} lies in is no file (got {kind}={text!r}, file={parent})")
                break
    except OSError as error:
        raise ValueError(_refused(owner, f"{kind}={text!r:.200}", error)) from error
    return path


def _refused(owner: str, target: str, error: OSError) -> str:
    return f"{owner}: the place can be written to (got {target}: {error.strerror or error})"


@contextmanager
def _made(folder: Path, owner: str) -> Iterator[None]:
    """Inside the block the folder exists; those that were made for it and are empty in the end go."""
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(_refused(owner, f"folder={str(folder)!r}", error)) from error
    try:
        yield
    finally:
        with suppress(OSError):
            for path in absent:
                path.rmdir()


@contextmanager
def _claim(lock: Path, owner: str, target: str) -> Iterator[None]:
    # The process too: a child that was forked inside the block has claimed nothing
    key = (os.getpid(), os.path.realpath(lock))
    if key in _HELD.get():
        # What claims a folder calls functions that claim it
        yield
        return
    try:
        descriptor = _locked(lock, owner, target)
    except OSError as error:
        raise ValueError(_refused(owner, target, error)) from error
    _HELD.set(_HELD.get() | {key})
    try:
        yield
    finally:
        _HELD.set(_HELD.get() - {key})
        try:
            if key[0] == os.getpid():
                with suppress(OSError):
                    lock.unlink()
        finally:
            os.close(descriptor)


def _locked(lock: Path, owner: str, target: str) -> int:
    """A descriptor of the lock file, locked and with its owner's name in it; the lock goes when the process does."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            if not _lock(descriptor):
                raise ValueError(f"{owner}: one process writes at a time; {_writer(descriptor)} (got {target})")
            # Who had it before may have removed it between opening and locking
            if lock.exists() and os.path.samestat(lock.stat(), os.fstat(descriptor)):
                _sign(descriptor, lock)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _NO_LOCKS
    return True


def _sign(descriptor: int, lock: Path) -> None:
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "start": started})
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, text.encode())
    except OSError:
        lock.unlink()
        raise


def _writer(descriptor: int) -> str:
    try:
        owner = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {owner['pid']} on {owner['host']} has been at it since {owner['start']}"
    except (ValueError, KeyError, TypeError, OSError):
        return "another process is at it"
