"""Transactions are there whole or not at all, and on the disk when they end."""

from __future__ import annotations

import errno
import sqlite3
from pathlib import Path

import pytest

import fastedit
from fastedit import DamagedLedger, EditRequest, Ledger, LedgerError
from fastedit.backbone import EditableModel
from fastedit.ledger import database
from fastedit.ledger.schema import COMMITS, FILE, NAMES, TABLES
from tests.ledger.conftest import FEW


def test_commits_are_on_the_disk_and_readers_see_one_moment(ledger: Ledger) -> None:
    writer = ledger.contents.database.writer()
    assert writer.execute("PRAGMA synchronous").fetchone() == (2,)
    assert writer.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    with ledger.contents.writing(), ledger.contents.transaction() as transaction:
        transaction.event("tag", name="x")
        assert not ledger.history()
    assert [event.id for event in ledger.history()] == [1]


def broken(ledger: Ledger, error: type[BaseException]) -> None:
    """A transaction that ends in an error."""
    with ledger.contents.transaction() as transaction:
        transaction.event("tag", name="x")
        transaction.insert("tags", name="x", event=1)
        raise error


def test_what_fails_inside_leaves_nothing(ledger: Ledger) -> None:
    for error in (RuntimeError, KeyboardInterrupt):
        with ledger.contents.writing(), pytest.raises(error):
            broken(ledger, error)
    assert (ledger.history(), ledger.tags()) == ([], {})
    with pytest.raises(LedgerError, match="who writes has its lock"), ledger.contents.transaction():
        pass


def test_every_table_has_checked_rows(ledger: Ledger, edits: list[EditRequest]) -> None:
    ledger.edit(edits[:1], "grace", **FEW)
    connection = sqlite3.connect(ledger.folder / FILE)
    for table in TABLES:
        columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
        assert columns == [*NAMES[table], "checksum"]
    assert len(list(ledger.contents.database.checked_rows("versions"))) == 1
    connection.execute("UPDATE versions SET place = 5")
    connection.commit()
    with pytest.raises(DamagedLedger, match=r"rows are what was written \(the checksum differs of versions 1 in"):
        list(ledger.contents.database.checked_rows("versions"))


def test_a_full_disk_is_an_error_of_the_system(ledger: Ledger, edits: list[EditRequest]) -> None:
    ledger.edit(edits[:1], "grace", **FEW)
    before = ledger.history()
    connection = ledger.contents.database.writer()
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count={pages}")
    with pytest.raises(OSError, match="the disk is full; what was committed is there") as caught:
        ledger.edit(edits[1:], "grace", **FEW)
    assert caught.value.errno == errno.ENOSPC
    connection.execute("PRAGMA max_page_count=1000000")
    assert ledger.history() == before
    ledger.edit(edits[1:], "grace", **FEW)
    assert len(ledger) == 6
    assert ledger.verify().sound


def test_a_commit_without_its_line_is_none_the_less(ledger: Ledger) -> None:
    ledger.tag("one")
    path = ledger.folder / COMMITS
    # A writer that was killed between the two, and one that was killed within the line
    path.write_bytes(path.read_bytes()[:-30])
    ledger.tag("two")
    assert path.stat().st_size == database.COMMIT_BYTES
    assert fastedit.open_ledger(ledger.folder).verify().sound
    path.unlink()
    assert fastedit.open_ledger(ledger.folder).verify().sound


def test_an_older_database_is_missed(ledger: Ledger, tmp_path: Path) -> None:
    ledger.tag("one")
    ledger.close()
    old = (ledger.folder / FILE).read_bytes()
    ledger.tag("two")
    ledger.close()
    (ledger.folder / FILE).write_bytes(old)
    with pytest.raises(DamagedLedger, match=r"hold every commit \(got none for event '000000000002'"):
        fastedit.open_ledger(ledger.folder)


def test_what_is_no_ledgers_database_is_refused(model: EditableModel, tmp_path: Path) -> None:
    for number, content in enumerate((b"", b"no database at all, and long enough to be one" * 100)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / FILE).write_bytes(content)
        with pytest.raises(DamagedLedger, match=FILE):
            fastedit.open_ledger(folder, model)
    with (
        fastedit.open_ledger(tmp_path / "edits", model) as ledger,
        ledger.contents.writing(),
        ledger.contents.transaction() as transaction,
    ):
        transaction.update("meta", "format", value="fastedit-ledger/9")
    with pytest.raises(LedgerError, match=r"format is 'fastedit-ledger/1' \(got format='fastedit-ledger/9'"):
        fastedit.open_ledger(tmp_path / "edits", model)
