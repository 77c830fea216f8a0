"""Take edits back, and let them act again: each is one transaction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fastedit.deltas.company import grown
from fastedit.ledger.asking import holds, own_answers
from fastedit.ledger.database import LedgerError, Transaction
from fastedit.ledger.refit import checked_pool, refit
from fastedit.ledger.schema import as_text
from fastedit.ledger.segments import Stored
from fastedit.ledger.settings import adds_up, plan_of
from fastedit.ledger.verify import NotHeld
from fastedit.requests import EditRequest

if TYPE_CHECKING:
    from fastedit.ledger.ledger import Ledger

LATER = ("refit", "keep")


@dataclass(frozen=True)
class Undone:
    """What taking edits back, or letting them act again, took.

    Args:
        ids: of the edits. refitted: later edits that were fitted again. kept: later edits that stayed as they were
            though what they were fitted on has changed. lost: edits that do not hold any more, asked after "keep".
        event: of the history; 0 where nothing was done yet.
    """

    ids: tuple[int, ...]
    refitted: tuple[int, ...] = ()
    kept: tuple[int, ...] = ()
    lost: tuple[NotHeld, ...] = ()
    event: int = 0

    def __str__(self) -> str:
        told = [f"{_count(self.ids)}"]
        if self.refitted:
            told.append(f"{_count(self.refitted)} behind fitted again")
        if self.kept:
            told.append(f"{_count(self.kept)} behind kept, {len(self.lost)} of which do not hold")
        return "; ".join(told)


def _count(ids: Sequence[int]) -> str:
    return f"{len(ids)} edit{'' if len(ids) == 1 else 's'}"


def undo(ledger: Ledger, ids: Any, *, later: str, pool: Any, dry: bool = False) -> Undone:
    """See ``Ledger.undo``."""
    if later not in LATER:
        raise LedgerError(f"ledger: later is one of {list(LATER)} (got later={later!r})")
    contents = ledger.contents
    numbers = contents.resolve(ids)
    acting = contents.acting()
    there = {stored.edit for _, stored in acting}
    for edit in numbers:
        if edit not in there:
            raise LedgerError(
                f"ledger: what is taken back acts (got edit {edit}, which is {ledger.show(edit).status!r})"
            )
    first, behind = _behind(ledger, acting, numbers)
    if dry:
        return Undone(tuple(numbers), refitted=tuple(stored.edit for _, stored in behind))
    if behind and later == "refit":
        ledger.check_model()
        for _, stored in behind:
            checked_pool(contents.run_of(stored.edit)["settings"]["pool"], pool)
    with contents.writing():
        if contents.acting() != acting:
            raise LedgerError(
                "ledger: what acts was changed by another process meanwhile; look again (got a new event)"
            )
        with contents.transaction() as transaction:
            event = transaction.event("undo", edits=numbers, **({"later": later} if behind else {}))
            gone = set(numbers) | {stored.edit for _, stored in behind}
            for _, stored in acting:
                if stored.edit in gone:
                    transaction.update("versions", stored.version, until=event)
            before = [stored for _, stored in acting[:first]]
            if later == "refit":
                places = {stored.edit: place for place, stored in behind}
                refit(ledger, transaction, event, before, [stored.edit for _, stored in behind], places, pool)
            else:
                _keep(transaction, event, before, behind)
    edits = tuple(stored.edit for _, stored in behind)
    if later == "refit" or not edits:
        return Undone(tuple(numbers), refitted=edits, event=event)
    return Undone(tuple(numbers), kept=edits, lost=_lost(ledger, edits), event=event)


def _behind(
    ledger: Ledger, acting: Sequence[tuple[int, Stored]], numbers: Sequence[int]
) -> tuple[int, list[tuple[int, Stored]]]:
    """Where the first of some edits stands, and those behind it that were fitted on top of it."""
    first = min(position for position, (_, stored) in enumerate(acting) if stored.edit in numbers)
    run = ledger.contents.run_of(acting[-1][1].edit)
    if not adds_up(plan_of(run["settings"]).method, run["mode"]):
        return len(acting), []
    return first, [(place, stored) for place, stored in acting[first:] if stored.edit not in numbers]


def _keep(transaction: Transaction, event: int, before: Sequence[Stored], behind: Sequence[tuple[int, Stored]]) -> None:
    """Let later edits act as they are, on top of what is left."""
    company: tuple[str, ...] = ()
    for stored in before:
        company = grown(company, stored.delta)
    for place, stored in behind:
        _act(transaction, event, place, replace(stored, fitted_on=company))
        company = grown(company, stored.delta)


def _act(transaction: Transaction, event: int, place: int, stored: Stored) -> None:
    """Let a stored delta act from an event on."""
    (outcome,) = transaction.rows("SELECT outcome FROM versions WHERE id = ?", (stored.version,))[0]
    fitted_on = None if stored.fitted_on is None else as_text(list(stored.fitted_on))
    transaction.insert(
        "versions", edit=stored.edit, since=event, until=None, place=place, segment=stored.segment, row=stored.row,
        delta=stored.delta, fitted_on=fitted_on, outcome=outcome,
    )  # fmt: skip


def _lost(ledger: Ledger, edits: Sequence[int]) -> tuple[NotHeld, ...]:
    """Those of some edits that act and do not hold."""
    state = ledger.state()
    listed: list[tuple[int, EditRequest, str]] = list(
        zip(state.edit_ids, state.requests(), own_answers(ledger, state), strict=True)
    )
    return tuple(NotHeld(*each) for each in listed if each[0] in edits and not holds(each[2], each[1]))


def redo(ledger: Ledger, ids: Any, *, pool: Any, dry: bool = False) -> Undone:
    """See ``Ledger.redo``."""
    contents = ledger.contents
    numbers = contents.resolve(ids)
    acting = contents.acting()
    there = {stored.edit for _, stored in acting}
    newest = {edit: _newest(ledger, edit) for edit in numbers}
    for edit in numbers:
        if edit in there or newest[edit] is None:
            status = ledger.show(edit).status
            raise LedgerError(f"ledger: what acts again was taken back (got edit {edit}, which is {status!r})")
    run = contents.run_of(numbers[0])
    plan = plan_of(run["settings"])
    if acting:
        now = contents.run_of(acting[-1][1].edit)
        if plan_of(now["settings"]).method is not plan.method or now["mode"] != run["mode"]:
            raise LedgerError(
                f"ledger: edits that act are of one method and mode (got {run['method']!r}, mode={run['mode']!r}, "
                f"beside {now['method']!r}, mode={now['mode']!r})"
            )
    up = adds_up(plan.method, run["mode"])
    undone = _undone_just_now(ledger, numbers) if up else None
    if dry:
        return Undone(tuple(numbers), refitted=tuple(numbers) if up and undone is None else ())
    if up and undone is None:
        ledger.check_model()
        for edit in numbers:
            checked_pool(contents.run_of(edit)["settings"]["pool"], pool)
    with contents.writing(), contents.transaction() as transaction:
        event = transaction.event("redo", edits=numbers, exactly=not up or undone is not None)
        if not up:
            for edit in numbers:
                place, stored = newest[edit] or (0, None)
                assert stored is not None
                _act(transaction, event, place, stored)
        elif undone is not None:
            # As it was before: nothing has changed since
            old = contents.acting(undone - 1)
            known = {stored.version for _, stored in old}
            for _, stored in acting:
                if stored.version not in known:
                    transaction.update("versions", stored.version, until=event)
            standing = {stored.version for _, stored in acting}
            for place, stored in old:
                if stored.version not in standing:
                    _act(transaction, event, place, stored)
        else:
            ordered = sorted(numbers)
            before = [stored for _, stored in acting]
            refit(ledger, transaction, event, before, ordered, dict.fromkeys(ordered, event), pool)
    refitted = tuple(numbers) if up and undone is None else ()
    return Undone(tuple(numbers), refitted=refitted, event=event)


def _newest(ledger: Ledger, edit: int) -> tuple[int, Stored] | None:
    """The newest version of an edit and its place; None where it was never made."""
    rows = list(ledger.contents.database.checked_rows("versions", "WHERE edit = ? ORDER BY since, id", (edit,)))
    if not rows:
        return None
    row = rows[-1]
    name = ledger.contents.edit(edit)["name"]
    return row["place"], Stored(row["id"], edit, name, row["segment"], row["row"], row["delta"])


def _undone_just_now(ledger: Ledger, numbers: Sequence[int]) -> int | None:
    """The event that took back exactly these edits, if nothing that acts has changed since."""
    for event in reversed(ledger.history()):
        if event.action in ("edit", "add", "redo"):
            return None
        if event.action == "undo":
            return event.id if sorted(event.detail["edits"]) == sorted(numbers) else None
        if event.action == "compact":
            return None
    return None
