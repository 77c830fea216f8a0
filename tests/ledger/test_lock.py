"""One writer at a time, whoever dies."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import fastedit
from fastedit import Ledger, LedgerError
from fastedit.backbone import EditableModel
from fastedit.ledger import lock
from fastedit.ledger.lock import LOCK, owner_of, writing

HOLDER = """
import sys, time
from pathlib import Path
from fastedit.ledger.lock import writing
with writing(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""

#: Holds the lock, leaves it to a child that sleeps, and dies.
ORPHAN = """
import os, signal, sys, time
from pathlib import Path
from fastedit.ledger.lock import writing
block = writing(Path(sys.argv[1]))
block.__enter__()
child = os.fork()
if child == 0:
    os.close(1)
    time.sleep(60)
    os._exit(0)
print(child, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def started(code: str, folder: Path) -> tuple[subprocess.Popen[str], str]:
    """A process that has said something."""
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def last_sign(folder: Path) -> int:
    """When the owner gave its last sign of life, in nanoseconds."""
    return (folder / LOCK).stat().st_mtime_ns


def test_a_second_writer_is_told_who_writes(tmp_path: Path) -> None:
    process, said = started(HOLDER, tmp_path)
    try:
        assert said == "held"
        owner = owner_of(tmp_path)
        assert owner is not None
        assert owner["pid"] == process.pid
        message = rf"one process writes at a time; process {process.pid} on .* has been writing since .*, its last sign"
        with pytest.raises(LedgerError, match=message), writing(tmp_path):
            pass
        # Without a sign of life the time of the last one stays; a busy machine may give it late
        first, end = last_sign(tmp_path), time.monotonic() + 120
        while last_sign(tmp_path) == first:
            assert time.monotonic() < end, "a writer gives no sign of life"
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    # Its lock went with it
    with writing(tmp_path):
        assert owner_of(tmp_path)["pid"] == os.getpid()  # type: ignore[index]
    assert owner_of(tmp_path) is None


def test_a_lock_that_a_dead_writers_child_holds_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process, said = started(ORPHAN, tmp_path)
    process.wait()
    try:
        with pytest.raises(LedgerError, match=f"process {process.pid} on"), writing(tmp_path):
            pass
        monkeypatch.setattr(lock, "STALE_S", 0.2)
        time.sleep(0.3)
        with writing(tmp_path) as lock_of_ours:
            lock_of_ours.check()
            assert lock_of_ours.was_left
            assert owner_of(tmp_path)["pid"] == os.getpid()  # type: ignore[index]
    finally:
        os.kill(int(said), signal.SIGKILL)


def test_a_writer_that_is_only_stopped_keeps_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process, _ = started(HOLDER, tmp_path)
    try:
        process.send_signal(signal.SIGSTOP)
        monkeypatch.setattr(lock, "STALE_S", 0.2)
        time.sleep(2 * lock.BEAT_S)
        with pytest.raises(LedgerError, match="one process writes"), writing(tmp_path):
            pass
    finally:
        process.kill()
        process.wait()


def test_who_has_lost_its_lock_does_not_commit(ledger: Ledger) -> None:
    with ledger.contents.writing():
        (ledger.folder / LOCK).unlink()
        (ledger.folder / LOCK).touch()
        with pytest.raises(LedgerError, match="the writer's lock stays with its owner"):
            ledger.tag("x")
    assert not ledger.history()


def test_two_threads_do_not_write_at_once(ledger: Ledger, model: EditableModel) -> None:
    other = fastedit.open_ledger(ledger.folder, model)
    errors: list[str] = []

    def attempt() -> None:
        try:
            other.tag("one")
        except LedgerError as error:
            errors.append(str(error))

    with ledger.contents.writing():
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()
    assert len(errors) == 1
    assert f"process {os.getpid()} on" in errors[0]
    assert other.tag("one") == 1


def test_a_file_system_that_cannot_lock_is_refused(
    model: EditableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_details: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.raises(
        LedgerError, match=r"the folder lies on a local disk, whose files can be locked \(got 'No locks"
    ):
        fastedit.open_ledger(tmp_path / "edits", model)
