"""The page of a run."""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest

import fastedit
from fastedit.report.run import run_page
from fastedit.requests import Probe
from tests.report.conftest import HOSTILE, record_of, some_requests


def text_of(page: str) -> str:
    """What a reader sees of a page."""
    body = re.sub(r"<(style|script)[^>]*>.*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", body)).split())


def test_the_headline_says_what_was_edited_how_well_and_how_fast() -> None:
    text = text_of(run_page(record_of(some_requests(), failing=[1])))
    assert "3 of 4 edits of pocket-llava hold, made by odedit+lora" in text
    assert "3 of 4 edits (75%) got the new answer; before the edit 0 did" in text
    assert "Of 20 other questions that must be answered as before, 19 (95.0%) were" in text
    assert "Editing took 2.5 s, 4.25 edits a second, on Some CPU (2 threads)" in text
    assert "low-rank adaptation (LoRA)" in text


def test_a_small_models_utilisation_is_not_shown_as_a_number() -> None:
    record = record_of(some_requests())
    assert "3.2 %" not in text_of(run_page(record))
    record["provenance"]["model"]["parameters"] = 7_000_000_000
    assert "necessary-FLOP utilisation (NFU) : 3.2 %" in text_of(run_page(record))


def test_untrusted_text_stays_text() -> None:
    requests = [replace(each, prompt=HOSTILE, target=HOSTILE, rephrase=HOSTILE, id=HOSTILE) for each in some_requests()]
    record = record_of(requests, failing=[0])
    record["provenance"]["model"]["name"] = HOSTILE
    record["provenance"][HOSTILE] = {HOSTILE: HOSTILE}
    record["provenance"]["method"] = HOSTILE
    page = run_page(record, requests)
    assert page.count("<script") == 1
    assert "<img" not in page
    assert "49" not in text_of(page)
    assert HOSTILE in text_of(page)


def test_a_page_of_many_large_edits_is_bounded_and_says_so() -> None:
    probes = tuple(Probe("same", f"Is it {n}?" + "&" * 5000) for n in range(200))
    requests = [replace(each, prompt="&" * 9000, probes=probes) for each in some_requests(3)] * 100
    record = record_of(requests, failing=range(250))
    page = run_page(record, requests)
    assert len(page) < 12 * 2**20
    assert "48 of 300 edits shown" in text_of(page)
    assert page.count('<article class="card"') == 48


def test_a_run_that_ended_early_or_was_not_scored_says_so() -> None:
    record = record_of(some_requests())
    record["provenance"]["finished"] = {"edits": [0, 1, 2, 3], "of": 9}
    assert "The run ended early: 4 of 9 edits are finished" in text_of(run_page(record))
    for edit in record["edits"]:
        del edit["answers"]
    record["scores"] = {}
    requests = some_requests()
    text = text_of(run_page(record, requests))
    assert "4 edits of pocket-llava by odedit+lora, not scored" in text
    assert requests[0].prompt in text


def test_a_sequence_has_its_forgetting_curve() -> None:
    page = run_page(record_of(some_requests(), checkpoints=True))
    assert "<svg" in page
    assert "How edits hold while others follow" in page
    assert "<svg" not in run_page(record_of(some_requests()))


def test_a_run_without_any_provenance_has_a_page() -> None:
    record = record_of(some_requests())
    record["provenance"] = {}
    assert "an unknown model" in text_of(run_page(record))


def test_saving_a_run_writes_its_page(run_of_three: fastedit.Run, tmp_path: Path) -> None:
    run_of_three.save(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert page.count('<article class="card"') == 3
    assert "background-image:url(data:image/png" in page
    again = fastedit.Run.load(tmp_path)
    again.save(tmp_path / "again")
    assert "background-image" not in (tmp_path / "again" / "report.html").read_text()


def test_a_page_that_cannot_be_written_loses_no_run(
    run_of_three: fastedit.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("fastedit.report.write_page", full)
    with pytest.warns(RuntimeWarning, match=r"run: it is saved in .*, but its page report.html could not be written"):
        run_of_three.save(tmp_path)
    assert len(fastedit.Run.load(tmp_path).deltas) == 3
