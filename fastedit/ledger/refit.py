"""Fit edits of a ledger again, on top of others than they were fitted on."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastedit.data import fingerprint
from fastedit.deltas import EditDelta
from fastedit.engine.editing import edit as run_edits
from fastedit.engine.run_state import EditJob
from fastedit.evaluation import EditScores
from fastedit.fitting.solver import FitOutcome
from fastedit.ledger.database import LedgerError, Transaction
from fastedit.ledger.segments import LedgerDeltas, Stored
from fastedit.ledger.session import state_of
from fastedit.ledger.stored_artifacts import read_artifact
from fastedit.requests import EditRequest

if TYPE_CHECKING:
    from fastedit.ledger.ledger import Ledger

#: Of edits of a run that are not to be made now.
_LEFT_OUT = FitOutcome("computed", 0, float("nan"), float("nan"))


class Refit:
    """Makes some edits of one run again (``EditLedger`` and ``EditStore``); all is written in one transaction.

    Args:
        ledger: of the edits. transaction: that is under way. event: from which on they act.
        before: what acts beneath them, in order. ids: of the edits of the run. wanted: those that are made.
        places: of each in the order in which deltas act.
    """

    def __init__(
        self,
        ledger: Ledger,
        transaction: Transaction,
        event: int,
        before: list[Stored],
        ids: Sequence[int],
        wanted: Sequence[int],
        places: Mapping[int, int],
    ) -> None:
        self.folder: Path = ledger.folder
        self._contents, self._transaction, self._event = ledger.contents, transaction, event
        self._before, self._ids, self._wanted, self._places = before, list(ids), list(wanted), places
        self.edits: Sequence[EditRequest] = ()
        self.members: Sequence[int] = [self._ids.index(edit) for edit in wanted]
        self.made: list[Stored] = []

    def on_base(self) -> AbstractContextManager[None]:
        """Who fits again is on the base model already."""
        return nullcontext()

    @contextmanager
    def session(self, job: EditJob, *, mode: str, conflicts: str, provenance: Mapping[str, Any]) -> Iterator[Refit]:
        """See ``EditLedger``."""
        self.edits = job.edits
        yield self

    def outcomes(self) -> dict[int, FitOutcome]:
        """Of those that are not to be made."""
        wanted = set(self._wanted)
        return {number: _LEFT_OUT for number, edit in enumerate(self._ids) if edit not in wanted}

    def commit(self, number: int, delta: EditDelta, outcome: FitOutcome) -> None:
        """Write an edit; it counts with the transaction."""
        edit = self._ids[number]
        place = self._places[edit]
        self.made.append(
            self._contents.keep(self._transaction, delta, outcome, edit=edit, event=self._event, place=place)
        )

    def timeline(self) -> list[int | None]:
        """What acts beneath, and those that were made."""
        return [None] * len(self._before) + [self._ids.index(stored.edit) for stored in self.made]

    def acting(self, count: int | None = None) -> LedgerDeltas:
        """See ``EditStore``."""
        return LedgerDeltas(self._contents.segments, [*self._before, *self.made][:count])

    def deltas(self, numbers: Sequence[int]) -> LedgerDeltas:
        """See ``EditStore``."""
        made = {stored.edit: stored for stored in self.made}
        chosen = [made[self._ids[number]] for number in numbers if self._ids[number] in made]
        return LedgerDeltas(self._contents.segments, chosen)

    def state(self, count: int | None = None) -> str:
        """See ``EditStore``."""
        return state_of([*self._before, *self.made][:count])

    def scores(self, state: str) -> dict[int, EditScores]:
        """None."""
        return {}

    def commit_scores(self, state: str, scores: Mapping[int, EditScores]) -> None:
        """They are not scored."""


def refit(
    ledger: Ledger,
    transaction: Transaction,
    event: int,
    before: Sequence[Stored],
    wanted: Sequence[int],
    places: Mapping[int, int],
    pool: Sequence[EditRequest] | None,
) -> list[Stored]:
    """Fit edits on top of others, in order, as their runs fitted them; returns where they lie.

    Raises:
        LedgerError: they were fitted with records that are not given.
    """
    if not wanted:
        return []
    acting = list(before)
    contents, model = ledger.contents, ledger.needs_model("fitting again")
    for _, group in itertools.groupby(wanted, key=lambda edit: contents.edit(edit)["run"]):
        edits = list(group)
        run = contents.run_of(edits[0])
        settings = run["settings"]
        ids = list(dict.fromkeys(json.loads(run["members"])))
        artifact = settings["artifact"]
        work = Refit(ledger, transaction, event, acting, ids, edits, places)
        run_edits(
            model, contents.requests(ids), settings["method"], batch_size=1, mode="sequential",
            pool=checked_pool(settings["pool"], pool), views=settings["views"], near=settings["near"],
            seed=settings["seed"], bind=settings["bind"], evaluate=False, show_progress=False, conflicts="last",
            artifact=None if artifact is None else read_artifact(contents, artifact), ledger=work,
            **settings["overrides"],
        )  # fmt: skip
        acting += work.made
    return acting[len(before) :]


def checked_pool(stored: Mapping[str, Any] | None, pool: Sequence[EditRequest] | None) -> Sequence[EditRequest] | None:
    """The records that a run was given, if these are they.

    Raises:
        LedgerError: none were given, or others.
    """
    if stored is None:
        return None
    found = None if pool is None else fingerprint(pool)
    if found != stored["fingerprint"]:
        got = "none" if pool is None else f"{len(pool)}, fingerprint {str(found)[:12]}"
        raise LedgerError(
            f"ledger: edits are fitted again with the records that they were fitted with: pool= (got {got}, and they "
            f"had {stored['records']}, fingerprint {stored['fingerprint'][:12]}); later='keep' needs none"
        )
    return pool
