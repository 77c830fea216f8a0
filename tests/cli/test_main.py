"""The commands, as a user types them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastedit.cli.main import app, parse_settings
from fastedit.data import write_jsonl
from tests.engine.conftest import make_edits

runner = CliRunner()


@pytest.fixture
def records(tmp_path: Path) -> Path:
    path = tmp_path / "edits.jsonl"
    write_jsonl(make_edits(3), path, images=tmp_path)
    return path


def run(*args: str) -> str:
    done = runner.invoke(app, list(args), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_edit_writes_scores_and_deltas(records: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    text = run(
        "edit", "--model", "random:llava-tiny", "--data", str(records), "--images", str(records.parent),
        "--method", "lora", "--out", str(out), "--set", "steps=3", "--set", "rank=2",
    )  # fmt: skip
    assert "strict protocol" in text
    data = json.loads((out / "scores.json").read_text())
    assert data["provenance"]["config"]["method"]["rank"] == 2
    assert len(data["edits"]) == 3
    assert (out / "deltas.safetensors").stat().st_size > 0


def test_compare_writes_a_table_a_record_and_a_picture(records: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    text = run(
        "compare", "--model", "random:llava-tiny", "--data", str(records), "--images", str(records.parent),
        "--methods", "ft,odedit+lora", "--out", str(out),
    )  # fmt: skip
    assert "comparison.png" in text
    record = json.loads((out / "comparison.json").read_text())
    assert set(record["runs"]) == {"ft", "odedit+lora"}
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_plan_lists_the_parts_without_a_model(records: Path) -> None:
    text = run("plan", "--model", "random:llava-1.5-7b", "--method", "ft", "--batch-size", "4", "--dtype", "bfloat16")
    assert "weights" in text
    assert "delta rows" in text
    assert "needs" in text
    small = run(
        "plan", "--model", "random:llava-tiny", "--data", str(records), "--images", str(records.parent),
        "--batch-size", "auto", "--set", "rank=2",
    )  # fmt: skip
    assert "batch size 3" in small


def test_edit_says_first_what_it_will_take(records: Path, tmp_path: Path) -> None:
    done = runner.invoke(app, [
        "edit", "--model", "random:llava-tiny", "--data", str(records), "--images", str(records.parent),
        "--method", "ft", "--out", str(tmp_path / "out"), "--set", "steps=1", "--set", "seed=3", "--batch-size", "2",
    ])  # fmt: skip
    assert done.exit_code == 0, done.output
    line = done.stderr.splitlines()[0]
    assert line.startswith("random:llava-tiny, batch size 2: needs ")
    assert "; you have " in line
    assert "needs" not in done.stdout


@pytest.mark.parametrize("size", ["0", "-1", "many", "1.5"])
def test_batch_sizes_are_numbers_or_auto(size: str, records: Path) -> None:
    done = runner.invoke(app, ["edit", "--data", str(records), "--batch-size", size])
    assert isinstance(done.exception, ValueError)
    assert str(done.exception) == f"--batch-size: a number of at least 1, or auto (got {size!r})"


def test_check_reports_on_records(records: Path) -> None:
    assert "3 records read" in run("check", str(records), "--images", str(records.parent))


def test_info_names_kernels_and_methods() -> None:
    text = run("info")
    assert "risk" in text
    assert "odedit+lora" in text


def test_a_refused_input_is_one_message(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "What?", "target": ""}\n{"prompt": 3, "target": "x"}\n')
    done = subprocess.run(
        [sys.executable, "-m", "fastedit", "check", str(path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "target" in done.stderr
    assert "prompt" in done.stderr


def test_settings_are_read_as_values() -> None:
    parsed = parse_settings(["steps=3", "lr=1e-3", 'names=["up"]', "penalty=paper", "clip=null"])
    assert parsed == {"steps": 3, "lr": 1e-3, "names": ("up",), "penalty": "paper", "clip": None}
    with pytest.raises(ValueError, match=r"--set: field=value \(got 'steps'\)"):
        parse_settings(["steps"])
