"""The page of models says what the tests found, failures among it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import model_table


def test_a_row_holds_what_its_tests_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outcome.xml").write_text(
        "<testsuites><testsuite>"
        '<testcase name="test_logits_equal_the_stock_models[a]"><properties>'
        '<property name="logits" value="3e-15"/><property name="decoder" value="llama"/>'
        '<property name="keys" value="stored"/></properties></testcase>'
        '<testcase name="test_edits_converge_and_leave_the_base_alone[a]"><failure/></testcase>'
        '<testcase name="test_what_cannot_be_walked_is_refused[b]"/>'
        "</testsuite></testsuites>"
    )
    monkeypatch.setattr(model_table, "PAGE", tmp_path / "models.md")
    model_table.main(tmp_path / "outcome.xml")
    rows = [line for line in (tmp_path / "models.md").read_text().splitlines() if line.startswith("| `")]
    assert rows == ["| `a` | llama | 3e-15 | not compared | **failed** | stored |"]


def test_later_runs_count_and_methods_share_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "test_edits_converge_and_leave_the_base_alone"
    told = '<properties><property name="edits" value="up"/></properties>'
    (tmp_path / "first.xml").write_text(
        f'<testsuite><testcase name="{name}[a-lora]">{told}</testcase>'
        f'<testcase name="{name}[a-odedit+lora]"><failure/></testcase></testsuite>'
    )
    (tmp_path / "second.xml").write_text(
        f'<testsuite><testcase name="{name}[a-odedit+lora]">{told}</testcase></testsuite>'
    )
    monkeypatch.setattr(model_table, "PAGE", tmp_path / "models.md")
    for runs, said in ((["first"], "**failed**"), (["first", "second"], "up")):
        model_table.main(*(tmp_path / f"{run}.xml" for run in runs))
        rows = [line for line in (tmp_path / "models.md").read_text().splitlines() if line.startswith("| `")]
        assert rows == [f"| `a` | not compared | not compared | not compared | {said} | not compared |"]
