"""Whatever breaks a ledger's work off, at whatever moment, in whatever process or thread, it can be gone on with."""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import fastedit
from fastedit import EditRequest, Ledger, LedgerError
from fastedit.backbone import EditableModel
from fastedit.deltas.storage import DeltaFile
from fastedit.ledger import asked as asking_for
from fastedit.ledger import connections, opening
from fastedit.ledger import verify as verifying
from fastedit.ledger.database import Database
from fastedit.ledger.lock import LOCK, owner_of
from fastedit.ledger.schema import COMMITS, FILE, SEAL
from fastedit.ledger.segments import Segments
from tests.engine.test_editing import largest_difference
from tests.ledger.conftest import FEW

ALONE: dict[str, Any] = {**FEW, "mode": "single", "evaluate": False}
#: Files whose functions are interrupted.
INTERRUPTED = (str(Path(fastedit.__file__).parent / "ledger"), contextlib.__file__)


def moments_of(call: Callable[[], object]) -> int:
    """How many moments a call has at which Python looks whether a signal came."""
    return -interrupted(call, 0)


def interrupted(call: Callable[[], object], at: int) -> int:
    """Raise KeyboardInterrupt at a moment at which a signal's handler runs; returns how many were left.

    That is where a function begins, and where one that is written in C has returned.
    """
    left = [at]

    def trace(frame: FrameType, event: str, _argument: object) -> None:
        if event in ("call", "c_return") and frame.f_code.co_filename.startswith(INTERRUPTED):
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt

    sys.setprofile(trace)
    try:
        call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.setprofile(None)
    return left[0]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("doing", ["tag", "undo", "compact", "close"])
def test_an_interrupt_at_any_moment_leaves_a_ledger_that_goes_on(
    ledger: Ledger, model: EditableModel, edits: list[EditRequest], doing: str
) -> None:
    ledger.edit(edits[:1], "grace", **ALONE)
    other = fastedit.open_ledger(ledger.folder, model)
    calls: dict[str, Callable[[], object]] = {
        "tag": lambda: ledger.tag(f"one {at}"),
        "undo": lambda: ledger.undo(1),
        "compact": ledger.compact,
        "close": ledger.close,
    }
    at = 1
    # All of them where there are few
    moments = moments_of(calls[doing])
    if doing == "undo":
        ledger.redo(1)
    assert moments > 15
    for at in range(1, moments, max(1, moments // 100)):
        interrupted(calls[doing], at)
        # In the same process with the same object, and by others
        ledger.tag(f"two {at}")
        other.tag(f"three {at}")
        assert len(list(ledger.state().deltas)) == len(ledger)
        if len(ledger) == 0:
            ledger.redo(1)
    assert other.verify().problems == ()


class Stopped(connections.Connection):
    """Is interrupted behind statements."""

    behind = ""

    def execute(self, statement: str, *given: Any) -> sqlite3.Cursor:
        result = super().execute(statement, *given)
        if Stopped.behind and statement.startswith(Stopped.behind):
            Stopped.behind = ""
            raise KeyboardInterrupt
        return result


@pytest.mark.parametrize("behind", ["BEGIN", "INSERT INTO tags", "COMMIT", "PRAGMA wal_checkpoint"])
def test_an_interrupt_behind_any_statement_leaves_no_transaction(
    model: EditableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behind: str
) -> None:
    monkeypatch.setattr(connections, "Connection", Stopped)
    ledger = fastedit.open_ledger(tmp_path / "edits", model)
    Stopped.behind = behind

    def both() -> None:
        ledger.tag("one")
        ledger.close()

    with pytest.raises(KeyboardInterrupt) as kept:
        both()
    # Also while something refers to the frames of the interrupt
    assert kept.tb is not None
    assert set(ledger.tags()) == ({"one"} if "COMMIT" in behind or "wal" in behind else set())
    ledger.tag("two")
    fastedit.open_ledger(tmp_path / "edits", model).tag("three")
    assert ledger.verify().sound


def in_child(body: Callable[[], object]) -> int:
    """Exit code of a forked child."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            body()
            code = 0
        except LedgerError:
            code = 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_forked_child_has_connections_of_its_own(ledger: Ledger) -> None:
    ledger.tag("parent")
    writer, reader = ledger.contents.database.writer(), ledger.contents.database._reader()

    def child() -> None:
        ledger.tag("child")
        assert set(ledger.tags()) == {"parent", "child"}
        assert ledger.contents.database.writer() is not writer
        assert ledger.contents.database._reader() is not reader
        ledger.close()

    assert in_child(child) == 0
    ledger.tag("parent again")
    assert set(ledger.tags()) == {"parent", "child", "parent again"}
    assert ledger.verify().sound


def test_a_forked_child_does_not_write_with_its_parents_lock(ledger: Ledger) -> None:
    with ledger.contents.writing():
        assert in_child(lambda: ledger.tag("child")) == 2
        owner = owner_of(ledger.folder)
        assert owner is not None
        assert owner["pid"] == os.getpid()
        ledger.tag("parent")
    assert set(ledger.tags()) == {"parent"}


def test_another_thread_does_not_write_with_this_ones_lock(ledger: Ledger) -> None:
    errors: list[str] = []

    def attempt() -> None:
        try:
            ledger.tag("thread")
        except LedgerError as error:
            errors.append(str(error))

    with ledger.contents.writing(), ledger.contents.transaction() as transaction:
        transaction.event("tag", name="x")
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()
    assert [f"process {os.getpid()} on" in error for error in errors] == [True]
    assert len(ledger.history()) == 1


def test_threads_that_have_ended_hold_no_file_open(ledger: Ledger) -> None:
    def held() -> int:
        names = list(Path("/proc/self/fd").iterdir())
        return sum(name.is_symlink() and str(ledger.folder) in str(name.readlink()) for name in names)

    len(ledger)
    before = held()
    for _ in range(40):
        thread = threading.Thread(target=lambda: len(ledger))
        thread.start()
        thread.join()
    assert held() <= before + 2


def test_no_room_for_the_locks_owner_leaves_no_lock(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_details: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space left") as kept:
            ledger.tag("one")
    ledger.tag("two")
    assert kept.tb is not None
    assert set(ledger.tags()) == {"two"}


def test_a_number_of_a_segment_that_was_read_and_never_committed_is_free(
    ledger: Ledger, edits: list[EditRequest]
) -> None:
    run = ledger.edit(edits[:2], "lora", **ALONE)
    deltas, segments = list(run.deltas), ledger.contents.segments

    def broken() -> None:
        with ledger.contents.transaction() as transaction:
            number = segments.write(transaction, [deltas[0]])
            segments._file(number).read(0)
            raise KeyboardInterrupt

    with ledger.contents.writing(), pytest.raises(KeyboardInterrupt):
        broken()
    third = ledger.edit(edits[2:3], "lora", **ALONE)
    assert [delta.request_id for delta in third.deltas] == ["edit-2"]
    assert largest_difference(list(ledger.state().deltas)[:2], deltas) == 0


def test_a_delta_that_could_not_be_read_once_is_not_damaged(
    ledger: Ledger, edits: list[EditRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger.edit(edits[:1], "lora", **ALONE)
    real, failed = DeltaFile.read, []

    def read(self: DeltaFile, index: int) -> Any:
        if not failed:
            # As torch says where a signal comes while it looks at a storage
            failed.append(1)
            raise ValueError("could not determine the shape of object type 'torch.storage.UntypedStorage'")
        return real(self, index)

    monkeypatch.setattr(DeltaFile, "read", read)
    assert [delta.request_id for delta in ledger.state().deltas] == ["edit-0"]
    assert failed


def test_what_is_written_while_it_is_verified_is_no_damage(
    ledger: Ledger, model: EditableModel, edits: list[EditRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger.edit(edits[:3], "grace", **ALONE)
    ledger.close()
    reader = fastedit.open_ledger(ledger.folder)
    assert (ledger.folder / SEAL).exists()
    real_rows, real_problem, real_checksum = Database.rows, Segments.problem, verifying.file_checksum
    done: list[str] = []

    def once(name: str, call: Callable[[], object]) -> None:
        if name not in done:
            done.append(name)
            call()

    def rows(self: Database, query: str, values: Any = ()) -> Any:
        found = real_rows(self, query, values)
        if self is reader.contents.database and query.startswith("SELECT id, time, action"):
            once("events", lambda: ledger.tag("meanwhile"))
        return found

    def problem(self: Segments, row: Any) -> str:
        if self is reader.contents.segments:
            once("compact", ledger.compact)
        return real_problem(self, row)

    def checksum(path: Path) -> str:
        once("seal", lambda: (ledger.tag("first"), ledger.close()))
        return real_checksum(path)

    monkeypatch.setattr(Database, "rows", rows)
    monkeypatch.setattr(Segments, "problem", problem)
    monkeypatch.setattr(verifying, "file_checksum", checksum)
    assert reader.verify().problems == ()
    assert done == ["seal", "events", "compact"]


def test_an_image_that_compacting_took_away_is_stored_again(
    ledger: Ledger, model: EditableModel, edits: list[EditRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_details: object, **_more: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(asking_for, "ask_for", full)
        with pytest.raises(OSError, match="No space left"):
            ledger.edit(edits[:1], "grace", **ALONE)
    fastedit.open_ledger(ledger.folder, model).compact()
    ledger.edit(edits[:1], "grace", **ALONE)
    assert ledger.verify().problems == ()


def test_what_was_left_half_written_goes_with_the_next_writer(ledger: Ledger, edits: list[EditRequest]) -> None:
    ledger.edit(edits[:1], "grace", **ALONE)
    (ledger.folder / "artifacts").mkdir()
    # As a killed writer does
    (ledger.folder / LOCK).write_text("{}")
    names = [f"{SEAL}.0a.partial", "images/x.png.0a.partial", "artifacts/y.0a.partial", "segments/9.0a.partial"]
    for name in names:
        (ledger.folder / name).write_bytes(b"half")
    ledger.tag("one")
    assert not list(ledger.folder.rglob("*.partial"))
    assert ledger.verify().sound


def test_a_ledger_whose_making_broke_off_is_made(
    model: EditableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "edits"

    def full(*_details: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            fastedit.open_ledger(folder, model)
    assert [path.name for path in folder.iterdir()] == [LOCK]
    # Killed while it made the database, or took a dead writer's lock over
    (folder / f"{FILE}.new-wal").write_bytes(b"half")
    (folder / f"{LOCK}.0a1b2c3d").touch()
    with fastedit.open_ledger(folder, model) as ledger:
        assert ledger.verify().sound


def test_two_that_make_a_ledger_at_once_both_open_it(
    model: EditableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, opened, errors = Database.create, [], []

    def slow(folder: Path, meta: Any) -> None:
        time.sleep(0.3)
        real(folder, meta)

    def attempt() -> None:
        try:
            opened.append(len(fastedit.open_ledger(tmp_path / "edits", model)))
        except LedgerError as error:
            errors.append(error)

    monkeypatch.setattr(Database, "create", staticmethod(slow))
    threads = [threading.Thread(target=attempt) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (opened, errors) == ([0, 0, 0], [])
    # One that is not made in time is an error all the same
    monkeypatch.setattr(opening, "PATIENCE_S", 0.05)
    with pytest.raises(LedgerError, match="one process writes at a time"), opening.writing(tmp_path):
        opening._create(tmp_path, model)


def test_who_only_read_takes_no_lock_when_it_closes(ledger: Ledger) -> None:
    ledger.tag("one")
    (ledger.folder / LOCK).unlink()
    with fastedit.open_ledger(ledger.folder) as reader:
        assert set(reader.tags()) == {"one"}
    assert not (ledger.folder / LOCK).exists()
    assert not (ledger.folder / SEAL).exists()


def test_a_disk_that_is_too_full_to_shrink_the_database_is_compacted_all_the_same(
    model: EditableModel, tmp_path: Path, edits: list[EditRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(connections.Connection):
        def execute(self, statement: str, *given: Any) -> sqlite3.Cursor:
            if statement == "VACUUM":
                raise sqlite3.OperationalError("database or disk is full")
            return super().execute(statement, *given)

    monkeypatch.setattr(connections, "Connection", Full)
    with fastedit.open_ledger(tmp_path / "edits", model) as ledger:
        ledger.edit(edits[:2], "grace", **ALONE)
        assert ledger.compact().segments == (2, 1)
        assert ledger.verify().sound
    assert (tmp_path / "edits" / COMMITS).exists()
