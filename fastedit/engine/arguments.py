"""What ``edit`` is called with, looked at before anything is done with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from fastedit.backbone import EditableModel
from fastedit.engine.run_state import EditLedger
from fastedit.fitting.views import VIEW_SOURCES
from fastedit.requests import EditRequest
from fastedit.settings import typed_value
from fastedit.training import Artifact

MODES = ("single", "sequential")
CONFLICTS = ("error", "last")
BINDS = ("content", "architecture")

#: Arguments of ``edit`` that are plain values, as they are annotated there.
_TYPES: dict[str, Any] = {
    "method": str,
    "batch_size": int | Literal["auto"],
    "mode": str,
    "views": str,
    "conflicts": str,
    "bind": str,
    "near": bool,
    "evaluate": bool,
    "show_progress": bool | None,
    "seed": int,
    "score_at": tuple[int, ...],
    "score_sample": int | None,
}
_CHOICES = {"mode": MODES, "conflicts": CONFLICTS, "bind": BINDS}


def check_options(**options: Any) -> None:
    """Refuse arguments of ``edit`` that are plain values and no possible ones; any of them may be left out.

    Raises:
        ValueError: names the argument, the rule and the value.
    """
    batch_size = options.get("batch_size", "auto")
    if batch_size != "auto" and not _is_count(batch_size):
        raise ValueError(f"edit: batch_size is at least 1, or 'auto' (got batch_size={batch_size!r})")
    for name, value in options.items():
        typed_value("edit", name, _TYPES[name], value)
        if name in _CHOICES and value not in _CHOICES[name]:
            raise ValueError(f"edit: {name} is one of {list(_CHOICES[name])} (got {name}={value!r})")
    if options.get("views", VIEW_SOURCES[0]) not in VIEW_SOURCES:
        raise ValueError(f"views: source is one of {list(VIEW_SOURCES)} (got views={options['views']!r})")
    if options.get("seed", 0) < 0:
        raise ValueError(f"edit: seed is not negative (got seed={options['seed']!r})")


def check_arguments(
    model: EditableModel,
    edits: Sequence[EditRequest],
    *,
    pool: Sequence[EditRequest] | None,
    ledger: EditLedger | None,
    artifact: Artifact | str | Path | None,
    **options: Any,
) -> None:
    """Refuse arguments of ``edit`` of another type than it takes, and plain values that it does not know.

    Raises:
        ValueError: names the argument, the rule and the value.
    """
    if not isinstance(model, EditableModel):
        raise ValueError(f"edit: model is an EditableModel, from fastedit.load (got model={model!r:.80})")
    check_records("edit", "edits", edits)
    if pool is not None:
        check_records("edit", "pool", pool)
    if ledger is not None and not hasattr(ledger, "session"):
        raise ValueError(f"edit: ledger is a Ledger, from fastedit.open_ledger, or None (got ledger={ledger!r:.80})")
    if artifact is not None and not isinstance(artifact, Artifact | str | Path):
        raise ValueError(f"edit: artifact is an Artifact, a file of one or None (got artifact={artifact!r:.80})")
    check_options(**options)


def check_records(owner: str, name: str, records: Any) -> None:
    """Refuse what is not a sequence of at least one ``EditRequest``.

    Raises:
        ValueError: names the argument, the rule and the value.
    """
    if isinstance(records, EditRequest):
        raise ValueError(
            f"{owner}: {name} is a list of requests, [request] for a single one (got {name}={records!r:.80})"
        )
    if isinstance(records, str | Path):
        raise ValueError(
            f"{owner}: {name} is a list of requests, from fastedit.read_edits (got {name}={str(records)!r})"
        )
    if not isinstance(records, Sequence):
        raise ValueError(f"{owner}: {name} is a list of requests (got {name} of type {type(records).__name__})")
    if not records:
        raise ValueError(f"{owner}: at least one {'edit' if name == 'edits' else 'record'} (got {name}=[])")
    for number, record in enumerate(records):
        if not isinstance(record, EditRequest):
            raise ValueError(f"{owner}: {name} are EditRequests (got {name}[{number}]={record!r:.80})")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
