"""``fastedit consolidate``, as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fastedit
from fastedit.cli.main import app
from fastedit.data import write_jsonl
from tests.engine.conftest import make_edits

runner = CliRunner()


def test_all_edits_become_one_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = fastedit.load("random:llava-tiny", dtype="float64")
    write_jsonl(make_edits(2), "edits.jsonl", images=".")
    edits = fastedit.read_edits("edits.jsonl", images=".")
    with fastedit.open_ledger("led", model) as ledger:
        ledger.edit(edits, "lora", mode="single", steps=2, evaluate=False, show_progress=False)
    line = "consolidate peft out --ledger led --batch-size 1 --set steps=1 --set lr=1e-6 --json"
    done = runner.invoke(app, line.split(), catch_exceptions=False)
    assert done.exit_code == 0
    told = json.loads(done.stdout)
    assert (told["edits"], told["steps"], told["kind"], told["folder"]) == ([1, 2], 1, "peft", "out")
    # A step of next to nothing teaches nothing
    assert [(each["edit"], each["target"]) for each in told["lost"]] == [(n, edits[n - 1].target) for n in (1, 2)]
    assert told["lost"][0]["answer"] == model.answer(edits[0].image, edits[0].prompt, max_new_tokens=48)
    fastedit.from_peft(next(Path("out").glob("*/adapter_config.json"), Path("out/adapter_config.json")).parent, model)
    for line, message in (
        ("consolidate records out2 --ledger led", "kind is one of delta, merged, peft"),
        ("consolidate peft out2 --ledger led --method ft", "adapters are of low rank"),
        ("consolidate delta out2 --ledger led --set stpes=3", "stpes"),
        ("consolidate peft out --ledger led", "is new or empty"),
    ):
        with pytest.raises(ValueError, match=message):
            runner.invoke(app, line.split(), catch_exceptions=False)
