"""A long run is watched without being changed, and its parts are what they say."""

from __future__ import annotations

import itertools
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import fastedit
from benchmarks import endurance, ledger_trials, record
from benchmarks.cases import made_up_edits
from benchmarks.endurance import Watch
from fastedit.backbone import load
from fastedit.ledger.session import Session

ROOT = Path(__file__).resolve().parents[2]


def test_script_writes_a_row_for_every_tenth(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "endurance.py"), "--model", "random:llava-tiny", "--threads"]
    command += ["1", "--edits", "20", "--batch-size", "3", "--steps", "2", "--interval", "0.01"]
    command += ["--json", "rows.json", "--folder", "kept", "--out", "figures"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert "last tenth over first" in done.stdout
    rows = record.read(tmp_path / "rows.json")
    assert len(json.loads((tmp_path / "rows.json").read_text())) == len(rows)
    values = {(row.case.partition("/")[2], row.metric): row.value for row in rows}
    rates = [values[f"tenth={number}", "edits_per_s"] for number in range(1, 11)]
    memory = [values[f"tenth={number}", "rss_mib"] for number in range(1, 11)]
    assert values["", "rate_drift"] == pytest.approx(rates[-1] / rates[0])
    assert values["", "rss_drift"] == pytest.approx(memory[-1] / memory[0])
    assert values["", "peak_memory_mib"] >= max(memory) > 100
    # Every tenth is two edits; what the tenths took is no more than the run.
    assert sum(2 / rate for rate in rates) <= values["", "run_s"] * 1.01
    assert values["", "edits_per_s"] * values["", "run_s"] == pytest.approx(20)
    assert values["", "files"] > 20
    assert values["", "open_s"] > 0
    with fastedit.open_ledger(tmp_path / "kept") as ledger:
        assert (len(ledger), ledger.verify().sound) == (20, True)
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["endurance-random-llava-tiny-lora-edits-20.png"]


def test_parts_end_inside_batches() -> None:
    # 6 edits in 2 s, then 14 in 7 s: tenths of 2 edits take 2/3 s each, later 1 s
    watch = Watch()
    watch.times, watch.rss_mib = [99.0, 101.9, 105.5], [10.0, 20.0, 30.0]
    rates, memory = endurance.parts([(100.0, 0), (102.0, 6), (109.0, 20)], watch, 20)
    assert rates == pytest.approx([3.0] * 3 + [2.0] * 7)
    # Ends at 100.67, 101.33, 102, 103, 104 ...: the reading before each
    assert memory == [10.0, 10.0, 20.0, 20.0, 20.0, 20.0, 30.0, 30.0, 30.0, 30.0]


def test_watch_sees_memory_come_and_ends_with_the_block() -> None:
    def read(times: int) -> None:
        end, wanted = time.monotonic() + 120, len(watch.times) + times
        while len(watch.times) < wanted:
            assert time.monotonic() < end, "nothing is read"
            time.sleep(0.005)

    with Watch(0.005) as watch:
        read(2)
        hoard = bytearray(b"x") * (200 << 20)
        read(3)
        later = time.time()
    assert len(hoard) == 200 << 20
    assert watch.at(later) - watch.rss_mib[0] > 150
    assert len(watch.times) == len(watch.rss_mib) > 5
    count = len(watch.times)
    time.sleep(0.05)
    assert len(watch.times) == count


def test_edits_come_round_with_ids_of_their_own() -> None:
    edits = endurance.cycled(made_up_edits(3), 8)
    assert len({edit.id for edit in edits}) == 8
    assert [edit.image for edit in edits[:3]] == [edit.image for edit in edits[3:6]]
    assert len({edit.prompt for edit in edits}) == 8


def test_too_few_edits_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"at least 10 edits \(got edits=9\)"):
        endurance.endure(load("random:llava-tiny"), made_up_edits(9), "ft", tmp_path)


def test_a_run_that_is_stopped_counts_what_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, edits = load("random:llava-tiny"), made_up_edits(40)
    commit, made = Session.commit, itertools.count(1)

    def counted(self: Session, *given: Any) -> None:
        commit(self, *given)
        if next(made) == 24:
            signal.raise_signal(signal.SIGALRM)

    monkeypatch.setattr(Session, "commit", counted)
    found = endurance.endure(model, edits, "ft", tmp_path, batch_size=2, sample=5, most_s=3600, steps=1, layers=1)
    assert found.edits == 24
    assert len(found.edits_per_s) == 10
    assert found.delta_bytes > 100
    assert found.serve_s is not None
    assert found.serve_s > 0
    assert 0 <= (found.held or 0) <= 1
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_an_interrupt_of_somebody_else_goes_on() -> None:
    with pytest.raises(KeyboardInterrupt), endurance.stopping_after(3600):
        raise KeyboardInterrupt
    with endurance.stopping_after(math.inf) as stopped:
        pass
    assert not stopped


def test_trials_find_what_they_are_to_find(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "endurance.py"), "--flips", "6", "--open", "600", "--two", "1"]
    done = subprocess.run(
        [*command, "--json", "rows.json"], cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    values = {(row.case, row.metric): row.value for row in record.read(tmp_path / "rows.json")}
    assert values["ledger/flips(6)", "tries"] == 6
    assert values["ledger/open(600)", "open_s"] < 1
    assert {value for (_, metric), value in values.items() if metric == "problems"} == {0.0}


def test_a_full_disk_is_tried_where_one_can_be_mounted() -> None:
    try:
        trial = ledger_trials.disk_full(3, 1)
    except RuntimeError as error:
        pytest.skip(f"{error}")
    assert (trial.tries, trial.problems) == (3, [])
    assert trial.numbers["disk_full"] > 0
