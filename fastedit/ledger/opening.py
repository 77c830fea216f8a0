"""Open a folder of edits, or make one."""

from __future__ import annotations

import time
from pathlib import Path

from fastedit.backbone import EditableModel
from fastedit.backbone.active import hiding, is_everywhere
from fastedit.engine import provenance as origin
from fastedit.ledger.database import Database, LedgerError
from fastedit.ledger.ledger import Ledger
from fastedit.ledger.lock import LOCK, LedgerTaken, writing
from fastedit.ledger.schema import FILE, as_text, utc_now

#: Seconds that a process waits for another one to make the ledger.
PATIENCE_S = 10.0


def open_ledger(folder: str | Path, model: EditableModel | None = None) -> Ledger:
    """Open a folder of edits; it is made where it is absent.

    Args:
        folder: on a local disk. model: that is edited; None, for a ledger that exists, reads what is there without it.
    Raises:
        FileNotFoundError: there is no ledger, and no model to begin one with.
        LedgerError: it is of another model, or of the same with another prompt template; or the file system cannot
            lock files.
        DamagedLedger: a file is not what was written, naming it.
    """
    if model is not None and not isinstance(model, EditableModel):
        raise LedgerError(f"ledger: model is an EditableModel, from fastedit.load (got model={model!r:.80})")
    path = Path(folder)
    check_folder(path)
    if not (path / FILE).exists():
        if model is None:
            raise FileNotFoundError(
                f"ledger: the folder holds a ledger, or a model is given (got none in {str(folder)!r})"
            )
        _create(path, model)
    ledger = Ledger(path, model)
    try:
        if model is not None:
            with ledger.on_base():
                ledger.check_model()
    except BaseException:
        ledger.close()
        raise
    return ledger


def check_folder(path: Path) -> None:
    """Refuse what can neither be a ledger nor become one; nothing is made.

    Raises:
        LedgerError: a file, what lies in one, or a folder that holds something else.
    """
    existing = next((each for each in (path, *path.absolute().parents) if each.exists()), path)
    if existing.exists() and not existing.is_dir():
        raise LedgerError(f"ledger: it is a folder, and lies in one (got folder={str(path)!r}, file={str(existing)!r})")
    if path.exists() and not (path / FILE).exists():
        other = [each.name for each in path.iterdir() if not each.name.startswith((LOCK, f"{FILE}.new"))]
        if other:
            raise LedgerError(f"ledger: the folder is new, empty or a ledger's (got {other[0]!r} in {str(path)!r})")


def _create(path: Path, model: EditableModel) -> None:
    path.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + PATIENCE_S
    while not (path / FILE).exists():
        try:
            _create_locked(path, model)
        except LedgerTaken:
            # Another process that makes it is about to be done
            if time.monotonic() > end:
                raise
            time.sleep(0.02)


def _create_locked(path: Path, model: EditableModel) -> None:
    with writing(path):
        if (path / FILE).exists():
            return
        with hiding(is_everywhere):
            fingerprint = model.fingerprint
        meta = {
            "model": fingerprint,
            "architecture": model.architecture,
            "name": model.name,
            "prompts": as_text(origin.prompts(model)),
            "created": utc_now(),
            "versions": as_text(origin.versions()),
            "compacted": "0",
        }
        Database.create(path, meta)
