"""The progress line: there at once, moved by steps, honest about the time left, plain where there is no terminal."""

from __future__ import annotations

import contextvars
import io
import json
import os
import pty
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import fastedit
from fastedit.progress import (
    EVERY_S,
    NOW_S,
    ProgressLine,
    duration,
    expect_memory,
    log_progress,
    planning_memory,
    progress,
    show_on_board,
)
from fastedit.training import TrainerConfig
from tests.engine.conftest import make_edits


class Clock:
    """Time that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("fastedit.progress.time", made)
    return made


def test_time_left_is_measured_from_the_start_of_the_work(clock: Clock) -> None:
    line = ProgressLine("editing", 10, False)
    assert line.left_s() is None
    clock.now += 6
    line.advance(2)
    assert line.left_s() == pytest.approx(24)
    clock.now += 6
    assert line.left_s() == pytest.approx(48)
    assert line.status() == "2/10, 0:12, about 0:48 left"


def test_steps_of_running_items_count(clock: Clock) -> None:
    line = ProgressLine("editing", 4, False)
    clock.now += 5
    line.underway(1.0)
    assert line.fraction() == pytest.approx(0.25)
    assert line.left_s() == pytest.approx(15)
    line.advance()
    assert (line.done, line.fraction()) == (1, pytest.approx(0.25))
    line.underway(0.5)
    assert line.fraction() == pytest.approx(0.375)


def test_what_an_earlier_run_did_says_nothing_about_speed(clock: Clock) -> None:
    line = ProgressLine("training", 100, False, done=90)
    assert line.left_s() is None
    clock.now += 10
    line.advance(5)
    assert line.left_s() == pytest.approx(10)
    assert line.status().startswith("95/100")


def test_speed_is_told_of_the_last_seconds_and_on_average(clock: Clock) -> None:
    line = ProgressLine("editing", 100, False, unit="edits")
    for _ in range(10):
        clock.now += 1
        line.advance(4)
    assert line.status() == "40/100, 0:10, 4 edits/s now, 4 on average, about 0:15 left"
    for _ in range(int(NOW_S)):
        clock.now += 1
        line.advance(1)
    assert line.per_s_now() == pytest.approx(1)
    assert line.per_s() == pytest.approx(2)
    clock.now += 2 * NOW_S
    assert line.per_s_now() is None
    assert line.status() == "60/100, 1:10, 0.857 edits/s, about 0:47 left"


def test_items_that_were_done_before_are_no_speed(clock: Clock) -> None:
    line = ProgressLine("editing", 100, False, unit="edits")
    line.skip(50)
    clock.now += 10
    assert line.status() == "50/100, 0:10"
    line.advance(10)
    assert line.per_s() == line.per_s_now() == pytest.approx(1)
    assert line.left_s() == pytest.approx(40)


def test_failed_items_and_memory_against_the_plan_are_told(clock: Clock) -> None:
    line = ProgressLine("editing", 10, False, unit="edits")
    line.note(failed=2, memory_mib=1234.5)
    assert line.status() == "0/10, 0:00, 2 failed, 1,234 MiB"
    context = contextvars.copy_context()
    context.run(expect_memory, 2000.0)
    assert context.run(line.status) == "0/10, 0:00, 2 failed, 1,234 of 2,000 MiB"
    with planning_memory():
        expect_memory(3000.0)
        assert line.status().endswith("1,234 of 3,000 MiB")
    assert line.status() == "0/10, 0:00, 2 failed, 1,234 MiB"


def entries(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_log_has_an_entry_a_second_and_those_of_start_and_end(clock: Clock, tmp_path: Path) -> None:
    path = tmp_path / "new" / "log.jsonl"
    with log_progress(path), progress("editing", 100, False) as line:
        for _ in range(38):
            clock.now += 0.125
            line.advance()
        line.note(failed=1, memory_mib=10.0)
    logged = entries(path)
    assert [entry["event"] for entry in logged] == ["start", *["progress"] * 4, "end"]
    assert [entry["done"] for entry in logged] == [0, 8, 16, 24, 32, 38]
    assert logged[0] | {"time": ""} == {
        "event": "start", "time": "", "label": "editing", "done": 0, "total": 100, "elapsed_s": 0.0, "left_s": None,
        "per_s": None, "per_s_now": None, "failed": 0, "memory_mib": None, "planned_mib": None,
    }  # fmt: skip
    assert logged[-1]["per_s"] == pytest.approx(8)
    assert (logged[-1]["failed"], logged[-1]["memory_mib"]) == (1, 10.0)
    with progress("scoring", 1, False):
        pass
    assert entries(path) == logged
    with log_progress(path), progress("scoring", 1, False):
        pass
    assert entries(path)[: len(logged)] == logged
    with (
        pytest.raises(ValueError, match=r"--log-json: a file that can be written \(got .*new': Is a directory\)"),
        log_progress(tmp_path / "new"),
    ):
        pass


@pytest.mark.parametrize("mode", ["single", "sequential"])
def test_a_run_counts_its_failed_edits_in_the_log(mode: str, tmp_path: Path) -> None:
    model = fastedit.load("random:llava-tiny")
    path = tmp_path / "log.jsonl"
    with log_progress(path), pytest.warns(RuntimeWarning, match="diverg"):
        run = fastedit.edit(model, make_edits(3), "ft", lr=1e30, steps=3, mode=mode, batch_size=1)
    failed = sum(outcome.status in ("diverged", "diverging") for outcome in run.outcomes)
    assert failed > 0
    last = [entry for entry in entries(path) if entry["label"].startswith("editing") and entry["event"] == "end"][-1]
    assert (last["done"], last["total"], last["failed"]) == (3, 3, failed)
    assert last["memory_mib"] > 100


def test_without_a_terminal_lines_are_plain_and_rare(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("editing", 600, True) as line:
        assert capsys.readouterr().err == "editing: 0/600, 0:00\n"
        for _ in range(600):
            clock.now += EVERY_S / 60
            line.advance()
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 10
    assert told[0] == "editing: 60/600, 0:30, about 4:30 left"
    assert all(character.isprintable() for text in told for character in text)


def test_nothing_is_said_where_nobody_asked(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("editing", 10) as line:
        line.advance()
    assert capsys.readouterr() == ("", "")


def test_an_inner_line_takes_the_place_of_the_outer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress("editing in sequence", 3) as outer:
        assert outer._bar is not None
        with progress("scoring after edit 1", 1) as inner:
            assert outer._bar is None
            assert inner._bar is not None
        assert inner._bar is None
        assert outer._bar is not None
    assert outer._bar is None


SLOW = """
import sys, time
from fastedit.progress import progress
with progress("editing", 4) as line:
    for step in range(4):
        time.sleep(0.3)
        line.underway((step + 1) / 4)
    line.advance(4)
sys.stderr.write("end\\n")
"""


def on_terminal(code: str, **environment: str) -> str:
    """What a program writes to standard error where that is a terminal."""
    leader, follower = pty.openpty()
    written = bytearray()

    def read() -> None:
        while True:
            try:
                part = os.read(leader, 4096)
            except OSError:
                return
            if not part:
                return
            written.extend(part)

    process = subprocess.Popen(
        [sys.executable, "-c", code], stderr=follower, env={**os.environ, "COLUMNS": "60", **environment}
    )
    os.close(follower)
    reader = threading.Thread(target=read)
    reader.start()
    process.wait(timeout=600)
    reader.join(timeout=10)
    os.close(leader)
    return written.decode()


def test_on_a_terminal_the_line_is_there_at_once_and_moves_within_an_item() -> None:
    told = on_terminal(SLOW, TERM="xterm")
    assert "0/4, 0:0" in told
    assert "about" in told.split("4/4")[0]
    assert told.rstrip().endswith("end")


def test_ascii_and_dumb_terminals_get_no_other_characters() -> None:
    assert on_terminal(SLOW, TERM="xterm", PYTHONIOENCODING="ascii", LC_ALL="C").isascii()
    dumb = on_terminal(SLOW, TERM="dumb")
    assert "\x1b" not in dumb
    assert "editing: 0/4, 0:0" in dumb


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (34, "0:34"), (59.6, "1:00"), (725, "12:05"), (10801, "3:00:01")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def recorded(monkeypatch: pytest.MonkeyPatch, name: str) -> list[float]:
    """Fractions of all lines, at every change."""
    fractions: list[float] = []
    real = getattr(ProgressLine, name)

    def record(line: ProgressLine, *given: Any) -> None:
        real(line, *given)
        fractions.append(line.fraction())

    monkeypatch.setattr(ProgressLine, name, record)
    return fractions


@pytest.mark.parametrize("evaluate", [False, True])
def test_an_edit_run_moves_with_every_step(monkeypatch: pytest.MonkeyPatch, evaluate: bool) -> None:
    fractions = recorded(monkeypatch, "underway")
    model = fastedit.load("random:llava-tiny")
    fastedit.edit(model, make_edits(4), "lora", batch_size=4, steps=8, stop_loss=None, evaluate=evaluate)
    assert len(set(fractions)) >= 8
    assert fractions == sorted(fractions)
    assert fractions[-1] < 1


def test_a_sequence_moves_with_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    fractions = recorded(monkeypatch, "underway")
    model = fastedit.load("random:llava-tiny")
    fastedit.edit(model, make_edits(2), "lora", mode="sequential", steps=4, stop_loss=None, evaluate=False)
    assert [round(8 * fraction) for fraction in fractions] == [0, 1, 2, 3, 4, 5, 6, 7]


def test_training_moves_with_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    fractions = recorded(monkeypatch, "advance")
    model = fastedit.load("random:llava-tiny")
    settings = TrainerConfig(steps=3, batch_size=2, valid_every=None)
    fastedit.train(model, "mend", make_edits(6), trainer=settings, layers=1, rank=4, valid_records=2)
    assert fractions == pytest.approx([1 / 3, 2 / 3, 1])


def test_what_comes_before_the_first_step_is_said_too(capsys: pytest.CaptureFixture[str]) -> None:
    model = fastedit.load("random:llava-tiny")
    fastedit.edit(model, make_edits(3), "grace", steps=1, pool=make_edits(6)[3:], evaluate=False, show_progress=True)
    labels = [line.split(":")[0] for line in capsys.readouterr().err.splitlines()]
    assert labels == ["checking the records", "setting up grace", "editing"]


def test_progress_is_shown_on_a_tensorboard(tmp_path: Path, clock: Clock) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with show_on_board(tmp_path / "board"), progress("editing", 4, False, unit="edits") as line:
        for _ in range(4):
            clock.now += 2
            line.note(failed=1, memory_mib=100.0)
            line.advance()
    told = EventAccumulator(str(tmp_path / "board")).Reload()
    # The start, four edits and the end, at what was done then
    assert [each.step for each in told.Scalars("editing/failed")] == [0, 1, 2, 3, 4, 4]
    assert [each.value for each in told.Scalars("editing/per_s")] == pytest.approx([0.5] * 5)
    assert told.Scalars("editing/memory_mib")[-1].value == 100.0
    (tmp_path / "file").touch()
    with (
        pytest.raises(ValueError, match="--tensorboard: a folder that can be written"),
        show_on_board(tmp_path / "file"),
    ):
        pass
