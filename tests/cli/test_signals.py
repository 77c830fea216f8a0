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
from tests.cli.commands import MAIN
from tests.engine.conftest import make_edits
from tests.programs import host


@pytest.fixture
def records(tmp_path: Path) -> Path:
    write_jsonl(make_edits(8), tmp_path / "edits.jsonl", images=tmp_path)
    return tmp_path


def stopped(arguments: str, folder: Path, wanted: str, number: signal.Signals) -> subprocess.CompletedProcess[str]:
    """Run a command line until a file matches ``wanted``, then send it a signal."""
    program = host().start(MAIN, *arguments.split(), cwd=folder, name="fastedit")
    end = time.monotonic() + 300
    while not list(folder.glob(wanted)) and program.is_running() and time.monotonic() < end:
        time.sleep(0.02)
    os.kill(program.pid, number)
    return program.wait()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_finished_edits_are_committed_and_the_same_command_goes_on(records: Path, number: signal.Signals) -> None:
    line = (
        "edit --model random:llava-tiny --data edits.jsonl --images . --method lora --batch-size 1 --ledger edits "
        "--set steps=150 --set stop_loss=None"
    )
    done = stopped(line, records, "edits/segments/00000003.safetensors", number)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    with fastedit.open_ledger(records / "edits") as ledger:
        committed = len(ledger)
        assert ledger.verify().sound
    assert 2 <= committed < 8
    told = f"fastedit: stopped; {committed} of 8 edits are committed in edits; the same command goes on from there: "
    assert f"{told}fastedit {line}" in done.stderr
    assert "speed (this machine)" in done.stdout
    assert not (records / "runs").exists()
    done = stopped(f"{line} --json --out out", records, f"edits/segments/{committed + 2:08d}.safetensors", number)
    assert done.returncode == 130, done.stderr
    content = json.loads(done.stdout)
    assert content["there"] == committed
    assert content["new"] >= 1
    assert [edit["edit"] for edit in content["edits"]] == list(range(1, committed + content["new"] + 1))
    run = fastedit.Run.load(records / "out")
    assert len(run.deltas) == len(content["edits"]) < 8
    with fastedit.open_ledger(records / "edits") as ledger:
        committed = len(ledger)
    # A signal may come between a commit and the run's own note of it
    assert committed - len(run.deltas) in (0, 1)
    told = f"{committed} of 8 edits are committed in edits; the same command goes on from there: fastedit {line} "
    assert f"{told}--json --out out --overwrite; they are saved in out as well" in done.stderr


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


def test_without_a_ledger_finished_edits_are_saved_and_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], records: Path
) -> None:
    real = fastedit.edit

    def edit(model: Any, edits: Any, method: str, **settings: Any) -> Any:
        raise RunStopped("stopped", real(model, edits[:2], method, **settings), range(2))

    monkeypatch.setattr(fastedit, "edit", edit)
    monkeypatch.chdir(records)
    line = "edit --model random:llava-tiny --data edits.jsonl --images . --method lora --out out --set steps=1"
    assert run_main(monkeypatch, *line.split()) == 130
    assert len(fastedit.Run.load("out").deltas) == 2
    told = capsys.readouterr()
    assert "fastedit: stopped; 2 of 8 edits are finished and saved in out: fastedit.Run.load('out')" in told.err
    assert "--overwrite begins anew" in told.err
    assert "strict protocol" in told.out
    assert "speed (this machine)" in told.out


def test_before_a_model_is_loaded_a_ledger_says_what_it_has(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], records: Path
) -> None:
    monkeypatch.chdir(records)
    line = "edit --model random:llava-tiny --data edits.jsonl --images . --method lora --ledger led --set steps=1"
    assert run_main(monkeypatch, *line.split(), "--no-evaluate", "--limit", "3") == 0

    def load(*_arguments: Any, **_settings: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fastedit, "load", load)
    assert run_main(monkeypatch, *line.split()) == 130
    told = f"fastedit: stopped; 3 of 8 edits are committed in led; the same command goes on from there: fastedit {line}"
    assert capsys.readouterr().err.splitlines()[-1] == told


@pytest.mark.parametrize("event", ["before", "after"])
def test_a_change_that_is_stopped_is_made_or_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], records: Path, event: str
) -> None:
    monkeypatch.chdir(records)
    line = "edit --model random:llava-tiny --data edits.jsonl --images . --method lora --ledger led --set steps=1"
    assert run_main(monkeypatch, *line.split(), "--no-evaluate", "--limit", "3") == 0
    real = fastedit.Ledger.undo

    def undo(ledger: Any, ids: Any, **settings: Any) -> None:
        if event == "after":
            real(ledger, ids, **settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(fastedit.Ledger, "undo", undo)
    assert run_main(monkeypatch, "undo", "--ledger", "led", "2", "--yes") == 130
    told = "the ledger is as it was" if event == "before" else "what was asked for is done, event 5"
    assert capsys.readouterr().err.splitlines()[-1] == f"fastedit: stopped; {told}"
    with fastedit.open_ledger("led") as ledger:
        assert len(ledger) == (3 if event == "before" else 2)


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
