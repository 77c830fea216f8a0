"""Trials of ledgers: killed writers, a disk that is full, bits that flip, two processes, very many edits.

Each returns how often something was tried and what was found wrong.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import fastedit
from benchmarks.cases import made_up_edits
from fastedit.backbone import EditableModel
from fastedit.ledger import Ledger, LedgerError
from fastedit.ledger.records import to_record
from fastedit.ledger.schema import as_text

ROOT = Path(__file__).resolve().parents[1]
FEW: dict[str, Any] = {"steps": 2, "lr": 1e-2, "show_progress": False, "batch_size": 2, "evaluate": False}
#: Deltas of a segment, as compacting writes them.
SEGMENT = 256


@dataclass
class Trial:
    """What was tried.

    Args:
        tries: how often. problems: what was found wrong, in words. numbers: metric -> value.
    """

    tries: int = 0
    problems: list[str] = field(default_factory=list)
    numbers: dict[str, float] = field(default_factory=dict)


def kills(count: int, seed: int, seconds: float = float("inf")) -> dict[str, Any]:
    """Kill so many processes (``tests/ledger/killing.py``); its rows and problems."""
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "kills.json"
        command = [sys.executable, "-m", "tests.ledger.killing", "--kills", str(count), "--seed", str(seed)]
        command += ["--json", str(out)] + (["--seconds", str(seconds)] if seconds < float("inf") else [])
        subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def tiny() -> EditableModel:
    """The model of the trials."""
    return fastedit.load("random:llava-tiny", dtype="float64")


@contextmanager
def small_disk(size: int) -> Iterator[Path]:
    """A file system of its own, of so many bytes.

    Raises:
        RuntimeError: this user may not mount one.
    """
    with tempfile.TemporaryDirectory() as temporary:
        options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", temporary]
        if subprocess.run(["mount", *options], check=False, capture_output=True).returncode:
            raise RuntimeError("trials: a small disk can be mounted (got a refusal; run as root, or under unshare -rm)")
        try:
            yield Path(temporary)
        finally:
            subprocess.run(["umount", "-l", temporary], check=True)


def _work(ledger: Ledger) -> None:
    edits = made_up_edits(5)
    if "first" not in ledger.tags():
        ledger.edit(edits[:3], "lora", mode="single", **FEW)
        ledger.tag("first")
    done = {event.action for event in ledger.history()}
    if "undo" not in done:
        ledger.undo(2)
    if "compact" not in done:
        ledger.compact()
    if "second" not in ledger.tags():
        ledger.edit(edits[3:], "lora", mode="single", **FEW)
        ledger.tag("second")


def disk_full(tries: int, seed: int) -> Trial:
    """Fill a small disk so that random numbers of bytes are left, edit until there are none, free it and go on."""
    trial, draw, model = Trial(), random.Random(seed), tiny()
    usage = shutil.disk_usage(tempfile.gettempdir())
    with tempfile.TemporaryDirectory() as temporary, fastedit.open_ledger(Path(temporary) / "whole", model) as whole:
        _work(whole)
        size = sum(path.stat().st_size for path in whole.folder.rglob("*") if path.is_file())
        expected = [delta.tensors for delta in whole.state().deltas]
        broken = 0
        # Room is looked for before any work: here it runs out behind that
        with mock.patch("shutil.disk_usage", return_value=usage):
            for number in range(tries):
                room = draw.randrange(4096, int(1.3 * size))
                with small_disk(4 * size) as disk:
                    (disk / "filler").write_bytes(bytes(4 * size - room))
                    broken += _one_full(trial, model, disk, expected, f"try {number}, {room} bytes")
                trial.tries += 1
    trial.numbers = {"disk_full": float(broken)}
    return trial


def _one_full(trial: Trial, model: EditableModel, disk: Path, expected: list[Any], name: str) -> bool:
    told: list[str] = []
    ledger, broken = None, False
    try:
        ledger = fastedit.open_ledger(disk / "edits", model)
        with mock.patch.object(Ledger, "tag", _telling(Ledger.tag, told)):
            _work(ledger)
    except (OSError, RuntimeError, ValueError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) else error
        broken = True
        if not isinstance(cause, OSError):
            trial.problems.append(f"{name}: ended by {error!r:.300}, which is no OSError")
    acted: list[int] = []
    if ledger is not None:
        acted = ledger.state().edit_ids
        with suppress(OSError):
            problems = fastedit.open_ledger(disk / "edits").verify().problems
            trial.problems += [f"{name}: half: {problem}" for problem in problems]
        if len(list(ledger.state().deltas)) != len(acted) or set(told) - set(ledger.tags()):
            trial.problems.append(f"{name}: lost on the full disk: {acted}, {told}")
    (disk / "filler").unlink()
    try:
        ledger = fastedit.open_ledger(disk / "edits", model) if ledger is None else ledger
        _work(ledger)
        deltas = [delta.tensors for delta in ledger.state().deltas]
        if not _alike(deltas, expected):
            trial.problems.append(f"{name}: unequal")
        trial.problems += [f"{name}: half: {problem}" for problem in ledger.verify().problems]
        if list(disk.rglob("*.partial")) or list(disk.rglob("*.new*")):
            trial.problems.append(f"{name}: files are left half written")
        ledger.close()
    except (OSError, RuntimeError, ValueError) as error:
        trial.problems.append(f"{name}: it does not go on: {error!r:.300}")
    return broken


def _alike(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(float((a[name] - b[name]).abs().max()) < 1e-8 for name in a)
        for a, b in zip(one, other, strict=True)
    )


def _telling(real: Any, told: list[str]) -> Any:
    def tag(ledger: Ledger, name: str) -> int:
        event: int = real(ledger, name)
        told.append(name)
        return event

    return tag


def bit_flips(tries: int, seed: int) -> Trial:
    """Turn one bit of a file of a ledger, and look whether it is found by the file's name."""
    trial, draw = Trial(), random.Random(seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "edits"
        with fastedit.open_ledger(folder, tiny()) as ledger:
            _work(ledger)
        files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
        files = [path for path in files if (folder / path).stat().st_size]
        for _ in range(tries):
            name = draw.choice(files)
            content = (folder / name).read_bytes()
            at = draw.randrange(8 * len(content))
            copy = Path(temporary) / "copy"
            shutil.copytree(folder, copy)
            flipped = bytearray(content)
            flipped[at // 8] ^= 1 << (at % 8)
            (copy / name).write_bytes(bytes(flipped))
            try:
                with fastedit.open_ledger(copy) as ledger:
                    problems = list(ledger.verify().problems)
            except LedgerError as error:
                problems = [str(error)]
            if not any(name.name in problem for problem in problems):
                trial.problems.append(f"bit {at} of {name} is not found: {problems}")
            shutil.rmtree(copy)
            trial.tries += 1
    return trial


def two_processes(seconds: float) -> Trial:
    """One process writes and compacts, another one reads and verifies meanwhile."""
    trial, model = Trial(), tiny()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "edits"
        with fastedit.open_ledger(folder, model) as ledger:
            _work(ledger)
        writer = os.fork()
        if writer == 0:
            status = 1
            try:
                end = time.monotonic() + seconds
                with fastedit.open_ledger(folder, model) as ledger:
                    number = 0
                    while time.monotonic() < end:
                        ledger.undo(1)
                        ledger.redo(1)
                        ledger.tag(f"tag {number}")
                        number += 1
                        if number % 7 == 0:
                            ledger.compact()
                status = 0
            finally:
                os._exit(status)
        ended = 0, 0
        with fastedit.open_ledger(folder) as reader:
            while ended == (0, 0):
                trial.problems += reader.verify().problems
                state = reader.state()
                if len(state) not in (3, 4, 5) or len(list(state.deltas)) != len(state):
                    trial.problems.append(f"{len(state)} edits act")
                with suppress(LedgerError), fastedit.open_ledger(folder) as other:
                    other.history()
                trial.tries += 1
                ended = os.waitpid(writer, os.WNOHANG)
        if ended[1]:
            trial.problems.append(f"the writer ended with {ended[1]}")
        trial.problems += fastedit.open_ledger(folder).verify().problems
    return trial


def opening(count: int) -> Trial:
    """Make a ledger of so many edits, segments as compacting writes them, and time how long it takes to open.

    The first edits are made; rows and files of the others are written from theirs by the ledger's own functions.
    """
    trial, model = Trial(tries=1), tiny()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "edits"
        with fastedit.open_ledger(folder, model) as ledger:
            ledger.edit(made_up_edits(2), "grace", mode="sequential", **FEW)
            _multiply(ledger, count)
        start = time.perf_counter()
        with fastedit.open_ledger(folder, model) as ledger:
            trial.numbers["open_s"] = time.perf_counter() - start
            if len(ledger) != count:
                trial.problems.append(f"{len(ledger)} of {count} edits act")
            start = time.perf_counter()
            deltas = ledger.state().deltas
            trial.numbers["state_s"] = time.perf_counter() - start
            if len(deltas) != count or not deltas[count - 1].request_id:
                trial.problems.append(f"{len(deltas)} deltas of {count}")
        listed = [path for path in folder.rglob("*") if path.is_file()]
        trial.numbers["files"] = len(listed)
        trial.numbers["disk_mib"] = sum(path.stat().st_size for path in listed) / 2**20
    return trial


def _multiply(ledger: Ledger, count: int) -> None:
    """Let a ledger have so many edits, each with a row and a delta of its own."""
    contents, made = ledger.contents, list(ledger.state().deltas)
    edit = contents.edit(1)
    record = to_record(contents.request(1), contents.images)
    version = contents.database.row("versions", 1)
    assert version is not None
    deltas = [made[number % len(made)] for number in range(SEGMENT)]
    with contents.writing():
        for start in range(len(made), count, SEGMENT):
            with contents.transaction() as transaction:
                segment = contents.segments.write(transaction, deltas)
                numbers = range(start, min(count, start + SEGMENT))
                event = transaction.event("edit", edits=[number + 1 for number in numbers], run=1, status="computed")
                for row, number in enumerate(numbers):
                    new = transaction.insert(
                        "edits", run=edit["run"], number=number, name=f"edit-{number}", target=edit["target"],
                        question=f"{number:064d}", request=as_text({**record, "prompt": f"What is {number}?"}),
                    )  # fmt: skip
                    transaction.insert(
                        "versions", edit=new, since=event, until=None, place=new, segment=segment, row=row,
                        delta=deltas[row].id, fitted_on=None, outcome=version["outcome"],
                    )  # fmt: skip


__all__ = ["Trial", "bit_flips", "disk_full", "kills", "opening", "small_disk", "two_processes"]
