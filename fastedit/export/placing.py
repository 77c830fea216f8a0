"""A folder that is there whole or not at all: written beside its place, and put there by a rename."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastedit.engine.output import claim_output
from fastedit.engine.run import plain
from fastedit.export import Exported
from fastedit.files import write_json
from fastedit.files.atomic import PARTIAL
from fastedit.files.claims import LOCK

#: In every folder that an export wrote: its kind and report. Only a folder that holds it is ever overwritten.
EXPORT_FILE = "fastedit_export.json"


class Placement:
    """A folder under way.

    Args:
        kind: of the export. folder: where it will be. path: where it is written, beside that.
    """

    def __init__(self, kind: str, folder: Path, path: Path) -> None:
        self.kind, self.folder, self.path = kind, folder, path
        #: To be filled in the block; stands in ``EXPORT_FILE`` and in ``exported``.
        self.report: dict[str, Any] = {}

    @property
    def exported(self) -> Exported:
        """What was written, after the block."""
        files = tuple(sorted(path for path in self.folder.rglob("*") if path.is_file()))
        report: Mapping[str, Any] = plain(self.report)
        return Exported(self.kind, self.folder, files, report)


@contextmanager
def placing(
    folder: str | Path, kind: str, *, overwrite: bool = False, expected_bytes: int | None = None
) -> Iterator[Placement]:
    """Inside the block a folder is written that takes its place when the block ends well; else nothing is left of it.

    Args:
        folder: new or empty. kind: of the export.
        overwrite: an earlier export that is there is replaced as a whole.
        expected_bytes: that will be written; None is not known.
    Raises:
        ValueError: it holds something, cannot be written, has no room, or another process writes there.
        OSError: it cannot be written, or the disk is full; what was there is as it was.
    """
    folder = Path(folder)
    with claim_output(folder, overwrite=overwrite, expected_bytes=expected_bytes, field="export") as claimed:
        require_free(claimed, overwrite)
        place = claimed.resolve()
        _clear(place)
        path = place.with_name(f".{place.name}.{secrets.token_hex(4)}{PARTIAL}")
        try:
            path.mkdir()
            placement = Placement(kind, folder, path)
            yield placement
            write_json(path / EXPORT_FILE, {"kind": kind, "report": plain(placement.report)})
            _put(path, place)
        finally:
            shutil.rmtree(path, ignore_errors=True)


def require_free(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that holds what no export may take the place of.

    Raises:
        FileExistsError: says what is there.
    """
    held = sorted(path.name for path in folder.iterdir() if path.name != LOCK) if folder.is_dir() else []
    if held and not (overwrite and EXPORT_FILE in held):
        rule = "holds an earlier export where overwrite=True is given" if overwrite else "is new or empty"
        hint = "" if overwrite else "; overwrite=True replaces an earlier export"
        raise ValueError(f"export: the folder {rule} (got {held[0]!r} in folder={str(folder)!r}){hint}")


def _clear(place: Path) -> None:
    """Remove what exports to this place that were killed left beside it."""
    for path in place.parent.glob(f".{place.name}.????????{PARTIAL}"):
        shutil.rmtree(path, ignore_errors=True)


def _put(path: Path, place: Path) -> None:
    """Rename a folder to its place, whatever lies there."""
    aside = path.with_name(path.name.removesuffix(PARTIAL) + f".old{PARTIAL}")
    try:
        place.rename(aside)
    except OSError as error:
        raise ValueError(
            "export: the folder can be renamed, which a mounted one cannot; give a new folder in it (got "
            f"folder={str(place)!r}: {error.strerror})"
        ) from error
    try:
        path.rename(place)
    except OSError:
        with suppress(OSError):
            aside.rename(place)
        raise
    # Those of exports that were killed in between too
    for old in place.parent.glob(f".{place.name}.????????.old{PARTIAL}"):
        shutil.rmtree(old, ignore_errors=True)
