"""The page of rows, and the one that joins them with saved runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from benchmarks.report import page, write_joined_page
from tests.benchmarks.test_plot import row
from tests.engine.conftest import make_edits
from tests.report.test_saved import saved


def test_quality_and_speed_stand_on_one_page(tmp_path: Path) -> None:
    for method in ("ft", "lora"):
        saved(tmp_path / "runs" / method, make_edits(3), method=method)
    path = write_joined_page([row()], {}, tmp_path / "runs", tmp_path / "new" / "report.html", make_edits(3))
    text = path.read_text()
    assert "3 edits of pocket-llava, made in 2 ways" in text
    assert "<h2>The engine&#39;s speed beside plain loops</h2>" in text
    assert "edits/s" in text
    assert text.count("background-image:url(") == 3


def test_the_utilisation_of_a_small_model_is_not_shown() -> None:
    rows = [row(), row(metric="nfu", unit="1", value=0.5, p20=0.5, p80=0.5)]
    size = row(implementation="machine", metric="parameters", unit="1")
    large = page([*rows, replace(size, value=7e9, p20=7e9, p80=7e9)], {})
    small = page([*rows, replace(size, value=2e6, p20=2e6, p80=2e6)], {})
    assert "0.500" in large
    assert "NFU is not shown" not in large
    assert "0.500" not in small
    assert "NFU is not shown" in small
