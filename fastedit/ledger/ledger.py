"""Edits that outlive the process: every one committed as it ends, taken back, found again, and served."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastedit.backbone import EditableModel
from fastedit.backbone.active import hiding, is_everywhere
from fastedit.deltas import EditDelta
from fastedit.engine import provenance as origin
from fastedit.engine.editing import edit as run_edits
from fastedit.engine.run_state import EditJob
from fastedit.ledger.adding import add
from fastedit.ledger.asked import answered, begin
from fastedit.ledger.asking import ask
from fastedit.ledger.compact import Compacted, compact
from fastedit.ledger.contents import Contents
from fastedit.ledger.database import LedgerError
from fastedit.ledger.diff import Change, changes
from fastedit.ledger.history import Event, Shown, all_shown, history, shown
from fastedit.ledger.session import Session
from fastedit.ledger.state import LedgerState, LiveEdits, state_at
from fastedit.ledger.stored_artifacts import offer_artifacts
from fastedit.ledger.undo import Undone, redo, undo
from fastedit.ledger.verify import Verified, verify
from fastedit.requests import EditRequest

if TYPE_CHECKING:
    from fastedit.engine.run import Run
    from fastedit.export import Exported


class Ledger:
    """A folder of edits. Made by ``open_ledger``; also a context manager, which closes it.

    Any number of processes and threads read it at a time, and one writes: ``edit``, ``undo``, ``redo``, ``tag`` and
    ``compact`` hold its lock while they run. What was committed is on the disk whatever happens to the process.

    Args:
        folder: that exists. model: that is edited; None reads only.
    """

    def __init__(self, folder: Path, model: EditableModel | None) -> None:
        self.folder, self.model = folder, model
        self.contents = Contents(folder)
        if model is not None:
            offer_artifacts(self.contents, model)

    def __repr__(self) -> str:
        return f"<Ledger: {len(self)} edits act, of {self.contents.meta('name')}, in {self.folder}>"

    def __len__(self) -> int:
        """How many edits act now."""
        found = self.contents.database.one("SELECT count(*) FROM versions WHERE until IS NULL")
        return int(found[0]) if found else 0

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_details: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files, and write down a checksum of the database where nobody else uses it."""
        self.contents.close()

    # Making edits

    def edit(
        self, requests: Sequence[EditRequest], method: str = "ldke", *, mode: str = "sequential", **options: Any
    ) -> Run:
        """Make edits and commit each as it ends, with its outcome and, once it is made, its scores.

        The same call again goes on after the last committed one: what is there is not made again. A request whose
        question is answered so already is no new edit. Takes the arguments of ``fastedit.edit``.

        Args:
            requests: what to change. method: see ``fastedit.method_names``.
            mode: "sequential": edits act together, one after another; "single": each alone on the base model.
        Returns:
            Run of the given requests, in order.
        Raises:
            LedgerError: another process writes; the edits contradict those that are there (``conflicts="last"`` lets
                the later answer stand); or those that act are of another method or of other settings.
            ValueError, RunInterrupted, RunStopped: see ``fastedit.edit``.
        """
        return run_edits(self.needs_model("edit"), requests, method, mode=mode, ledger=self, **options)

    @contextmanager
    def on_base(self) -> Iterator[None]:
        """Inside the block, in this context, served edits do not act: those of all threads, and of this ledger."""

        def served(holder: Any) -> bool:
            live = getattr(holder, "live", None)
            ours = isinstance(live, LiveEdits) and live.ledger.folder.resolve() == self.folder.resolve()
            return ours or is_everywhere(holder)

        with hiding(served):
            yield

    @contextmanager
    def session(self, job: EditJob, *, mode: str, conflicts: str, provenance: Mapping[str, Any]) -> Iterator[Session]:
        """See ``fastedit.engine.run_state.EditLedger``."""
        with begin(self, job, mode=mode, conflicts=conflicts, provenance=provenance) as session:
            yield session

    def add(
        self, deltas: EditDelta | Sequence[EditDelta], requests: Sequence[EditRequest], *, method: str | None = None
    ) -> list[int]:
        """Take in deltas that were made elsewhere, by ``fastedit.from_peft`` or in a run without a ledger.

        Args:
            deltas: each fitted alone on the base model. requests: what each was made for, in order.
            method: that made them; by default the usual one of their kind.
        Returns:
            Their numbers. They stand beside edits with ``mode="single"``, routed, scored and taken back as those.
        Raises:
            LedgerError: deltas fitted on top of others, or beside which those that act cannot stand; conflicts.
        """
        with self.on_base():
            return add(self, deltas, requests, method=method)

    # What acts

    def active(self) -> LiveEdits:
        """What acts now, for ``applied``, ``attach`` and ``model.answer``; it follows the ledger as that changes."""
        return LiveEdits(self)

    def at(self, moment: str | int) -> LedgerState:
        """The ledger as it was at a tag, or after an event.

        Raises:
            LedgerError: no such tag or event, or one whose deltas ``compact`` has removed.
        """
        return state_at(self, moment)

    def state(self) -> LedgerState:
        """The ledger as it is now."""
        return state_at(self, None)

    def ask(self, prompt: str, image: Any = None, *, at: str | int | None = None) -> tuple[str, str]:
        """The base model's answer to a question, and that with the edits; where these act alone, with the question's.

        Args:
            prompt: the question. image: that it is about. at: a tag or an event; None is now.
        """
        with self.on_base():
            return ask(self, state_at(self, at), prompt, image)

    # Looking back

    def history(self, limit: int | None = None) -> list[Event]:
        """What was done, in order; the newest so many events."""
        return history(self.contents, limit)

    def show(self, edit: int | str) -> Shown:
        """All that there is of an edit."""
        return shown(self.contents, self.contents.resolve(edit)[0])

    def edits(self, limit: int | None = None) -> list[Shown]:
        """Every edit that was asked for, in order, without scores; the newest so many."""
        return all_shown(self.contents, limit)

    def answered(self, requests: Sequence[EditRequest]) -> list[int | None]:
        """Of each request the number of the edit that acts and answers its question as it asks; None where none does.

        Raises:
            ImageError: an image cannot be read.
        """
        return answered(self.contents, requests)

    def diff(
        self, before: str | int | None = None, after: str | int | None = None, *, questions: Sequence[Any] = ()
    ) -> list[Change]:
        """Which answers differ between two moments.

        Args:
            before: a tag or an event; None is the base model. after: None is now.
            questions: ``fastedit.Query``; by default those of every edit that acts at either moment.
        Returns:
            The questions whose greedy answers differ, with both.
        """
        with self.on_base():
            return changes(self, before, after, questions)

    def verify(self, *, ask: bool = False) -> Verified:
        """Check every file and row.

        Args:
            ask: also ask the question of every edit that acts.
        Returns:
            What is damaged, by name of the file, and which edits do not hold any more.
        """
        with self.on_base():
            return verify(self, ask=ask)

    # Changing what acts

    def undo(self, ids: int | str | Sequence[int | str], *, later: str = "refit", pool: Any = None) -> Undone:
        """Take edits back, in one transaction.

        Where edits stand beside each other, the others are as they were. Where they add up, each later one was fitted
        on top of those that go.

        Args:
            ids: numbers of edits, or names of their requests.
            later: "refit" fits the later ones again without them; "keep" keeps them as they are and asks them again.
            pool: the records that the later ones were fitted with, where they were fitted with any.
        Returns:
            What it took: which were fitted again, kept, and do not hold any more.
        Raises:
            LedgerError: an edit that does not act; another process writes.
        """
        with self.on_base():
            return undo(self, ids, later=later, pool=pool)

    def undo_cost(self, ids: int | str | Sequence[int | str]) -> Undone:
        """What ``undo`` would do, without doing it."""
        return undo(self, ids, later="refit", pool=None, dry=True)

    def redo_cost(self, ids: int | str | Sequence[int | str]) -> Undone:
        """What ``redo`` would do, without doing it."""
        return redo(self, ids, pool=None, dry=True)

    def redo(self, ids: int | str | Sequence[int | str], *, pool: Any = None) -> Undone:
        """Let edits act again that were taken back, in one transaction.

        Where edits add up they are fitted again, on top of what acts now, unless nothing has changed since.
        """
        with self.on_base():
            return redo(self, ids, pool=pool)

    def tag(self, name: str) -> int:
        """Give the present state a name; returns the number of its event.

        Raises:
            LedgerError: the name is taken, or no name.
        """
        if not isinstance(name, str) or not name.strip() or name.isdigit():
            raise LedgerError(f"ledger: a tag is a text that is no number (got {name!r:.80})")
        with self.contents.writing(), self.contents.transaction() as transaction:
            if transaction.rows("SELECT 1 FROM tags WHERE name = ?", (name,)):
                raise LedgerError(f"ledger: a tag is given once (got {name!r:.80} again)")
            event = transaction.event("tag", name=name)
            transaction.insert("tags", name=name, event=event)
        return event

    def tags(self) -> dict[str, int]:
        """Names of states, each with its event."""
        return {row["name"]: row["event"] for row in self.contents.database.checked_rows("tags", "ORDER BY event")}

    def compact(self) -> Compacted:
        """Write what is of use into few files, and remove versions that nothing acts with and no tag names."""
        return compact(self)

    # Out of the ledger

    def export(self, kind: str, folder: str | Path, *, at: str | int | None = None, **options: Any) -> Exported:
        """Write what acts for others to use (``fastedit.export``): "peft", "merged", "delta" or "records".

        Args:
            at: a tag or an event, as of which; None is now.
        """
        from fastedit.export import export_deltas

        state = state_at(self, at)
        with self.on_base():
            return export_deltas(
                kind, self.needs_model("export"), state.acting(), folder, requests=state.requests(), **options
            )  # fmt: skip

    def dataset(self, processor: Any = None, **options: Any) -> Any:
        """Every edit that acts with its views, as a ``datasets.Dataset`` to be mixed into a fine-tuning.

        Args:
            processor: whose chat template renders the texts; None leaves messages. options: see
                ``fastedit.export.records.dataset``.
        """
        from fastedit.export.records import dataset

        return dataset(self.state().requests(), processor, model=self.model, **options)

    # Checks

    def needs_model(self, doing: str) -> EditableModel:
        """The model.

        Raises:
            LedgerError: it was opened without.
        """
        if self.model is None:
            raise LedgerError(
                f"ledger: {doing} needs the model; open it with fastedit.open_ledger(folder, model) (got none)"
            )
        return self.model

    def check_model(self) -> None:
        """Refuse a model that the edits do not belong to.

        Raises:
            LedgerError: other weights, or another prompt template; names both.
        """
        model = self.needs_model("check")
        stored, name = self.contents.meta("model"), self.contents.meta("name")
        if model.fingerprint != stored and not self._is_bound_to(model):
            raise LedgerError(
                f"ledger: it is of the model in use (got a ledger of {name!r}, fingerprint {stored[:12]}, and "
                f"{model.name!r}, fingerprint {model.fingerprint[:12]}, in use)"
            )
        prompts = json.loads(self.contents.meta("prompts"))
        for field, value in origin.prompts(model).items():
            if field in ("template", "text_template") and value != prompts[field]:
                raise LedgerError(
                    f"ledger: questions are put as when the edits were made (got {field}={value!r:.120} where "
                    f"the ledger has {prompts[field]!r:.120})"
                )

    def _is_bound_to(self, model: EditableModel) -> bool:
        """Whether all edits are bound to the architecture alone, and it is this one."""
        if self.contents.meta("architecture") != model.architecture:
            return False
        runs = [json.loads(row[0]) for row in self.contents.database.rows("SELECT settings FROM runs")]
        return bool(runs) and all(settings["bind"] == "architecture" for settings in runs)
