"""Sixty processes that edit or train are killed: nothing that was committed is lost, and what goes on ends the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ledger.killed_work import WORKS

ROOT = Path(__file__).resolve().parents[2]
KILLS = 60


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")
def test_nothing_is_lost_whenever_a_process_is_killed(tmp_path: Path) -> None:
    # What a killed process wrote is there whether or not it has reached a disk
    told = tmp_path / "kills"
    command = [sys.executable, "-m", "tests.ledger.killing", "--kills", str(KILLS), "--json", str(told)]
    # Of what is forked no other thread may be left behind
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(told.read_text())
    assert found["problems"] == []
    rows = found["rows"]
    assert sum(row["kills"] for row in rows) == KILLS
    assert not any(row[fault] for row in rows for fault in ("lost", "half", "unequal"))
    assert {row["work"] for row in rows} == {work.name for work in WORKS.values()}
    assert {row["signal"] for row in rows} == {"SIGKILL", "SIGTERM", "SIGINT"}
    assert {row["where"] for row in rows} >= {"anywhere", "commit", "undo", "compact"}
