"""The edits of one run in a ledger: which are there already, and each that ends committed as it does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from operator import itemgetter
from pathlib import Path
from typing import Any

from fastedit.deltas import EditDelta
from fastedit.engine.run import plain
from fastedit.evaluation import EditScores
from fastedit.fitting.solver import FitOutcome
from fastedit.ledger.contents import Contents, scores_of
from fastedit.ledger.schema import as_text, utc_now
from fastedit.ledger.segments import LedgerDeltas, Stored
from fastedit.requests import EditRequest


class Session:
    """What a run finds and keeps in a ledger (``fastedit.engine.run_state.EditStore``).

    Args:
        contents: of the ledger, which this process writes.
        run: its number. edits: of the run, each once. ids: their numbers in the ledger.
        members: which of the edits each of the given requests is.
        adds_up: whether each edit is fitted on top of the earlier ones; else they stand beside each other.
    """

    def __init__(
        self,
        contents: Contents,
        run: int,
        edits: Sequence[EditRequest],
        ids: Sequence[int],
        members: Sequence[int],
        *,
        adds_up: bool,
    ) -> None:
        self.folder: Path = contents.folder
        self.edits, self.members = edits, members
        self._contents, self._run, self._ids, self._adds_up = contents, run, list(ids), adds_up
        self._number = {edit: number for number, edit in enumerate(ids)}
        #: What acts, with its place in the order.
        self._acting = contents.acting()
        self._sorted = True
        self._there = {stored.edit for _, stored in self._acting}

    def outcomes(self) -> dict[int, FitOutcome]:
        """See ``EditStore``."""
        wanted = {
            stored.version: self._number[stored.edit] for _, stored in self._acting if stored.edit in self._number
        }
        found = self._contents.outcomes(wanted)
        return {wanted[version]: outcome for version, outcome in found.items()}

    def commit(self, number: int, delta: EditDelta, outcome: FitOutcome) -> None:
        """See ``EditStore``. An edit that is there already is not committed twice."""
        edit = self._ids[number]
        if edit in self._there:
            return
        with self._contents.transaction() as transaction:
            event = transaction.event("edit", edits=[edit], run=self._run, status=outcome.status)
            place = event if self._adds_up else edit
            stored = self._contents.keep(transaction, delta, outcome, edit=edit, event=event, place=place)
        self._sorted = self._sorted and (not self._acting or self._acting[-1][0] < place)
        self._acting.append((place, stored))
        self._there.add(edit)

    def timeline(self) -> list[int | None]:
        """See ``EditStore``."""
        return [self._number.get(stored.edit) for stored in self._in_order()]

    def acting(self, count: int | None = None) -> LedgerDeltas:
        """See ``EditStore``."""
        return LedgerDeltas(self._contents.segments, self._in_order()[:count])

    def deltas(self, numbers: Sequence[int]) -> LedgerDeltas:
        """See ``EditStore``."""
        by_edit = {stored.edit: stored for stored in self._in_order()}
        return LedgerDeltas(self._contents.segments, [by_edit[self._ids[number]] for number in numbers])

    def state(self, count: int | None = None) -> str:
        """See ``EditStore``."""
        return state_of(self._in_order()[:count])

    def scores(self, state: str) -> dict[int, EditScores]:
        """See ``EditStore``."""
        rows = self._contents.database.checked_rows("scores", "WHERE state = ?", (state,))
        return {
            self._number[row["edit"]]: scores_of(row["scores"])
            for row in rows
            if row["edit"] in self._number
        }  # fmt: skip

    def commit_scores(self, state: str, scores: Mapping[int, EditScores]) -> None:
        """See ``EditStore``."""
        with self._contents.transaction() as transaction:
            for number, each in scores.items():
                edit = self._ids[number]
                for (old,) in transaction.rows("SELECT id FROM scores WHERE edit = ? AND state = ?", (edit, state)):
                    transaction.delete("scores", old)
                transaction.insert(
                    "scores", edit=edit, state=state, scores=as_text(plain(asdict(each))), time=utc_now()
                )  # fmt: skip

    def _in_order(self) -> list[Stored]:
        if not self._sorted:
            self._acting.sort(key=itemgetter(0))
            self._sorted = True
        return [stored for _, stored in self._acting]


def state_of(listed: Sequence[Stored]) -> str:
    """What identifies deltas that act together in an order."""
    return hashlib.sha256("\n".join(stored.delta for stored in listed).encode()).hexdigest()


def run_key(settings: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """What identifies a run: equal keys ask for the same edits, made in the same way."""
    return hashlib.sha256(json.dumps([settings, records], sort_keys=True).encode()).hexdigest()
