"""``fastedit edit``: one method on some edits, saved and shown, also where it ends early."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console

import fastedit
from fastedit.backbone import EditableModel
from fastedit.cli.failures import STOPPED, Ended, reason, sentence, status_of
from fastedit.cli.tables import print_scores
from fastedit.engine import Run, RunInterrupted, RunStopped
from fastedit.requests import EditRequest


def edit_records(
    console: Console,
    model: EditableModel,
    edits: Sequence[EditRequest],
    method: str,
    *,
    out: Path,
    ledger: Path | None = None,
    **options: Any,
) -> Run:
    """Edit, save, show.

    Args:
        out: folder for the run. ledger: folder that keeps the edits, made if needed; None for none.
        options: other arguments of ``fastedit.edit``.
    Raises:
        Ended: the run ended early; what was finished is saved and shown.
    """
    with nullcontext() if ledger is None else fastedit.open_ledger(ledger, model) as opened:
        try:
            run = fastedit.edit(model, edits, method, ledger=opened, **options)
        except (RunInterrupted, RunStopped) as ended:
            raise keep_finished(console, ended, len(edits), method, out) from ended
        save_and_show(console, run, method, out)
    return run


def save_and_show(console: Console, run: Run, method: str, out: Path) -> None:
    """Write the run, then print its tables; these also where it cannot be written."""
    try:
        run.save(out)
    except OSError:
        print_scores(console, {method: run})
        raise
    print_scores(console, {method: run})
    console.print(f"scores: {out / 'scores.json'}\ndeltas: {deltas_of(run, out)}", soft_wrap=True, markup=False)


def deltas_of(run: Run, out: Path) -> Path:
    """Where the saved deltas of a run lie."""
    return out / ("deltas" if getattr(run.deltas, "is_mapped", False) else "deltas.safetensors")


def keep_finished(console: Console, ended: RunInterrupted | RunStopped, count: int, method: str, out: Path) -> Ended:
    """Save and show what is finished of a run that ended early; returns the sentence about it."""
    run = ended.run
    assert run is not None
    status = status_of(ended)
    why = "stopped" if status == STOPPED else f"the run ended early: {sentence(reason(ended))}"
    kept = f"{len(run.deltas)} of {count} edits are finished"
    try:
        save_and_show(console, run, method, out)
    except (OSError, ValueError, KeyboardInterrupt) as error:
        lost = "stopped while saving" if isinstance(error, KeyboardInterrupt) else sentence(error)
        return Ended(f"{why}; {kept}, and could not be saved: {lost}", status)
    return Ended(
        f"{why}; {kept} and saved in {out}: fastedit.Run.load({str(out)!r}) reads them, the same command with "
        "--overwrite begins anew",
        status,
    )
