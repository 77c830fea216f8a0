"""Tables of the ledger's database, and the checksums of their rows."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

FORMAT = "fastedit-ledger/1"
FILE, COMMITS, SEAL = "ledger.sqlite", "commits.log", "ledger.sha256"
#: Folder of trained parts below that of the ledger.
ARTIFACTS = "artifacts"
CHECK = "checksum"

#: Table -> its columns, the key first. Every table has a column for the checksum of its rows as well.
TABLES: dict[str, tuple[str, ...]] = {
    "meta": ("name TEXT PRIMARY KEY", "value TEXT NOT NULL"),
    "runs": ("id INTEGER PRIMARY KEY", "method TEXT NOT NULL", "mode TEXT NOT NULL", "settings TEXT NOT NULL",
             "spec TEXT NOT NULL", "members TEXT NOT NULL", "key TEXT NOT NULL", "provenance TEXT NOT NULL",
             "time TEXT NOT NULL"),
    "edits": ("id INTEGER PRIMARY KEY", "run INTEGER NOT NULL", "number INTEGER NOT NULL", "name TEXT NOT NULL",
              "question TEXT NOT NULL", "target TEXT NOT NULL", "request TEXT NOT NULL"),
    "versions": ("id INTEGER PRIMARY KEY", "edit INTEGER NOT NULL", "since INTEGER NOT NULL", "until INTEGER",
                 "place INTEGER NOT NULL", "segment INTEGER NOT NULL", "row INTEGER NOT NULL", "delta TEXT NOT NULL",
                 "fitted_on TEXT", "outcome TEXT NOT NULL"),
    "scores": ("id INTEGER PRIMARY KEY", "edit INTEGER NOT NULL", "state TEXT NOT NULL", "scores TEXT NOT NULL",
               "time TEXT NOT NULL"),
    "segments": ("id INTEGER PRIMARY KEY", "file TEXT NOT NULL", "sha256 TEXT NOT NULL", "bytes INTEGER NOT NULL",
                 "deltas INTEGER NOT NULL"),
    "artifacts": ("id TEXT PRIMARY KEY", "file TEXT NOT NULL", "sha256 TEXT NOT NULL", "kind TEXT NOT NULL"),
    "tags": ("name TEXT PRIMARY KEY", "event INTEGER NOT NULL"),
    "events": ("id INTEGER PRIMARY KEY", "time TEXT NOT NULL", "action TEXT NOT NULL", "detail TEXT NOT NULL",
               "chain TEXT NOT NULL"),
}  # fmt: skip
INDEXES = (
    "CREATE INDEX IF NOT EXISTS runs_by_key ON runs(key)",
    "CREATE INDEX IF NOT EXISTS edits_by_question ON edits(question)",
    "CREATE INDEX IF NOT EXISTS edits_by_run ON edits(run, number)",
    "CREATE INDEX IF NOT EXISTS edits_by_name ON edits(name)",
    "CREATE INDEX IF NOT EXISTS versions_by_edit ON versions(edit)",
    "CREATE INDEX IF NOT EXISTS versions_by_place ON versions(until, place)",
    "CREATE UNIQUE INDEX IF NOT EXISTS scores_by_edit ON scores(edit, state)",
)
NAMES = {table: tuple(column.split()[0] for column in columns) for table, columns in TABLES.items()}


def utc_now() -> str:
    """The time in ISO 8601, UTC, to the millisecond."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def as_text(value: Any) -> str:
    """The one JSON text of a plain value."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def row_checksum(table: str, values: Sequence[Any]) -> str:
    """SHA-256 of a row's values, which also says of which table it is."""
    return hashlib.sha256(as_text([table, *values]).encode("utf-8", "surrogatepass")).hexdigest()


#: Bytes of a line of the file of commits: a number, a chain, a newline.
COMMIT_BYTES = 12 + 1 + 64 + 1


def commit_line(event: int, chain: str) -> bytes:
    """What the file of commits says of an event."""
    return f"{event:012d} {chain}\n".encode()


def event_chain(before: str, event: Mapping[str, Any]) -> str:
    """SHA-256 that an event and all before it make."""
    told = [before, event["id"], event["time"], event["action"], event["detail"]]
    return hashlib.sha256(as_text(told).encode("utf-8", "surrogatepass")).hexdigest()
