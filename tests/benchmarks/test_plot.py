"""Figures come from rows, only the newest of each, and the page needs no other file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from typer import Typer
from typer.testing import CliRunner

from benchmarks import canvas, plot, record, report
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


def texts(rows: list[Row], name: str, *, headlines: bool = False) -> list[str]:
    (axes,) = plot.figures_of(rows)[name].axes
    return [text.get_text() for text in axes.texts if (text.get_gid() == "headline") == headlines]


def test_bars_carry_ratios_of_the_newest_rows() -> None:
    rows = run("a", engine=12.0, day=1) + run("a", engine=14.0, day=2)
    assert texts(rows, "speed") == ["14  (7x)", "2"]
    assert texts(rows, "memory") == ["900", "900"]
    assert texts(rows, "speed", headlines=True) == ["a"]


def test_bars_are_of_the_newest_dozen_and_no_values_of_a_sweep() -> None:
    # Day and case number rise together; the oldest two are left out
    rows = [replace(r, time=f"2026-01-{k + 10}T00:00:00+00:00") for k in range(14) for r in run(f"case {k}")]
    rows += run("swept/layers=1", day=9) + run("endurance(x)/tenth=1", day=9)
    assert texts(rows, "speed", headlines=True) == [f"case {k}" for k in range(2, 14)]
    assert texts(rows, "phases", headlines=True) == [f"case {k}" for k in range(2, 14)]


def test_long_names_keep_both_ends() -> None:
    found = canvas.short("beginning-" + "x" * 100 + "-end", 30)
    assert len(found) == 30
    assert found.startswith("beginning-")
    assert found.endswith("-end")
    assert canvas.short("as it is", 30) == "as it is"


def test_rows_of_ops_are_not_drawn() -> None:
    op = row(case="risk", implementation="fastedit", metric="run_s", unit="s", config={"shape": "large"})
    assert plot.figures_of([op]) == {}
    assert set(plot.figures_of([op, *run("a")])) == {"speed", "phases", "memory"}


def test_phases_add_up_to_the_run() -> None:
    # 0.3 s and 2 s over 4 edits
    assert texts(run("a"), "phases") == ["75", "500"]
    (axes,) = plot.figures_of(run("a"))["phases"].axes
    widths = [bar.get_width() for bar in axes.patches]
    assert sorted(widths) == sorted([37.5, 18.75, 18.75, 250.0, 125.0, 125.0])


def one(case: str, metric: str, value: float, unit: str = "1", implementation: str = "engine", **config: Any) -> Row:
    shared = {"config": {"edits": 4, **config}, "p20": value, "p80": value, "value": value}
    return row(case=case, implementation=implementation, metric=metric, unit=unit, **shared)


def lines(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    return {str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def test_sweeps_become_curves_of_speed_and_memory() -> None:
    rows = run("a/batch_size=1", batch=1) + run("a/batch_size=8", batch=8, engine=20.0)
    rows += [one(f"a/batch_size={n}", "working_memory_mib", 10.0 * n, "MiB") for n in (1, 8)]
    figures = plot.figures_of(rows)
    (axes,) = figures["scaling-a-batch_size"].axes
    assert lines(axes)["engine"] == ([1.0, 8.0], [12.0, 20.0])
    (axes,) = figures["memory-a-batch_size"].axes
    assert lines(axes)["engine, working"] == ([1.0, 8.0], [10.0, 80.0])
    assert lines(axes)["plain_loop, peak"] == ([1.0, 8.0], [900.0, 900.0])


def test_nfu_stands_below_the_speed() -> None:
    rows = [r for n in (1, 8) for r in [*run(f"a/layers={n}"), one(f"a/layers={n}", "nfu", 0.1 * n)]]
    above, below = plot.figures_of(rows)["scaling-a-layers"].axes
    assert set(lines(above)) == {"engine", "plain_loop"}
    assert lines(below) == {"engine": ([1.0, 8.0], [0.1, 0.8])}


def test_models_stand_at_their_size() -> None:
    rows = []
    for name, size in (("random:qwen2vl-77m", 77e6), ("random:llava-tiny", 1e5)):
        rows += [*run(f"a/model={name}"), one(f"a/model={name}", "parameters", size, implementation="machine")]
    (axes,) = plot.figures_of(rows)["scaling-a-model"].axes
    assert lines(axes)["engine"][0] == [1e5, 77e6]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["llava-tiny 100k", "qwen2vl-77m 77M"]
    # Without sizes there is no axis to stand on
    assert "scaling-a-model" not in plot.figures_of([r for r in rows if r.metric != "parameters"])


def test_sweeps_over_names_become_bars() -> None:
    rows = run("a/method=ft", engine=8.0) + run("a/method=lora", engine=16.0)
    assert texts(rows, "sweep-a-method", headlines=True) == ["ft", "lora"]
    assert texts(rows, "sweep-a-method") == ["8  (4x)", "2", "16  (8x)", "2"]


def test_roofline_tells_the_rate_and_where_the_time_went() -> None:
    rows = [*run("a"), one("a", "nfu", 0.25)]
    for metric, unit in (("matmul_peak_gflop_per_s", "GFLOP/s"), ("copy_bandwidth_gib_per_s", "GiB/s")):
        rows.append(one("a", metric, 200.0, unit, implementation="machine"))
    left, right = plot.figures_of(rows)["roofline"].axes
    assert [text.get_text() for text in left.texts] == ["a", "50 of 200: NFU 0.25\ncopies 200.0 GiB/s"]
    assert [bar.get_width() for bar in left.patches] == [200.0, 50.0]
    # Of 0.3 s: prefix a quarter of it, backward a half, the rest in no phase
    assert [bar.get_width() for bar in right.patches] == pytest.approx([25.0, 50.0, 25.0])
    assert [text.get_text() for text in right.texts] == ["18.8 ms", "37.5 ms", "18.8 ms"]


def test_variants_are_scaled_by_their_own_edits() -> None:
    rows = run("a")
    singles = [replace(r, implementation="engine/batch=1/edits=2") for r in rows if r.implementation == "engine"]
    # 0.3 s over 4 edits, and over 2
    assert texts(rows + singles, "phases") == ["75", "150", "500"]


def test_long_runs_are_drawn_over_their_edits() -> None:
    rows = []
    for number in range(1, 11):
        case = f"endurance(m,lora,edits=1000)/tenth={number}"
        rows += [one(case, "edits_per_s", 5.0, "edits/s", edits=1000), one(case, "rss_mib", 100.0, "MiB", edits=1000)]
    figures = plot.figures_of([*rows, one("endurance(m,lora,edits=1000)", "edits_per_s", 5.0, "edits/s")])
    assert set(figures) == {"endurance-m-lora-edits-1000"}
    above, below = figures["endurance-m-lora-edits-1000"].axes
    assert list(above.lines[0].get_xdata()) == [50.0 + 100 * k for k in range(10)]
    assert list(below.lines[0].get_xdata()) == [100.0 * k for k in range(1, 11)]


def test_precisions_are_drawn_with_intervals() -> None:
    rows = []
    for name, mean in (("float32", 0.9), ("nf4", 0.5)):
        for metric in ("base_answers", "legacy_reliability", "strict_reliability"):
            for suffix, value in (("", mean), ("_low", mean - 0.1), ("_high", mean + 0.05)):
                rows.append(one(f"precision(m)/precision={name}", metric + suffix, value))
    figure = plot.figures_of(rows)["precision-m"]
    for axes in figure.axes:
        heights = [(float(c.lines[0].get_ydata()[0]), c.lines[2][0].get_segments()[0][:, 1]) for c in axes.containers]
        # float32: unedited answers and reliability; then nf4
        assert [mean for mean, _ in heights] == [0.9, 0.9, 0.5, 0.5]
        assert heights[2][1] == pytest.approx([0.4, 0.55])


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
