"""The commands, as a user types them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import fastedit
from fastedit.cli.failures import Ended
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
        "--log-json", str(tmp_path / "log.jsonl"),
    )  # fmt: skip
    assert "strict protocol" in text
    assert "answers before and after" in text
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    last = next(entry for entry in log if entry["label"] == "editing" and entry["event"] == "end")
    assert (last["done"], last["total"]) == (3, 3)
    assert last["planned_mib"] > 0
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
    page = (out / "report.html").read_text()
    assert page.count('<article class="card"') == 3
    links = re.findall(r'href="([^"]+)"', page)
    assert links == ["ft/report.html", "odedit-lora/report.html"]
    assert all((out / link).exists() for link in links)


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
        [sys.executable, "-m", "fastedit", "check", str(path)], capture_output=True, text=True, timeout=600, check=False
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


def asked(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of ``fastedit.load`` and ``fastedit.edit`` that a command line comes to."""
    calls: list[dict[str, Any]] = []
    real = fastedit.load

    def load(_name: str, **settings: Any) -> Any:
        calls.append(settings)
        return real("random:llava-tiny", **settings)

    def edit(_model: Any, _edits: Any, method: str, **settings: Any) -> None:
        calls.append({"method": method, **settings})
        raise KeyboardInterrupt

    monkeypatch.setattr(fastedit, "load", load)
    monkeypatch.setattr(fastedit, "edit", edit)
    done = runner.invoke(app, list(arguments))
    assert isinstance(done.exception, Ended), done.exception
    return calls[0], calls[1]


def test_every_option_reaches_the_library(records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = tmp_path / "pool.jsonl"
    write_jsonl(make_edits(5)[3:], pool, images=tmp_path)
    given = ["--model", "random:llava-tiny", "--data", str(records), "--images", str(records.parent)]
    loading, edit = asked(
        monkeypatch, "edit", *given, "--method", "odedit+lora", "--mode", "sequential", "--score-at", "1,2",
        "--conflicts", "last", "--views", "record", "--no-near", "--seed", "7", "--no-evaluate", "--pool", str(pool),
        "--template", "Q: {} A:", "--out", str(tmp_path / "out"),
        "--overwrite", "--batch-size", "2", "--set", "rank=2",
    )  # fmt: skip
    assert loading == {"dtype": "auto", "quantize": "none", "template": "Q: {} A:"}
    assert [record.prompt for record in edit.pop("pool")] == [record.prompt for record in make_edits(5)[3:]]
    assert edit == {
        "engine": None, "workers": None, "resources": None,
        "method": "odedit+lora", "mode": "sequential", "score_at": (1, 2), "conflicts": "last", "views": "record",
        "near": False, "seed": 7, "evaluate": False, "batch_size": 2, "ledger": None, "rank": 2, "artifact": None,
    }  # fmt: skip
    _, edit = asked(monkeypatch, "edit", *given, "--set", "seed=3", "--set", "evaluate=false", "--out", str(tmp_path))
    assert (edit["seed"], edit["evaluate"], edit["pool"]) == (3, False, None)
    _, edit = asked(
        monkeypatch, "compare", *given, "--methods", "ft", "--seed", "7", "--no-near", "--views", "record",
        "--conflicts", "last", "--pool", str(pool), "--out", str(tmp_path / "c"),
    )  # fmt: skip
    assert len(edit.pop("pool")) == 2
    assert (edit["seed"], edit["near"], edit["views"], edit["conflicts"]) == (7, False, "record", "last")


def test_a_run_is_overwritten_only_where_that_is_asked_for(records: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = ["--model", "random:llava-tiny", "--data", str(records), "--images", str(records.parent), "--out", str(out)]
    given += ["--set", "steps=1", "--no-evaluate", "--method"]
    run("edit", *given, "ft")
    done = runner.invoke(app, ["edit", *given, "lora"])
    assert isinstance(done.exception, ValueError)
    assert "on the command line with --overwrite" in str(done.exception)
    assert fastedit.Run.load(out).provenance["method"] == "ft"
    run("edit", *given, "lora", "--overwrite")
    assert fastedit.Run.load(out).provenance["method"] == "lora"


def test_settings_are_typed_once_and_as_python_or_json_spells_them() -> None:
    assert parse_settings(["a=None", "b=True", "c=false", "d=[1, 2]", "e= 3 "]) == {
        "a": None, "b": True, "c": False, "d": (1, 2), "e": 3,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"--trainer: a field is given once \(got lr again in 'lr=2'\)"):
        parse_settings(["lr=1", "lr=2"], "--trainer")
