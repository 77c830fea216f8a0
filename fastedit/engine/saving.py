"""A run's folder: written so that at any moment it holds one run as a whole, and read with everything checked.

``scores.json`` says which files belong to it, by checksum, and is the last that is renamed. What it names is written
beside the files of an earlier run, as ``<name>.next``, and takes their names afterwards; until then it is read there.
Where a process is killed in between, the next one that saves here finishes that first.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastedit.deltas import EditDelta, StoredDeltas, load_deltas, save_deltas
from fastedit.deltas.storage import header_checksum, read_deltas
from fastedit.files import claim_folder, read_json, write_json
from fastedit.training import Artifact, load_artifact, save_artifact

FORMAT = "fastedit-run/2"
SCORES = "scores.json"
DELTAS, STORED, ARTIFACT = "deltas.safetensors", "deltas", "artifact.safetensors"
#: Endings of what waits for its name, and of what has lost it and will be removed.
NEXT, OLD = ".next", ".old"
# Deltas of one file, where there are too many for memory
_PER_FILE = 64
# How often a reader looks again where a writer was faster
_LOOKS = 20


def write_run(folder: Path, content: Mapping[str, Any], deltas: Sequence[EditDelta], artifact: Artifact | None) -> None:
    """Write a run into a folder, made if needed; the run that was there is there until this one is.

    Args:
        content: of ``scores.json``. deltas: in files, which are copied unless they lie in the folder already; or not.
    Raises:
        ValueError: another process writes there, or deltas of a run that was not saved lie in the way.
        OSError: it cannot be written, the disk is full ...; what was there is as it was.
    """
    with claim_folder(folder, "run"):
        before = _recover(folder)
        try:
            files = _write_next(folder, before, deltas, artifact)
            # What a run wrote itself, and not its saving, stays where it is
            gone = {n: e["sha256"] for n, e in before.items() if n not in files and e.get("copied", True)}
            write_json(folder / SCORES, {"format": FORMAT, "files": files, "gone": gone, **content})
        except BaseException as error:
            _clear(folder, NEXT)
            if isinstance(error, OSError) and error.errno is not None:
                detail = f"run: it was not saved, and what was in {str(folder)!r} is as it was: {error.strerror}"
                raise OSError(error.errno, detail) from error
            raise
        _finish(folder, files, gone)


@dataclass(frozen=True)
class SavedRun:
    """What lies in a run's folder."""

    content: Mapping[str, Any]
    deltas: Sequence[EditDelta]
    artifact: Artifact | None


def read_run(folder: Path) -> SavedRun:
    """Read a run back, everything checked.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not what was written, or belongs to another run; names it.
    """
    before: dict[str, Any] = {}
    for look in range(_LOOKS):
        content, checked = _scores(folder)
        try:
            return _read(folder, content, checked)
        except (FileNotFoundError, ValueError):
            # Another process may save there: a file may have got its name, or a new run come, while we read
            if content == before or look == _LOOKS - 1:
                raise
        before = content
    raise AssertionError


def _scores(folder: Path) -> tuple[dict[str, Any], bool]:
    return read_json(folder / SCORES, "run")


def _read(folder: Path, content: dict[str, Any], checked: bool) -> SavedRun:
    deltas: Sequence[EditDelta]
    if "format" not in content:
        if not checked:
            detail = (
                f"run: {folder / SCORES} was written without checksums: what it holds is not checked; save it again"
            )
            warnings.warn(detail, UserWarning, stacklevel=4)
        stored = (folder / STORED).is_dir() and not (folder / DELTAS).exists()
        deltas = StoredDeltas(folder / STORED) if stored else load_deltas(folder / DELTAS)
        return SavedRun(content, deltas, load_artifact(folder / ARTIFACT) if (folder / ARTIFACT).exists() else None)
    if content["format"] != FORMAT or not checked:
        detail = f"format={content['format']!r:.80}" + ("" if checked else " without a checksum")
        raise ValueError(f"run: format is {FORMAT!r}, with a checksum (got {detail} in path={str(folder / SCORES)!r})")
    found = {name: _part(folder, name, entry["sha256"]) for name, entry in content["files"].items()}
    return SavedRun(content, found[STORED] if STORED in found else found[DELTAS], found.get(ARTIFACT))


def _part(folder: Path, name: str, checksum: str) -> Any:
    """What a file of a run holds: it lies under its name, or still under the one that it was written as."""
    errors: list[Exception] = []
    there = [path for path in (folder / name, folder / f"{name}{NEXT}") if path.exists()]
    for path in there:
        try:
            value, found = _READERS[name](path)
        except (OSError, ValueError) as error:
            errors.append(error)
            continue
        if found == checksum:
            return value
    if errors:
        raise errors[0]
    if there:
        raise ValueError(f"run: {SCORES} and {name} are of one run (they differ in folder={str(folder)!r})")
    raise FileNotFoundError(f"run: {name} is there (got none in folder={str(folder)!r})")


def _read_stored(path: Path) -> tuple[StoredDeltas, str]:
    stored = StoredDeltas(path)
    return stored, stored.checksum


def _read_artifact(path: Path) -> tuple[Artifact, str]:
    artifact = load_artifact(path)
    return artifact, artifact.id


#: Name -> what reads it, with its checksum.
_READERS: dict[str, Callable[[Path], tuple[Any, str]]] = {
    DELTAS: read_deltas,
    STORED: _read_stored,
    ARTIFACT: _read_artifact,
}


def _checksum_of(path: Path, name: str) -> str | None:
    """None of what cannot be read."""
    try:
        return header_checksum(path) if name == DELTAS else _READERS[name](path)[1]
    except (OSError, ValueError):
        return None


def _recover(folder: Path) -> dict[str, dict[str, Any]]:
    """Finish what a killed process began, remove what it left; the files of the run that is there, by name."""
    try:
        content, checked = _scores(folder)
    except (FileNotFoundError, ValueError):
        content, checked = {}, False
    files: dict[str, dict[str, Any]] = content.get("files", {}) if checked else {}
    _finish(folder, files, content.get("gone", {}) if checked else {})
    if content and not checked:
        # of a version that wrote no checksums
        files = {name: {"sha256": _checksum_of(folder / name, name)} for name in (DELTAS, ARTIFACT)}
    return files


def _write_next(
    folder: Path, before: Mapping[str, Mapping[str, Any]], deltas: Sequence[EditDelta], artifact: Artifact | None
) -> dict[str, dict[str, Any]]:
    """Write everything but the scores; name -> checksum and whose it is."""
    files: dict[str, dict[str, Any]] = {}
    copied = STORED in before and before[STORED]["copied"]
    if not getattr(deltas, "is_mapped", False):
        path = save_deltas(deltas, folder / f"{DELTAS}{NEXT}")
        files[DELTAS] = {"sha256": header_checksum(path)}
    elif isinstance(deltas, StoredDeltas) and deltas.folder.resolve() == (folder / STORED).resolve():
        files[STORED] = {"sha256": _same(deltas, deltas.folder), "copied": copied}
    else:
        if any((folder / STORED).glob("*")) and not copied:
            raise ValueError(
                f"run: {STORED} in the folder is free for the run's deltas (got those of another run in "
                f"folder={str(folder / STORED)!r}; move them away, or save to another folder)"
            )
        files[STORED] = {"sha256": _copy(deltas, folder / f"{STORED}{NEXT}"), "copied": True}
    if artifact is not None:
        save_artifact(artifact, folder / f"{ARTIFACT}{NEXT}")
        files[ARTIFACT] = {"sha256": artifact.id}
    return files


def _copy(deltas: Sequence[EditDelta], target: Path) -> str:
    if not isinstance(deltas, StoredDeltas):
        stored = StoredDeltas.create(target)
        # A part at a time: there may be more than memory has room for
        for start in range(0, len(deltas), _PER_FILE):
            stored.append([deltas[number] for number in range(start, min(start + _PER_FILE, len(deltas)))])
        return stored.checksum
    target.mkdir()
    for path in deltas.files():
        shutil.copyfile(path, target / path.name)
    return _same(deltas, target)


def _same(deltas: StoredDeltas, folder: Path) -> str:
    """The checksum of deltas, which are those that lie in a folder."""
    there = StoredDeltas(folder)
    if there.request_ids != deltas.request_ids or there.checksum != deltas.checksum:
        raise ValueError(f"run: deltas in files stay as they were written (they changed in {deltas.folder})")
    return there.checksum


def _finish(folder: Path, files: Mapping[str, Mapping[str, Any]], gone: Mapping[str, str]) -> None:
    """Give the files that a run consists of their names, and remove those of the run before."""
    for name, entry in files.items():
        waiting = folder / f"{name}{NEXT}"
        if waiting.exists() and _checksum_of(folder / name, name) != entry["sha256"] == _checksum_of(waiting, name):
            if waiting.is_dir():
                _retire(folder / name)
            waiting.replace(folder / name)
    for name, checksum in gone.items():
        if name not in files and (folder / name).exists() and _checksum_of(folder / name, name) == checksum:
            _retire(folder / name)
    _clear(folder, NEXT)
    _clear(folder, OLD)


def _retire(path: Path) -> None:
    """Take its name from a file or folder, at once however large it is."""
    if path.exists():
        _remove(path.with_name(f"{path.name}{OLD}"))
        path.replace(path.with_name(f"{path.name}{OLD}"))


def _clear(folder: Path, ending: str) -> None:
    for name in (DELTAS, STORED, ARTIFACT):
        _remove(folder / f"{name}{ending}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
