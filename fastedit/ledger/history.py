"""What was done in a ledger, and all that there is of one edit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastedit.evaluation import EditScores
from fastedit.fitting.solver import FitOutcome
from fastedit.ledger.contents import Contents, outcome_of, scores_of
from fastedit.ledger.database import LedgerError


@dataclass(frozen=True)
class Event:
    """Something that was done.

    Args:
        id: its number. time: ISO 8601, UTC. action: "ask", "edit", "add", "undo", "redo", "tag" or "compact".
        detail: of it, plain values.
    """

    id: int
    time: str
    action: str
    detail: Mapping[str, Any] = field(default_factory=dict)

    def told(self) -> str:
        """Its detail on one line, long lists cut short."""
        return ", ".join(f"{name}={_short(value)}" for name, value in self.detail.items())

    def __str__(self) -> str:
        return f"{self.id:>6}  {self.time[:19]}  {self.action:<8}{self.told()}"


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > 5:
        return f"[{', '.join(map(str, value[:5]))} and {len(value) - 5} more]"
    return str(value)


@dataclass(frozen=True)
class Shown:
    """An edit.

    Args:
        id: its number in the ledger. name: of its request. prompt, target: what was asked for.
        status: "acts", "replaced" (it acts, and a later edit answers its question), "undone" or "asked" (and not made).
        method, mode: of the run that made it. outcome: of the fit; None where it was not made.
        delta: SHA-256 of its delta. since, until: events between which the newest version of it acted.
        request: as it is stored. scores: by the state in which they were made, the newest first.
        versions: how often it was fitted.
    """

    id: int
    name: str
    prompt: str
    target: str
    status: str
    method: str
    mode: str
    outcome: FitOutcome | None
    delta: str
    since: int | None
    until: int | None
    versions: int
    request: Mapping[str, Any]
    scores: Mapping[str, EditScores]


def history(contents: Contents, limit: int | None = None) -> list[Event]:
    """Every event, or the newest ones, in order."""
    where, values = _newest("events", limit)
    rows = contents.database.checked_rows("events", f"{where} ORDER BY id", values)
    return [Event(row["id"], row["time"], row["action"], json.loads(row["detail"])) for row in rows]


def all_shown(contents: Contents, limit: int | None = None) -> list[Shown]:
    """Every edit that was asked for, or the newest ones, in order, without scores."""
    where, values = _newest("edits", limit)
    rows = contents.database.rows(f"SELECT id FROM edits {where} ORDER BY id", values)
    return listed(contents, [row[0] for row in rows])


def listed(contents: Contents, numbers: Sequence[int]) -> list[Shown]:
    """Some edits, without scores; the row of a run, which may name very many, is read once."""
    runs: dict[int, Mapping[str, Any]] = {}
    return [shown(contents, number, scores=False, runs=runs) for number in numbers]


def _newest(table: str, limit: int | None) -> tuple[str, tuple[int, ...]]:
    """What selects the newest rows of a table, all where no limit is given."""
    if limit is None:
        return "", ()
    if limit < 1:
        raise LedgerError(f"ledger: limit is at least 1 (got limit={limit})")
    return f"WHERE id > (SELECT coalesce(max(id), 0) FROM {table}) - ?", (limit,)


def shown(
    contents: Contents, number: int, *, scores: bool = True, runs: dict[int, Mapping[str, Any]] | None = None
) -> Shown:
    """All that there is of an edit.

    Args:
        runs: by number, those that were read already; what is read is put there.
    """
    row = contents.edit(number)
    known = {} if runs is None else runs
    if row["run"] not in known:
        known[row["run"]] = contents.database.row("runs", row["run"]) or {"method": "", "mode": ""}
    run = known[row["run"]]
    versions = list(contents.database.checked_rows("versions", "WHERE edit = ? ORDER BY since, id", (number,)))
    newest = versions[-1] if versions else None
    status = "asked" if newest is None else "acts" if newest["until"] is None else "undone"
    if status == "acts" and contents.standing([row["question"]])[row["question"]][1] != number:
        status = "replaced"
    request = json.loads(row["request"])
    found = {}
    if scores:
        kept = contents.database.checked_rows("scores", "WHERE edit = ? ORDER BY time DESC", (number,))
        found = {each["state"]: scores_of(each["scores"]) for each in kept}
    return Shown(
        number, row["name"], request["prompt"], request["target"], status, run["method"], run["mode"],
        None if newest is None else outcome_of(newest["outcome"]), "" if newest is None else newest["delta"],
        None if newest is None else newest["since"], None if newest is None else newest["until"], len(versions),
        request, found,
    )  # fmt: skip
