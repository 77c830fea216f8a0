"""Whether a ledger is what was written, and whether its edits still hold."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastedit.ledger.asking import holds, own_answers
from fastedit.ledger.contents import Contents
from fastedit.ledger.database import DamagedLedger
from fastedit.ledger.records import IMAGES
from fastedit.ledger.schema import (
    CHECK,
    COMMIT_BYTES,
    COMMITS,
    FILE,
    NAMES,
    SEAL,
    commit_line,
    event_chain,
    row_checksum,
)
from fastedit.ledger.segments import file_checksum
from fastedit.ledger.stored_artifacts import artifact_problem
from fastedit.requests import EditRequest

if TYPE_CHECKING:
    from fastedit.ledger.ledger import Ledger


@dataclass(frozen=True)
class NotHeld:
    """An edit whose question is not answered as it asks for.

    Args:
        edit: its number. request: of it. answer: that the model gives.
    """

    edit: int
    request: EditRequest
    answer: str


@dataclass(frozen=True)
class Verified:
    """What a look at a ledger found.

    Args:
        problems: each names a file and what is wrong with it. files: how many were read. edits: how many act.
        asked: how many were asked again; None where none was to be. lost: those that do not hold.
    """

    problems: tuple[str, ...]
    files: int
    edits: int
    asked: int | None = None
    lost: tuple[NotHeld, ...] = ()

    @property
    def sound(self) -> bool:
        """Whether every file and row is what was written."""
        return not self.problems

    def __str__(self) -> str:
        told = f"{self.files} files and {self.edits} edits that act: " + ("sound" if self.sound else "damaged")
        lines = [told, *(f"  {problem}" for problem in self.problems)]
        if self.asked is not None:
            lines.append(f"{self.asked - len(self.lost)} of {self.asked} edits hold")
            lines += [f"  edit {each.edit}: {each.request.prompt!r} is answered {each.answer!r}" for each in self.lost]
        return "\n".join(lines)


def verify(ledger: Ledger, *, ask: bool) -> Verified:
    """See ``Ledger.verify``."""
    contents = ledger.contents
    problems = list(dict.fromkeys(_database_problems(contents)))
    files = 1
    for problem in _file_problems(contents):
        files += 1
        if problem:
            problems.append(problem)
    if problems or not ask:
        return Verified(tuple(problems), files, len(ledger))
    ledger.check_model()
    state = ledger.state()
    requests = state.requests()
    # Of two edits of a question the later one stands
    standing = contents.standing(row["question"] for row in map(contents.edit, state.edit_ids))
    expected = {edit for _, edit in standing.values()}
    lost, asked = [], 0
    for edit, request, answer in zip(state.edit_ids, requests, own_answers(ledger, state), strict=True):
        if edit in expected:
            asked += 1
            if not holds(answer, request):
                lost.append(NotHeld(edit, request, answer))
    return Verified((), files, len(ledger), asked, tuple(lost))


def _database_problems(contents: Contents) -> Iterator[str]:
    """What is wrong with the database and with what says which state it should be in."""
    database = contents.database
    seal = contents.folder / SEAL
    wal = database.path.with_name(f"{FILE}-wal")
    sealed = _text(seal)
    if (
        sealed is not None
        and not (wal.exists() and wal.stat().st_size)
        and sealed.strip() != file_checksum(database.path)
        # A writer that came meanwhile takes the seal away first
        and sealed == _text(seal)
    ):
        yield f"{FILE}: is not what was written (its checksum in {SEAL} differs)"
    try:
        for (found,) in database.rows("PRAGMA integrity_check"):
            if found != "ok":
                yield f"{FILE}: {found}"
        for table, names in NAMES.items():
            for row in database.rows(f"SELECT {', '.join([*names, CHECK])} FROM {table}"):
                if row_checksum(table, row[:-1]) != row[-1]:
                    yield f"{FILE}: {table} {row[0]!r} is not what was written (its checksum differs)"
        yield from _history_problems(contents)
    except (DamagedLedger, sqlite3.DatabaseError, OSError) as error:
        yield f"{FILE}: {error}"


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return None


def _history_problems(contents: Contents) -> Iterator[str]:
    """Events that are missing or were changed, and versions that have none."""
    # Before the events: those that are committed meanwhile are in them
    path = contents.folder / COMMITS
    content = path.read_bytes() if path.exists() else b""
    chain = ""
    chains: dict[int, str] = {}
    events = contents.database.rows("SELECT id, time, action, detail, chain FROM events ORDER BY id")
    for expected, row in enumerate(events, 1):
        event = dict(zip(("id", "time", "action", "detail"), row, strict=False))
        chain = event_chain(chain, event)
        if row[0] != expected or row[4] != chain:
            yield f"{FILE}: event {expected} is missing or not what was written"
            return
        chains[row[0]] = chain
        if row[2] == "edit":
            for edit in json.loads(row[3])["edits"]:
                if not contents.database.rows("SELECT 1 FROM versions WHERE edit = ? LIMIT 1", (edit,)):
                    yield f"{FILE}: the delta of edit {edit} is missing from versions"
    for version, segment, row_number in contents.database.rows(
        "SELECT v.id, v.segment, v.row FROM versions v LEFT JOIN segments s ON s.id = v.segment "
        "WHERE s.id IS NULL OR v.row >= s.deltas OR v.row < 0"
    ):
        yield f"{FILE}: versions {version} names row {row_number} of segment {segment}, which there is not"
    for start in range(0, len(content) - len(content) % COMMIT_BYTES, COMMIT_BYTES):
        line = content[start : start + COMMIT_BYTES]
        number = line[:12].decode("ascii", "replace")
        known = chains.get(int(number), "") if number.isdigit() else ""
        if not known or line != commit_line(int(number), known):
            yield f"{COMMITS}: line {start // COMMIT_BYTES + 1} names a commit that {FILE} does not have"


def _file_problems(contents: Contents) -> Iterator[str]:
    """Of every other file what is wrong with it, or ""."""
    database = contents.database
    try:
        for row in database.checked_rows("segments", "ORDER BY id"):
            problem = contents.segments.problem(row)
            # Compacting takes files away that were there a moment ago
            yield problem if problem and database.row("segments", row["id"]) is not None else ""
        for row in database.checked_rows("artifacts"):
            yield artifact_problem(contents, row)
        for name in contents.image_names():
            try:
                yield contents.images.problem(name)
            except DamagedLedger as error:
                yield f"{IMAGES}: {error}"
    except (DamagedLedger, sqlite3.DatabaseError, OSError, ValueError):
        # It was named above
        return
