"""``fastedit edit``: one method on some edits, saved and shown, also where it ends early."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

import fastedit
from fastedit.backbone import EditableModel
from fastedit.cli.app import tell
from fastedit.cli.documents import print_document
from fastedit.cli.failures import STOPPED, Ended, command_line, reason, sentence, status_of
from fastedit.cli.report import examples
from fastedit.cli.tables import print_scores
from fastedit.engine import Run, RunInterrupted, RunStopped
from fastedit.ledger import Ledger, check_folder
from fastedit.ledger.asked import answered
from fastedit.ledger.schema import FILE
from fastedit.progress import progress
from fastedit.report import REPORT
from fastedit.requests import EditRequest


@dataclass(frozen=True)
class Keeping:
    """Where the edits of a command go.

    Args:
        out: folder for the run; None writes none. ledger: folder that keeps edits; None for none.
        there: how many of the edits the ledger has already. as_json: print one document instead of tables.
    """

    out: Path | None
    ledger: Path | None = None
    there: int = 0
    as_json: bool = False

    def new_of(self, run: Run) -> int:
        """How many edits a run has made that were not there."""
        return max(0, len(run.deltas) - self.there)


def look_at_ledger(folder: Path, edits: Sequence[EditRequest], conflicts: str) -> int:
    """How many of some edits are in a ledger, which may be new; what it would refuse them for is told at once.

    Raises:
        LedgerError: no ledger, one that another process writes, or edits that contradict those that are there.
    """
    check_folder(folder)
    if not (folder / FILE).exists():
        tell(f"{folder}: a new ledger")
        return 0
    with fastedit.open_ledger(folder) as opened:
        # Whoever has the lock is named now, and not after the model was loaded
        with opened.contents.writing():
            pass
        with progress(f"looking for {len(edits)} edits in {folder}", 0):
            there = sum(edit is not None for edit in answered(opened.contents, edits, conflicts))
        tell(f"{folder}: {there} of {len(edits)} edits are there, {len(edits) - there} are new")
    return there


def edit_records(
    console: Console, model: EditableModel, edits: Sequence[EditRequest], method: str, keeping: Keeping, **options: Any
) -> Run:
    """Edit, save, show.

    Args:
        options: other arguments of ``fastedit.edit``.
    Raises:
        Ended: the run ended early; what was finished is saved and shown.
    """
    with nullcontext() if keeping.ledger is None else fastedit.open_ledger(keeping.ledger, model) as opened:
        try:
            run = fastedit.edit(model, edits, method, ledger=opened, **options)
        except (RunInterrupted, RunStopped) as ended:
            raise keep_finished(console, ended, edits, method, keeping, opened) from ended
        save_and_show(console, run, method, keeping, opened)
    return run


@contextmanager
def goes_on(ledger: Path | None, edits: Sequence[EditRequest]) -> Iterator[None]:
    """Inside the block edits go to a ledger; what a signal ends before the first is finished says what is there.

    Raises:
        Ended: stopped by a signal.
    """
    try:
        yield
    except KeyboardInterrupt as stopped:
        if ledger is None or not (ledger / FILE).exists():
            raise
        with fastedit.open_ledger(ledger) as opened:
            raise Ended(f"stopped; {_committed(opened, edits, None)}", STOPPED) from stopped


def save_and_show(console: Console, run: Run, method: str, keeping: Keeping, opened: Ledger | None = None) -> None:
    """Write the run, then print its tables; these also where it cannot be written."""
    try:
        if keeping.out is not None:
            run.save(keeping.out)
    finally:
        if keeping.as_json:
            print_document(_document(run, keeping))
        else:
            print_scores(console, {method: run})
            shown = examples(run)
            if shown is not None:
                console.print(shown)
    if keeping.as_json:
        return
    out = keeping.out
    if out is not None:
        console.print(f"scores: {out / 'scores.json'}\ndeltas: {deltas_of(run, out)}", soft_wrap=True, markup=False)
        console.print(f"report, for a browser: {out / REPORT}", soft_wrap=True, markup=False)
    if opened is not None:
        told = f"{keeping.new_of(run)} new edits, {keeping.there} were there; {len(opened)} act"
        console.print(f"ledger: {keeping.ledger}, {told}", soft_wrap=True, markup=False, highlight=False)


def _document(run: Run, keeping: Keeping) -> dict[str, Any]:
    """A run as plain values; of a ledger's, each edit with its number there."""
    content = run.record()
    for number, edit in zip(getattr(run.deltas, "edit_ids", ()), content["edits"], strict=False):
        edit["edit"] = number
    return {
        "ledger": None if keeping.ledger is None else str(keeping.ledger),
        "out": None if keeping.out is None else str(keeping.out),
        "there": keeping.there,
        "new": keeping.new_of(run),
        **content,
    }


def deltas_of(run: Run, out: Path) -> Path:
    """Where the saved deltas of a run lie."""
    return out / ("deltas" if getattr(run.deltas, "is_mapped", False) else "deltas.safetensors")


def keep_finished(
    console: Console,
    ended: RunInterrupted | RunStopped,
    edits: Sequence[EditRequest],
    method: str,
    keeping: Keeping,
    opened: Ledger | None,
) -> Ended:
    """Save and show what is finished of a run that ended early; returns the sentence about it."""
    run, out = ended.run, keeping.out
    assert run is not None
    status = status_of(ended)
    why = "stopped" if status == STOPPED else f"the run ended early: {sentence(reason(ended))}"
    kept = f"{len(run.deltas)} of {len(edits)} edits are finished" if opened is None else _committed(opened, edits, out)
    try:
        save_and_show(console, run, method, keeping, opened)
    except (OSError, ValueError, KeyboardInterrupt) as error:
        lost = "stopped while saving" if isinstance(error, KeyboardInterrupt) else sentence(error)
        return Ended(f"{why}; {kept}, and could not be saved{'' if out is None else f' in {out}'}: {lost}", status)
    if opened is not None:
        saved = "" if out is None else f"; they are saved in {out} as well"
        return Ended(f"{why}; {kept}{saved}", status)
    return Ended(
        f"{why}; {kept} and saved in {out}: fastedit.Run.load({str(out)!r}) reads them, the same command with "
        "--overwrite begins anew",
        status,
    )


def _committed(opened: Ledger, edits: Sequence[EditRequest], out: Path | None) -> str:
    """What a ledger has of some edits, and how to go on; a run that was saved in ``out`` is replaced then."""
    typed = command_line()
    if out is not None and "--overwrite" not in typed:
        typed += " --overwrite"
    count = f"{_count_there(opened, edits)} of {len(edits)} edits are committed in {opened.folder}"
    return f"{count}; the same command goes on from there: {typed}"


def _count_there(opened: Ledger, edits: Sequence[EditRequest]) -> int:
    return sum(edit is not None for edit in opened.answered(edits))
