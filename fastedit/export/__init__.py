"""Ways out of the engine: fitted edits as files that other programs load, which know nothing of fastedit."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastedit.settings import nearest

if TYPE_CHECKING:
    from fastedit.backbone import EditableModel
    from fastedit.deltas import EditDelta
    from fastedit.requests import EditRequest

#: Kind of export -> module of this package and its function, imported when asked for.
EXPORTS: dict[str, tuple[str, str]] = {
    "peft": ("peft", "export_peft"),
    "merged": ("merged", "export_merged"),
    "delta": ("changes", "export_changes"),
    "records": ("records", "export_records"),
}


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Args:
        kind: one of ``EXPORTS``.
        folder: that was written, or the one file.
        files: all of them, sorted.
        report: plain values: what was written, its errors, what changed in answers.
    """

    kind: str
    folder: Path
    files: tuple[Path, ...] = ()
    report: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        count = f"{len(self.files)} file{'' if len(self.files) == 1 else 's'}"
        return f"<Exported: {self.kind} as {count} in {str(self.folder)!r}>"


def export_deltas(
    kind: str,
    model: EditableModel,
    deltas: EditDelta | Sequence[EditDelta],
    folder: str | Path,
    *,
    requests: Sequence[EditRequest] = (),
    **options: Any,
) -> Exported:
    """Write deltas as what other programs load.

    Args:
        kind: one of ``EXPORTS``.
        model: the one that they were fitted on.
        deltas: one, or several of one method, in the order in which they were made.
        folder: to write, new or empty; for some kinds a file.
        requests: of the deltas, in order, to ask again what was written; () asks nothing.
        options: of the kind's function.
    Raises:
        TypeError: deltas are something else.
        ValueError: unknown kind or option; no deltas, or of another model; requests are not as many as deltas; or what
            the kind's function refuses.
    """
    function = export_function(kind, options)
    from fastedit.engine.apply import checked_deltas

    if isinstance(deltas, Sequence) and len(deltas):
        # One at a time: they may lie in files, and more of them than memory holds
        for delta in deltas:
            checked_deltas(model, delta)
        listed = deltas
    else:
        listed = checked_deltas(model, deltas)
    if requests and len(requests) != len(listed):
        detail = f"got {len(requests)} requests for {len(listed)} deltas"
        raise ValueError(f"export: requests are those of the deltas, one each ({detail})")
    return function(model, listed, Path(folder), requests=requests, **options)


def export_function(kind: str, options: Mapping[str, Any]) -> Callable[..., Exported]:
    """The function of a kind of export.

    Args:
        kind: one of ``EXPORTS``. options: that it will be given, by name.
    Raises:
        ValueError: unknown kind or option.
    """
    if kind not in EXPORTS:
        raise ValueError(f"export: kind {kind!r} is not known{nearest(kind, EXPORTS)} (got kind={kind!r})")
    module, name = EXPORTS[kind]
    function: Callable[..., Exported] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    known = [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name != "requests"
    ]
    for option in options:
        if option not in known:
            raise ValueError(
                f"export: option {option!r} of kind {kind!r} is not known{nearest(option, known)} "
                f"(got {option}={options[option]!r:.80})"
            )
    return function
