"""A published row run anew: what holds, what does not, and what cannot be compared."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fastedit
from fastedit import published
from fastedit.backbone import weights_hash
from fastedit.cli.main import app
from fastedit.evaluation import Score
from fastedit.published import Case, Comparison, PublishedRow, case, reproduce, rerun, row_named
from tests.engine.conftest import make_edits

ROW = "single/random:llava-tiny/pocket-vqa/lora"


@pytest.mark.parametrize(
    ("published", "measured", "partial", "holds"),
    [
        (Score(0.5, 0.4, 0.6, 100), 0.6, False, True),
        (Score(0.5, 0.4, 0.6, 100), 0.61, False, False),
        (Score(0.5, 0.4, 0.6, 100), math.nan, False, False),
        # No failure among 100 edits allows a rate of 3/100
        (Score(1.0, 1.0, 1.0, 100), 0.97, False, True),
        (Score(1.0, 1.0, 1.0, 100), 0.96, False, False),
        # Fewer edits: the intervals meet
        (Score(0.5, 0.4, 0.6, 100), 0.65, True, True),
        (Score(0.5, 0.4, 0.6, 100), 0.75, True, False),
    ],
)
def test_what_holds(published: Score, measured: float, partial: bool, holds: bool) -> None:
    given = Score(measured, measured - 0.1, measured + 0.1, 10)
    assert Comparison("reliability", published, given, partial).holds is holds


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch) -> PublishedRow:
    """A row that was measured on three made-up edits just now."""
    edits = make_edits(3)
    monkeypatch.setattr(case, "read_edits", lambda name, *, split, limit: edits[:limit])
    model = fastedit.load("random:llava-tiny")
    run = fastedit.edit(model, edits, "lora", pool=edits, steps=2, show_progress=False)
    measured_case = Case("single", "random:llava-tiny", "pocket-vqa", "lora", settings={"steps": 2}, edits=3)
    measured = PublishedRow(measured_case, run.scores, weights_hash(model.hf), "c" * 12, {})
    publish(monkeypatch, measured)
    return measured


def publish(monkeypatch: pytest.MonkeyPatch, row: PublishedRow) -> None:
    monkeypatch.setattr(rerun, "published_rows", lambda: {row.case.name: row})


def test_a_row_that_was_just_measured_is_reproduced(row: PublishedRow, tmp_path: Path) -> None:
    result = reproduce(ROW, artifacts=tmp_path, show_progress=False)
    assert result.holds
    assert {"reliability", "text_generality", "image_locality"} <= {each.name for each in result.comparisons}
    assert all(each.measured == each.published and not each.partial for each in result.comparisons)
    part = reproduce(ROW, limit=2, artifacts=tmp_path, show_progress=False)
    assert len(part.run.deltas) == 2
    assert all(each.partial for each in part.comparisons)


def test_what_cannot_be_run_anew_is_refused(row: PublishedRow, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"row must name a published row, for example single/random:llava-tiny"):
        row_named("single/random:llava-tiny/pocket-vqa/lora2")
    with pytest.raises(ValueError, match=r"limit must be positive \(got limit=0\)"):
        reproduce(ROW, limit=0)
    publish(monkeypatch, dataclasses.replace(row, weights="0" * 64))
    with pytest.raises(ValueError, match=r"must have the weights that the row was measured on .* the row has 0{12}"):
        reproduce(ROW, show_progress=False)


def test_the_command_says_what_holds_and_ends_so(
    row: PublishedRow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["reproduce", ROW, "--artifacts", str(tmp_path)]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "scores are reproduced (3 of 3 edits" in done.output
    strict = dict(row.scores["strict"])
    strict["reliability"] = Score(0.5, 0.4, 0.6, 3)
    publish(monkeypatch, dataclasses.replace(row, scores={"strict": strict}))
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 1
    assert "not reproduced: reliability" in done.output


def test_the_command_lists_rows(row: PublishedRow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "published_rows", lambda: {row.case.name: row})
    done = CliRunner().invoke(app, ["reproduce"], catch_exceptions=False)
    assert done.exit_code == 0
    assert done.output == f"{ROW}  (3 edits)\n"
