"""Ctrl-C and a request to terminate: what was kept and how to go on, in a sentence, with exit status 130."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import fastedit
from fastedit import RunStopped
from fastedit.cli import main
from fastedit.data import write_jsonl
from tests.engine.conftest import make_edits


@pytest.fixture
def records(tmp_path: Path) -> Path:
    write_jsonl(make_edits(8), tmp_path / "edits.jsonl", images=tmp_path)
    return tmp_path


def stopped(arguments: str, folder: Path, wanted: str, number: signal.Signals) -> subprocess.CompletedProcess[str]:
    """Run a command line until a file matches ``wanted``, then send it a signal."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "fastedit", *arguments.split()],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    end = time.monotonic() + 300
    while not list(folder.glob(wanted)) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_finished_edits_are_saved_and_shown(records: Path, number: signal.Signals) -> None:
    done = stopped(
        "edit --model random:llava-tiny --data edits.jsonl --images . --method lora --batch-size 1 --out out "
        "--ledger edits --set steps=400 --set stop_loss=None",
        records, "edits/segments/00000002.safetensors", number,
    )  # fmt: skip
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    run = fastedit.Run.load(records / "out")
    assert 2 <= len(run.deltas) < 8
    told = f"fastedit: stopped; {len(run.deltas)} of 8 edits are finished and saved in out: fastedit.Run.load('out')"
    assert told in done.stderr
    assert "--overwrite begins anew" in done.stderr
    assert "strict protocol" in done.stdout
    assert "speed (this machine)" in done.stdout


def test_training_says_from_where_it_goes_on(records: Path) -> None:
    command = (
        "train --model random:llava-tiny --data edits.jsonl --images . --method mend --out mend.safetensors "
        "--set layers=1 --set rank=4 --set valid_records=2 --trainer batch_size=2 --trainer checkpoint_every=1 "
        "--trainer valid_every=None --steps {}"
    )
    done = stopped(command.format(100000), records, "mend.safetensors.training", signal.SIGINT)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    told = "stopped; the last checkpoint is kept in mend.safetensors.training, and the same command goes on from it"
    assert f"fastedit: {told}" in done.stderr


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["fastedit", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_before_anything_is_finished_nothing_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def load(*_arguments: Any, **_settings: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fastedit, "load", load)
    out = tmp_path / "out"
    status = run_main(
        monkeypatch, "edit", "--model", "random:llava-tiny", "--limit", "1", "--method", "lora", "--out", str(out)
    )
    assert status == 130
    assert capsys.readouterr().err.splitlines()[-1] == "fastedit: stopped; nothing was kept"
    assert not out.exists()


def test_a_comparison_shows_the_methods_that_are_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    real = fastedit.edit

    def edit(model: Any, edits: Any, method: str, **settings: Any) -> Any:
        run = real(model, edits, method, **settings)
        if method == "lora":
            raise RunStopped("stopped", run, range(len(edits)))
        return run

    monkeypatch.setattr(fastedit, "edit", edit)
    out = tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    write_jsonl(make_edits(2), "edits.jsonl", images=tmp_path)
    line = f"compare --model random:llava-tiny --data edits.jsonl --images . --methods ft,lora,grace --out {out}"
    line += " --set steps=1"
    assert run_main(monkeypatch, *line.split()) == 130
    told = capsys.readouterr()
    assert f"stopped in lora; what was finished is saved in {out}; to go on, compare --methods lora,grace" in told.err
    assert "strict protocol, 2 edits: must change" in told.out
    assert set(json.loads((out / "comparison.json").read_text())["runs"]) == {"ft", "lora (2)"}


def test_a_comparison_that_ends_by_an_error_says_which(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    real = fastedit.edit

    def edit(model: Any, edits: Any, method: str, **settings: Any) -> Any:
        if method == "ft":
            return real(model, edits, method, **settings)
        try:
            raise KeyError("header")
        except KeyError as error:
            raise ValueError("lora: a whole file (got nothing)") from error

    monkeypatch.setattr(fastedit, "edit", edit)
    monkeypatch.chdir(tmp_path)
    write_jsonl(make_edits(2), "edits.jsonl", images=tmp_path)
    line = "compare --model random:llava-tiny --data edits.jsonl --images . --methods ft,lora --out out --set steps=1"
    assert run_main(monkeypatch, *line.split()) == 2
    told = "fastedit: lora ended early: lora: a whole file (got nothing); what was finished is saved in out; to go on"
    assert told in capsys.readouterr().err


def test_a_fault_of_ours_is_short_and_says_how_to_see_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def implementations() -> None:
        raise KeyError("risk")

    monkeypatch.setattr(fastedit, "implementations", implementations)
    monkeypatch.delenv("FASTEDIT_DEBUG", raising=False)
    assert run_main(monkeypatch, "info") == 1
    assert (
        capsys.readouterr().err
        == "fastedit: a fault in fastedit, KeyError: 'risk'; FASTEDIT_DEBUG=1 shows the traceback\n"
    )
    monkeypatch.setenv("FASTEDIT_DEBUG", "1")
    assert run_main(monkeypatch, "info") == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (PermissionError(13, "Permission denied", "/x/y"), "/x/y: Permission denied"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (MemoryError(), "memory ran out; try a smaller --batch-size, auto, or --quantize nf4"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "memory ran out"),
        (
            TypeError("EditRequest: prompt must be text (got prompt=3)"),
            "EditRequest: prompt must be text (got prompt=3)",
        ),
    ],
)
def test_expected_errors_are_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, told: str
) -> None:
    def implementations() -> None:
        raise error

    monkeypatch.setattr(fastedit, "implementations", implementations)
    assert run_main(monkeypatch, "info") == 2
    err = capsys.readouterr().err
    assert err.startswith(f"fastedit: {told}")
    assert len(err.splitlines()) == 1
