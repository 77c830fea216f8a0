"""Figures come from rows, only the newest of each, and the page needs no other file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from typer import Typer
from typer.testing import CliRunner

from benchmarks import plot, record, report
from benchmarks.record import Row
from tests.benchmarks.test_record import row


def run(case: str, *, engine: float = 12.0, batch: int = 4, day: int = 1) -> list[Row]:
    shared = {"case": case, "config": {"edits": 4, "batch_size": batch}, "time": f"2026-01-0{day}T00:00:00+00:00"}
    base = row(**shared)
    fast = record.with_ratio(row(**shared, implementation="engine", value=engine, p20=engine, p80=engine), base)
    extra = []
    for name, total in (("plain_loop", 2.0), ("engine", 0.3)):
        for metric, value in (("run_s", total), ("phase_backward_s", total / 2), ("phase_prefix_s", total / 4)):
            extra.append(row(**shared, implementation=name, metric=metric, unit="s", value=value, p20=value, p80=value))
        extra.append(
            row(**shared, implementation=name, metric="peak_memory_mib", unit="MiB", value=900.0, p20=900.0, p80=900.0)
        )
    return record.check([base, fast, *extra])


def texts(rows: list[Row], name: str) -> list[str]:
    (axes,) = plot.figures_of(rows)[name].axes
    return [text.get_text() for text in axes.texts]


def test_bars_carry_ratios_of_the_newest_rows() -> None:
    rows = run("a", engine=12.0, day=1) + run("a", engine=14.0, day=2)
    assert texts(rows, "speed") == ["7.0x", ""]
    assert texts(rows, "memory") == ["900", "900"]


def test_phases_add_up_to_the_run() -> None:
    # 0.3 s and 2 s over 4 edits
    assert texts(run("a"), "phases") == ["75", "500"]
    (axes,) = plot.figures_of(run("a"))["phases"].axes
    widths = [bar.get_width() for bar in axes.patches]
    assert sorted(widths) == sorted([37.5, 18.75, 18.75, 250.0, 125.0, 125.0])


def test_sweeps_become_curves() -> None:
    rows = run("a/batch_size=1", batch=1) + run("a/batch_size=8", batch=8, engine=20.0)
    (axes,) = plot.figures_of(rows)["scaling-a-batch_size"].axes
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    assert lines["engine"] == ([1.0, 8.0], [12.0, 20.0])


def test_command_writes_pictures_and_a_page(tmp_path: Path) -> None:
    rows = record.append(run("a<b>"), tmp_path / "rows.jsonl")
    app = Typer()
    app.command()(plot.main)
    result = CliRunner().invoke(app, [str(rows), "--out", str(tmp_path / "f"), "--html", str(tmp_path / "p.html")])
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "f").iterdir()} == {"speed.png", "phases.png", "memory.png"}
    text = (tmp_path / "p.html").read_text()
    assert "a&lt;b&gt;" in text
    assert "<b>" in text
    assert "src=" not in text
    assert 'href="http' not in text.replace("http://www.w3.org", "").replace("http://creativecommons", "")
    assert "6.00" in text


def test_broken_rows_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n")
    app = Typer()
    app.command()(plot.main)
    result = CliRunner().invoke(app, [str(path)])
    assert result.exit_code == 1
    assert "case is missing" in result.output


def test_rows_without_data_make_no_figures() -> None:
    assert plot.figures_of([row(metric="load_s", unit="s")]) == {}


def test_page_lists_provenance() -> None:
    rows = run("a")
    text = report.page([replace(r, commit="feed") for r in rows], plot.figures_of(rows))
    assert "feed" in text
    assert "torch 2" in text
