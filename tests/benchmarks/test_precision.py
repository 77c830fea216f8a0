"""The same edits at several precisions: what is asked, what is stored, what is refused."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer import Typer
from typer.testing import CliRunner

import fastedit
from benchmarks import precision, record
from benchmarks.cases import made_up_edits, made_up_image
from fastedit.requests import EditRequest, Probe


def run(*words: str) -> Any:
    app = Typer()
    app.command()(precision.main)
    return CliRunner().invoke(app, list(words))


def test_precisions_are_scored_and_stored(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    words = ["--precisions", "float32,bfloat16", "--edits", "2", "--records", "3", "--json", str(path)]
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert "after an edit, strict" in result.output
    assert "minus float32 on the same edits" in result.output
    rows = {(row.config["precision"], row.metric): row.value for row in record.read(path)}
    # The embedded model gives every recorded answer
    assert rows["float32", "base_prediction"] == rows["float32", "base_answers"] == 1.0
    assert rows["float32", "strict_reliability"] > 0.4
    for name in ("float32", "bfloat16"):
        for score in ("legacy_reliability", "strict_text_locality", "strict_near", "legacy_same"):
            assert 0 <= rows[name, f"{score}_low"] <= rows[name, score] <= rows[name, f"{score}_high"] <= 1
    cases = {row.case for row in record.read(path)}
    assert cases == {f"precision(pocket-llava,lora,edits=2)/precision={name}" for name in ("float32", "bfloat16")}


def test_wrong_answers_count(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (replace(edit, prediction="red") for edit in made_up_edits(2))
    asked = len(precision.unedited(first))
    assert asked == 5

    class Parrot:
        def generate(self, queries: list[Any], **_options: Any) -> list[str]:
            # The second record's own question and one more are answered otherwise
            return [str(query.answer) if i not in (asked, asked + 3) else "no" for i, query in enumerate(queries)]

    own, everything = precision.base_accuracy(Parrot(), [first, second])  # type: ignore[arg-type]
    assert own.mean == 0.5
    assert everything.mean == pytest.approx((1 + 3 / 5) / 2)
    with pytest.raises(ValueError, match="records carry a prediction"):
        precision.base_accuracy(Parrot(), made_up_edits(1))  # type: ignore[arg-type]


def test_only_recorded_answers_are_asked_for() -> None:
    record_ = EditRequest("what", "a", probes=(Probe("blind", "who"), Probe("same", "how", made_up_image(0), "so")))
    assert [query.answer for query in precision.unedited(record_)] == ["so"]


def test_missing_bitsandbytes_is_named_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    hidden = {"bitsandbytes"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in hidden else found(name))
    monkeypatch.setattr(fastedit, "read_edits", lambda *a, **k: pytest.fail("work was done"))
    result = run("--precisions", "float32,int8")
    assert result.exit_code == 1
    assert "int8 needs bitsandbytes: pip install" in " ".join(result.output.split())


def test_unknown_precisions_are_named() -> None:
    result = run("--precisions", "float32,fp4")
    assert result.exit_code == 1
    assert "precisions are float32, bfloat16, int8, nf4 (got fp4)" in " ".join(result.output.split())
