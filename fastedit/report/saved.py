"""Runs as they lie in folders, to be looked at: their records, without the deltas."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastedit.files import read_json
from fastedit.report.comparison import comparison_page
from fastedit.report.page import REPORT, Section
from fastedit.report.run import run_page
from fastedit.requests import EditRequest

_RECORD = "scores.json"
_PARTS = ("scores", "checkpoints", "timing", "provenance", "edits")


def run_folders(paths: Sequence[Path]) -> list[Path]:
    """The folders of runs among some folders: each itself, or those in it (as ``fastedit compare`` writes them).

    Raises:
        FileNotFoundError: a folder with no run in it.
    """
    folders: list[Path] = []
    for path in paths:
        inner = [path] if (path / _RECORD).exists() else sorted(each.parent for each in path.glob(f"*/{_RECORD}"))
        if not inner:
            raise FileNotFoundError(f"report: a folder that holds a run, or some that do (got {str(path)!r})")
        folders += [folder for folder in inner if folder not in folders]
    return folders


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a saved run, as ``Run.record()``.

    Raises:
        FileNotFoundError, ValueError: there is none, or not what was written.
    """
    record, _ = read_json(folder / _RECORD, "report")
    missing = [name for name in _PARTS if not isinstance(record.get(name), (dict, list))]
    if missing:
        raise ValueError(f"report: {_RECORD} is complete (got none of {', '.join(missing)} in {str(folder)!r})")
    return record


def labelled(records: Mapping[Path, Mapping[str, Any]]) -> dict[str, Path]:
    """Folders by what their runs are called: the method, else the folder's name, else its path; none of them twice."""
    names = {
        folder: (str(record["provenance"].get("method") or folder.name), folder.resolve().name, str(folder))
        for folder, record in records.items()
    }
    kind = next(kind for kind in range(3) if kind == 2 or len({each[kind] for each in names.values()}) == len(names))
    return {each[kind]: folder for folder, each in names.items()}


def check_requests(records: Mapping[str, Mapping[str, Any]], requests: Sequence[EditRequest]) -> None:
    """Refuse records that are not those that every run edited.

    Raises:
        ValueError: names the run.
    """
    from fastedit.data import fingerprint

    prints: dict[int, str] = {}
    for label, record in records.items():
        data = record["provenance"].get("data", {})
        count = int(data.get("edits", 0))
        if count not in prints:
            prints[count] = fingerprint(requests[:count])
        if len(requests) < count or prints[count] != data.get("fingerprint"):
            raise ValueError(f"report: --data are the records that were edited (got others for the run {label!r})")


def saved_page(
    folders: Sequence[Path], out: Path, requests: Sequence[EditRequest] = (), *, sections: Sequence[Section] = ()
) -> str:
    """The page of saved runs: of one run its own, of several, or with sections of a caller, one that compares.

    Args:
        folders: of runs, or of some. out: the file that the page goes to, for links to the pages of the runs.
        requests: that were edited, for their pictures. sections: to add.
    Raises:
        FileNotFoundError, ValueError: a run that is not there, is not whole, or is of other records.
    """
    read = {folder: read_record(folder) for folder in run_folders(folders)}
    named = labelled(read)
    records = {label: read[folder] for label, folder in named.items()}
    if requests:
        check_requests(records, requests)
    try:
        if len(records) == 1 and not sections:
            return run_page(next(iter(records.values())), requests)
        pages = {label: folder / REPORT for label, folder in named.items()}
        start = out.resolve().parent
        links = {
            label: quote(Path(os.path.relpath(page.resolve(), start)).as_posix())
            for label, page in pages.items()
            if page.exists() and page.resolve() != out.resolve()
        }
        return comparison_page(records, requests, links=links, sections=sections)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"report: {_RECORD} is complete (got {error!r:.200} in one of {', '.join(records)})"
        ) from error
