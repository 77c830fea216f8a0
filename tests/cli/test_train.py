"""``fastedit train`` from the command line."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import fastedit
from fastedit.cli.main import app
from fastedit.cli.train import MOST_ROWS, shown, validation_table
from fastedit.training import Artifact
from tests.engine.conftest import make_edits


def trained(steps: int) -> Artifact:
    history = [{"score": step / 100, "near": 0.5, "step": step} for step in range(1, steps + 1)]
    return Artifact("mend", "m", {}, {}, {"validation": history, "best": history[1], "steps": steps, "seconds": 2.0})


def test_the_table_shows_the_first_the_kept_and_the_last_scores() -> None:
    artifact = trained(30)
    found = [entry["step"] for entry in shown(artifact.metrics["validation"], artifact.metrics["best"])]
    assert found == [1, 2, *range(25, 31)]
    assert len(found) <= MOST_ROWS
    few = trained(3)
    assert shown(few.metrics["validation"], few.metrics["best"]) == few.metrics["validation"]
    stream = io.StringIO()
    Console(file=stream, width=80).print(validation_table(artifact))
    text = stream.getvalue()
    assert "2 *" in text
    assert "50.0" in text
    Console(file=stream).print(validation_table(Artifact("mend", "m", {}, {})))


def test_training_and_editing_with_what_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = fastedit.load
    asked: list[dict[str, Any]] = []

    def read(*_args: Any, **settings: Any) -> list[Any]:
        asked.append(settings)
        return make_edits(6)

    monkeypatch.setattr(fastedit, "read_edits", read)
    monkeypatch.setattr(fastedit, "load", lambda _name, **settings: real("random:llava-tiny", **settings))
    path = tmp_path / "mend.safetensors"
    settings = ["--set", "layers=1", "--set", "rank=4", "--set", "valid_records=2"]
    arguments = ["--method", "mend", "--out", str(path), "--steps", "2", "--trainer", "batch_size=2", *settings]
    app(["train", *arguments], standalone_mode=False)
    told = capsys.readouterr().out
    assert "mend: held-out records" in told
    assert "2 steps in" in told
    assert asked[0]["split"] == "train"
    artifact = fastedit.load_artifact(path)
    assert artifact.metrics["trainer"]["steps"] == 2
    assert artifact.metrics["trainer"]["batch_size"] == 2
    edited = tmp_path / "run"
    arguments = ["--method", "mend", "--artifact", str(path), "--out", str(edited), *settings]
    app(["edit", *arguments], standalone_mode=False)
    assert (edited / "scores.json").exists()
