"""Pages of runs that lie in folders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastedit import EditRequest
from fastedit.data import fingerprint
from fastedit.files import write_json
from fastedit.report import Section, saved_page
from fastedit.report.saved import labelled, read_record, run_folders
from tests.report.conftest import record_of, some_requests


def saved(folder: Path, requests: list[EditRequest], **options: Any) -> Path:
    folder.mkdir(parents=True)
    record = record_of(requests, **options)
    record["provenance"]["data"] = {"edits": len(requests), "fingerprint": fingerprint(requests)}
    write_json(folder / "scores.json", record)
    return folder


def test_runs_are_read_and_compared_with_links_to_their_pages(tmp_path: Path) -> None:
    a = saved(tmp_path / "runs" / "a b", some_requests(), failing=[1])
    b = saved(tmp_path / "runs" / "ft", some_requests(), method="ft")
    (a / "report.html").write_text("a page")
    page = saved_page([a, b], tmp_path / "report.html", some_requests())
    assert 'href="runs/a%20b/report.html"' in page
    assert page.count("href=") == 1
    assert page.count("background-image:url(") == 4
    assert saved_page([tmp_path / "runs"], tmp_path / "report.html", some_requests()) == page


def test_one_run_has_its_own_page_unless_there_are_sections(tmp_path: Path) -> None:
    run = saved(tmp_path / "a", some_requests())
    assert "Where the time went" in saved_page([run], tmp_path / "report.html")
    page = saved_page([run], tmp_path / "report.html", sections=[Section("Speed beside loops", "<p>fast</p>")])
    assert "<h2>Speed beside loops</h2>\n<p>fast</p>" in page


def test_runs_are_called_by_method_folder_or_path_none_of_them_twice(tmp_path: Path) -> None:
    def labels(*folders: Path) -> list[str]:
        return list(labelled({folder: read_record(folder) for folder in folders}))

    a, b = (saved(tmp_path / name / "run", some_requests(), method="ft") for name in "ab")
    c = saved(tmp_path / "c", some_requests(), method="lora")
    assert labels(a, c) == ["ft", "lora"]
    d = saved(tmp_path / "d", some_requests(), method="ft")
    assert labels(a, d) == ["run", "d"]
    assert labels(a, b, c) == [str(a), str(b), str(c)]
    assert run_folders([a, a]) == [a]


def test_other_records_than_those_that_were_edited_are_refused(tmp_path: Path) -> None:
    run = saved(tmp_path / "a", some_requests())
    longer = some_requests(6)
    assert "background-image:url(" in saved_page([run], tmp_path / "report.html", longer)
    other = [replace(longer[0], target="other"), *longer[1:]]
    with pytest.raises(ValueError, match=r"records that were edited \(got others for the run 'odedit.lora'"):
        saved_page([run], tmp_path / "report.html", other)
    with pytest.raises(ValueError, match="--data are the records"):
        saved_page([run], tmp_path / "report.html", longer[:2])


def test_what_is_no_whole_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"report: a folder that holds a run, or some that do \(got .*nothing"):
        saved_page([tmp_path / "nothing"], tmp_path / "report.html")
    run = saved(tmp_path / "a", some_requests())
    content = json.loads((run / "scores.json").read_text())
    (run / "scores.json").write_text(json.dumps({**content, "edits": []}))
    with pytest.raises(ValueError, match="the content is what was written"):
        read_record(run)
    record = record_of(some_requests())
    del record["edits"]
    write_json(run / "scores.json", record)
    with pytest.raises(ValueError, match=r"report: scores.json is complete \(got none of edits"):
        read_record(run)
    write_json(run / "scores.json", record | {"edits": [{"id": "x", "answers": [{"score": "near"}]}]})
    with pytest.raises(ValueError, match=r"report: scores.json is complete \(got KeyError"):
        saved_page([run], tmp_path / "report.html")
