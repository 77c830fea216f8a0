"""Edits made by several processes are those of one, whatever happens to the processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import fastedit
from fastedit import EditRequest
from fastedit.backbone import EditableModel
from fastedit.engine import Run, schedule
from fastedit.engine.parallel import workers
from fastedit.engine.parallel.dispatch import watched_by
from fastedit.ledger.schema import COMMITS
from tests.engine.parallel.conftest import FEW, assert_same
from tests.engine.parallel.sources import Failing

ROOT = Path(__file__).resolve().parents[3]


def test_results_are_those_of_one_process(
    model: EditableModel, edits: list[EditRequest], here: Run, tmp_path: Path
) -> None:
    with fastedit.open_ledger(tmp_path / "edits", model) as ledger:
        run = fastedit.edit(model, edits, engine="processes", workers=2, mode="single", ledger=ledger, **FEW)
        assert_same(run, here)
        assert run.provenance["workers"]["lost"] == 0
        assert ledger.verify().sound
        # What is committed is not made again, and no worker is started
        again = fastedit.edit(model, edits, engine="processes", workers=2, mode="single", ledger=ledger, **FEW)
        assert_same(again, here)
        assert again.provenance["workers"]["seconds"] == {}
    assert run.scores["strict"].keys() == here.scores["strict"].keys()


def test_a_killed_worker_and_an_edit_that_always_fails(
    model: EditableModel, edits: list[EditRequest], here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = workers.source_of

    def source(given: EditableModel) -> Failing:
        # The first worker that meets edit 1 is killed; edit 3 fails each time
        dying = Failing(stock(given), "number 1 here", kill=True, once=tmp_path / "killed")
        return Failing(dying, "number 3 here")

    monkeypatch.setattr(workers, "source_of", source)
    with pytest.warns(RuntimeWarning, match=r"edits\[3\] .* set aside"):
        run = fastedit.edit(model, edits, engine="processes", workers=2, **FEW)
    assert (tmp_path / "killed").exists()
    assert_same(run, here, [0, 1, 2, 4])
    (aside,) = run.provenance["set_aside"]
    assert aside == {"edit": 3, "id": "edit-3", "reason": "RuntimeError: cannot be asked about number 3 here"}
    assert run.provenance["finished"] == {"edits": [0, 1, 2, 4], "of": 5}
    assert run.provenance["workers"]["lost"] == 1


@pytest.mark.parametrize(("method", "count"), [("lora", 2), ("grace", 1)])
def test_a_sequence_is_scored_by_all_workers(
    model: EditableModel, edits: list[EditRequest], method: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {**FEW, "method": method, "mode": "sequential", "score_at": [2, 4] if count == 1 else []}
    here = fastedit.edit(model, edits, **given)
    # Nothing is scored in this process
    monkeypatch.setattr(schedule.Evaluator, "scores", None)
    tasks: list[dict[int, int]] = []
    watcher = SimpleNamespace(began=lambda dispatch: tasks.append(dispatch.processes), took=lambda _taken: None)
    with watched_by(watcher):
        run = fastedit.edit(model, edits, engine="processes", workers=count, **given)
    assert_same(run, here)
    assert run.checkpoints == here.checkpoints
    assert run.provenance["workers"]["seconds"]["evaluation"] > 0
    # Fits, and scores at every gap: a worker loads the model once, and has ended with the run
    assert len(tasks) == (4 if count == 1 else 1)
    processes = {process for each in tasks for process in each.values()}
    assert len(processes) == count
    end = time.monotonic() + 60
    while any(map(_is_alive, processes)):
        assert time.monotonic() < end, "a worker outlived its run"
        time.sleep(0.05)


RUN = """
import sys
import fastedit
from tests.engine.parallel.conftest import FEW
from tests.engine.conftest import make_edits

if __name__ == "__main__":
    model = fastedit.load("random:llava-tiny", dtype="float64")
    with fastedit.open_ledger(sys.argv[1], model) as ledger:
        fastedit.edit(model, make_edits(5), engine="processes", workers=1, mode="single", ledger=ledger, **FEW)
"""


def test_a_killed_run_leaves_no_worker_and_goes_on(
    model: EditableModel, edits: list[EditRequest], here: Run, tmp_path: Path
) -> None:
    script, folder = tmp_path / "run.py", tmp_path / "edits"
    script.write_text(RUN)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    driver = subprocess.Popen([sys.executable, str(script), str(folder)], env=environment, cwd=ROOT)
    end = time.monotonic() + 120
    # Asked for, and an edit of it
    while not ((folder / COMMITS).exists() and len((folder / COMMITS).read_text().splitlines()) >= 2):
        assert driver.poll() is None, "the run ended before it was to be killed"
        assert time.monotonic() < end
        time.sleep(0.01)
    children = _children(driver.pid)
    assert children
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    while any(_is_alive(child) for child in children):
        assert time.monotonic() < end, "a worker outlived its run"
        time.sleep(0.05)
    with fastedit.open_ledger(folder, model) as ledger:
        there = sum(edit is not None for edit in ledger.answered(edits))
        assert 1 <= there < 5
        assert_same(fastedit.edit(model, edits, mode="single", ledger=ledger, **FEW), here)
        assert ledger.verify().sound


def _children(process: int) -> list[int]:
    listed = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(each) for each in listed]


def _is_alive(process: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
