"""The matrix of trainers: what its page shows is what is stored, and what failed a check is no row."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks import record, trainers
from tests.docs.test_site import DOCS


def test_the_page_has_what_is_stored() -> None:
    rows = record.read(trainers.RESULTS)
    assert trainers.page(rows) in (DOCS / "trainers.md").read_text(encoding="utf-8")
    for row in rows:
        assert row.config["steps"] == trainers.STEPS >= 100
        assert "the loss has halved" in row.config["checks"]


def test_a_setting_that_fails_is_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, dict[str, Any]] = {
        "plain": {"losses": [2.0, 0.5], "checks": {"good": True}, "reliability": 1.0, "text_locality": 1.0},
        "bf16": {"losses": [2.0, 1.9], "checks": {"the loss has halved": False}},
        "ddp": {"losses": [], "checks": {}, "failed": "Traceback\nRuntimeError: no gloo"},
    }
    monkeypatch.setattr(trainers, "measured", lambda name, _steps, _timeout: found[name])
    app = trainers.typer.Typer()
    app.command()(trainers.main)
    for name, status, said in (("plain", 0, "1 of 1"), ("bf16", 1, "FAILED: the loss"), ("ddp", 1, "no gloo")):
        done = CliRunner().invoke(app, ["--settings", name], env={"COLUMNS": "200"})
        assert (done.exit_code, said in done.stdout) == (status, True)
    (row, *_) = trainers.rows_of({"plain": found["plain"]}, 100)
    assert (row.case, row.metric, row.value, row.config["checks"]) == ("trainers/plain", "first_loss", 2.0, ["good"])
