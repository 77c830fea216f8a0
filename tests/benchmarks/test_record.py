"""Rows: what is refused, and that files only ever grow."""

from __future__ import annotations

import gzip
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import record
from benchmarks.record import Row, RowError


def row(**changes: Any) -> Row:
    base = Row(
        case="c",
        implementation="plain_loop",
        metric="edits_per_s",
        unit="edits/s",
        value=2.0,
        p20=1.5,
        p80=2.5,
        baseline=None,
        ratio=None,
        config={"model": "m"},
        machine={"cpu": "A CPU", "threads": 2},
        versions={"torch": "2"},
        commit="abc",
        seed=0,
        time="2026-01-02T03:04:05+00:00",
    )
    return replace(base, **changes)


def pair() -> list[Row]:
    base = row()
    return [base, record.with_ratio(row(implementation="engine", value=12.0, p20=11.0, p80=13.0), base)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value": float("nan")}, "value is a finite number"),
        ({"value": -1.0}, "value is a finite number"),
        ({"value": True}, "value is a finite number"),
        ({"value": 3.0}, "p20 <= value <= p80"),
        ({"metric": "speed"}, "metric is one of edits_per_s"),
        ({"metric": "phase_Tail_s", "unit": "s"}, "metric is one of"),
        ({"unit": "1/s"}, "unit of edits_per_s is 'edits/s'"),
        ({"metric": "phase_prefix_s"}, "unit of phase_prefix_s is 's'"),
        ({"ratio": 2.0}, "baseline and ratio go together"),
        ({"baseline": "plain_loop", "ratio": 2.0}, "baseline names another implementation"),
        ({"baseline": "peft", "ratio": 0.0}, "ratio is a finite number above 0"),
        ({"case": ""}, "case is text"),
        ({"config": "m"}, "config is a mapping"),
        ({"seed": 1.5}, "seed is an integer"),
        ({"time": "yesterday"}, "time is ISO 8601"),
        ({"time": "2026-01-02T03:04:05"}, "time is in UTC"),
        ({"time": "2026-01-02T03:04:05+01:00"}, "time is in UTC"),
    ],
)
def test_unsound_rows_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        record.check([row(**changes)])


def test_every_problem_is_named_at_once() -> None:
    with pytest.raises(RowError) as error:
        record.check([row(case=""), row(seed="1", config=3)])
    for part in ("row 0: case is text", "row 1: config is a mapping", "row 1: seed is an integer"):
        assert part in str(error.value)


def test_missing_and_unknown_fields_are_named() -> None:
    data = asdict(row()) | {"speed": 1}
    del data["unit"]
    with pytest.raises(RowError, match="unit is missing; speed is not a field"):
        record.from_plain(data)


def test_a_ratio_needs_its_baseline() -> None:
    base, engine = pair()
    assert record.check([base, engine])[1].ratio == 6.0
    with pytest.raises(RowError, match="a ratio needs its baseline's row of the same run"):
        record.check([engine])
    for other in ({"config": {"model": "n"}}, {"time": "2026-01-02T03:04:06+00:00"}, {"seed": 1}, {"commit": "d"}):
        with pytest.raises(RowError, match="a ratio needs its baseline's row"):
            record.check([replace(base, **other), engine])
    with pytest.raises(RowError, match="ratio is value / baseline value"):
        record.check([base, replace(engine, ratio=7.0)])
    with pytest.raises(RowError, match="1 doubles"):
        record.check([base, engine, engine])


@pytest.mark.parametrize("name", ["cpu.jsonl", "cpu.jsonl.gz"])
def test_files_only_grow(tmp_path: Path, name: str) -> None:
    path = tmp_path / "results" / name
    record.append(pair(), path)
    first = path.read_bytes()
    record.append([replace(r, time="2026-01-03T03:04:05+00:00") for r in pair()], path)
    assert path.read_bytes().startswith(first)
    assert record.read(path) == pair() + [replace(r, time="2026-01-03T03:04:05+00:00") for r in pair()]
    with pytest.raises(RowError):
        record.append([*pair(), row(value=-1)], path)
    with pytest.raises(ValueError, match="at least one row"):
        record.append([], path)
    assert len(record.read(path)) == 4


def test_compressed_rows_are_lines_and_a_cut_archive_is_refused(tmp_path: Path) -> None:
    path = record.append(pair(), tmp_path / "cpu.jsonl.gz")
    assert [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()] == [asdict(r) for r in pair()]
    whole = path.read_bytes()
    for wrong in (whole[:-1], whole + whole[: len(whole) // 2], whole[:40] + b"0000" + whole[44:], b"rows"):
        path.write_bytes(wrong)
        with pytest.raises(RowError, match=r"cpu.jsonl.gz: a whole gzip archive"):
            record.read(path)


def test_json_lists_read_back(tmp_path: Path) -> None:
    path = record.write_json(pair(), tmp_path / "rows.json")
    assert isinstance(json.loads(path.read_text()), list)
    assert record.read(path) == pair()


def test_reader_names_every_broken_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(asdict(row())), "{", json.dumps(asdict(row(unit="x"))), "3"]
    path.write_text("\n".join(lines))
    with pytest.raises(RowError) as error:
        record.read(path)
    for part in ("rows.jsonl", "line 2: not JSON", "row 3: unit of edits_per_s", "row 4: a row is a mapping"):
        assert part in str(error.value)


def test_spread_is_median_and_percentiles() -> None:
    assert record.spread([5.0, 1.0, 3.0, 2.0, 4.0]) == (3.0, pytest.approx(1.8), pytest.approx(4.2))
    assert record.spread([7.0]) == (7.0, 7.0, 7.0)


def test_device_names_are_file_names() -> None:
    assert record.device_name({"cpu": "AMD EPYC(TM) 9B45", "threads": 2}) == "amd-epyc-tm-9b45-2-threads"
    assert record.device_name({"gpu": "NVIDIA H200", "cpu": "x"}) == "nvidia-h200"


def test_commit_is_marked_when_the_tree_differs(tmp_path: Path) -> None:
    import subprocess

    def git(*words: str) -> None:
        names = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *names, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    rows = tmp_path / "benchmarks" / "results" / "cpu.jsonl"
    rows.parent.mkdir(parents=True)
    rows.write_text("1")
    (tmp_path / "a").write_text("1")
    git("add", "a", "benchmarks")
    git("commit", "-m", "First")
    assert record.commit_with_changes("abc", tmp_path) == "abc"
    rows.write_text("2")
    assert record.commit_with_changes("abc", tmp_path) == "abc"
    (tmp_path / "a").write_text("2")
    assert record.commit_with_changes("abc", tmp_path) == "abc+changes"
    assert record.commit_with_changes("", tmp_path) == ""
