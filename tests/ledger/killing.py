"""Kill processes that edit, at any moment, and look at what is left.

    python -m tests.ledger.killing --kills 60 --json kills.json

One process loads the model and forks those that are killed, so that each costs what it does and no more. What was told
to be committed must be there, nothing may be there in part, and what goes on after several kills must end as what was
never killed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from tests.ledger.killed_work import WORKS, Aim, Found, Work

SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
#: Of the kills, those that are aimed inside of a commit, undoing, compacting or creating.
AIMED = 0.2
#: Longest that a child may take, seconds; kills of one folder before the work is brought to its end.
PATIENCE_S, MOST = 90.0, 5
READY, REACHED = "ready", "reached"


@dataclass
class Ended:
    """How a child ended.

    Args:
        told: what it told, in order. status: exit code, or minus a signal. seconds: from ready to its end.
        killed: whether a signal was sent before it had ended by itself.
    """

    told: list[str]
    status: int
    seconds: float
    killed: bool


@dataclass
class Row:
    """Kills of one kind, and how many of them were followed by each fault."""

    work: str
    signal: str
    where: str
    kills: int = 0
    lost: int = 0
    half: int = 0
    unequal: int = 0


@dataclass
class Report:
    """Everything that was found."""

    rows: dict[tuple[str, str, str], Row] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    #: Children that had ended before they were to be killed; works that were brought to their end.
    survived: int = 0
    series: int = 0
    #: Interrupts that ended a process as another error.
    hidden: int = 0

    def row(self, key: tuple[str, str, str]) -> Row:
        """Of a kind."""
        return self.rows.setdefault(key, Row(*key))

    @property
    def kills(self) -> int:
        """All of them."""
        return sum(row.kills for row in self.rows.values())


def in_child(
    body: Callable[[Callable[[str], None]], None],
    number: signal.Signals | None = None,
    after_s: float | None = None,
    reached_s: float | None = None,
) -> Ended:
    """Run a function in a forked child, which tells what it does, and send it a signal.

    Args:
        number: of the signal. after_s: seconds from when it is ready. reached_s: from when it says to have reached its
            aim.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os._exit(_child(body, writing))
    os.close(writing)
    start = time.monotonic()
    due = start + PATIENCE_S
    told: list[str] = []
    rest, sent, hung = b"", False, False
    while True:
        left = max(0.0, due - time.monotonic())
        if not select.select([reading], [], [], left)[0]:
            hung = sent or number is None or due - start >= PATIENCE_S
            os.kill(child, signal.SIGKILL if hung or number is None else number)
            sent, due = True, time.monotonic() + PATIENCE_S
            continue
        content = os.read(reading, 65536)
        if not content:
            break
        *lines, rest = (rest + content).split(b"\n")
        for line in lines:
            text = line.decode()
            if text == READY:
                start = time.monotonic()
                due = start + (PATIENCE_S if after_s is None else after_s)
            elif text == REACHED and reached_s is not None:
                end = time.monotonic() + reached_s
                while time.monotonic() < end:
                    pass
                os.kill(child, signal.SIGKILL if number is None else number)
                sent, due = True, time.monotonic() + PATIENCE_S
            else:
                told.append(text)
    os.close(reading)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if hung:
        told.append("error: it hung and was ended")
    return Ended(told, status, time.monotonic() - start, sent or REACHED in told)


def _child(body: Callable[[Callable[[str], None]], None], writing: int) -> int:
    def tell(text: str) -> None:
        os.write(writing, text.replace("\n", " | ").encode() + b"\n")

    try:
        if "FASTEDIT_DEBUG" not in os.environ:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            body(tell)
        except KeyboardInterrupt:
            return 130
        except BaseException as error:
            told = traceback.format_exception(error)
            tell(f"error: {type(error).__name__}: {error} in {told[-2] if len(told) > 1 else ''}")
            return 1
    except KeyboardInterrupt:
        return 130
    return 0


class Killer:
    """Kills processes at one kind of work.

    Args:
        name: of WORKS. folder: for everything. draw: of moments and signals. report: gets what is found.
    """

    def __init__(self, name: str, folder: Path, draw: random.Random, report: Report) -> None:
        self.work: Work = WORKS[name]
        self.name, self.folder, self.draw, self.report = name, folder, draw, report
        self.work.prepare()
        self.kept = folder / f"{name}-kept"
        self.kept.mkdir()
        whole = folder / f"{name}-whole"
        whole.mkdir()

        def unharmed(tell: Callable[[str], None]) -> None:
            aim, steps = Aim(), list[str]()
            aim.watch()
            self.work.watch(aim, steps.append)
            tell(READY)
            self.work.run(whole, aim, tell, again=False)
            tell(json.dumps([aim.counts, len(steps)]))

        ended = in_child(unharmed)
        if ended.status:
            raise RuntimeError(f"killing: {name} ends by itself (got {ended})")
        counts, self.steps = json.loads(ended.told[-1])
        self.seconds = ended.seconds
        self.counts = {section: counts[section] for section in self.work.sections}
        kept = in_child(lambda _tell: self.work.keep(whole, self.kept))
        if kept.status:
            raise RuntimeError(f"killing: {name} is kept (got {kept})")

    def series(self, most: int) -> int:
        """Kill one after another at the same folder, then bring the work to its end; returns how many were killed."""
        folder = Path(tempfile.mkdtemp(prefix=f"{self.name}-", dir=self.folder))
        told: list[str] = []
        keys: list[tuple[str, str, str]] = []
        while len(keys) < most:
            key, ended = self._one(folder, told)
            self._blame(ended, key, folder)
            if not ended.killed or ended.status == 0:
                # It was done first, or it went on after an interrupt
                if ended.killed:
                    self._count(key, keys)
                else:
                    self.report.survived += 1
                break
            self._count(key, keys)
        done = in_child(lambda tell: self._body(folder, Aim(), False)(tell))
        told += done.told
        self._blame(done, keys[-1] if keys else (self.work.name, "none", "none"), folder)
        self._judge(folder, told, keys, whole=True)
        self.report.series += 1
        shutil.rmtree(folder)
        return len(keys)

    def _count(self, key: tuple[str, str, str], keys: list[tuple[str, str, str]]) -> None:
        self.report.row(key).kills += 1
        keys.append(key)

    def _one(self, folder: Path, told: list[str]) -> tuple[tuple[str, str, str], Ended]:
        """One child at work, killed."""
        signal_name = self.draw.choice(list(SIGNALS))
        number = SIGNALS[signal_name]
        again = number == signal.SIGINT and self.draw.random() < 0.5
        where, aim_at, reached_s, after_s = "anywhere", 0, None, None
        if self.draw.random() < AIMED:
            where = self._section(told)
            aim_at = self.draw.randint(1, self.counts[where])
            if where == "commit":
                aim_at = max(1, aim_at // 2)
            # At the call itself, or a little later, from outside: inside of SQLite or of the system
            reached_s = self.draw.choice([None, self.draw.uniform(0.0, 0.002)])
        else:
            # Of what is left to do: past its end nothing is killed
            done = sum(not text.startswith(("error", "interrupted")) for text in told)
            after_s = self.draw.uniform(0.0, self.seconds * max(0.1, 1 - done / self.steps))

        def reach() -> None:
            tell_now[0](REACHED)
            if reached_s is None:
                os.kill(os.getpid(), number)

        tell_now: list[Callable[[str], None]] = []

        def body(tell: Callable[[str], None]) -> None:
            tell_now.append(tell)
            self._body(folder, Aim(where if aim_at else "", aim_at, reach), again)(tell)

        ended = in_child(body, number, after_s, reached_s)
        told += [text for text in ended.told if text != REACHED]
        key = (self.work.name, signal_name, where)
        self._judge(folder, told, [key], whole=False)
        return key, ended

    def _section(self, told: list[str]) -> str:
        """One that is still to come, and where the fewest were killed so far."""
        left = [name for name in self.work.sections if name not in told and name != "create"]
        if not told and "create" in self.work.sections:
            left.append("create")
        hits = Counter[str]()
        for row in self.report.rows.values():
            hits[row.where] += row.kills
        left = left or list(self.work.sections)
        least = min(hits[name] for name in left)
        return self.draw.choice([name for name in left if hits[name] == least])

    def _body(self, folder: Path, aim: Aim, again: bool) -> Callable[[Callable[[str], None]], None]:
        def body(tell: Callable[[str], None]) -> None:
            aim.watch()
            self.work.watch(aim, tell)
            tell(READY)
            self.work.run(folder, aim, tell, again=again)

        return body

    def _blame(self, ended: Ended, key: tuple[str, str, str], folder: Path) -> None:
        """Note a child that could not go on."""
        errors = [text for text in ended.told if text.startswith("error")]
        if errors and key[1] == "SIGINT" and ended.killed and "interrupted" not in ended.told:
            # What C code makes of an interrupt inside of it is an error of its own: the process ended all the same
            self.report.hidden += 1
        elif errors:
            self.report.row(key).unequal += 1
            self.report.problems.append(f"{key} {folder.name}: {errors}")

    def _judge(self, folder: Path, told: list[str], keys: list[tuple[str, str, str]], *, whole: bool) -> None:
        """Look at what is there, in a child: of a copy, or of the folder itself."""
        looked = folder
        if not whole and self.draw.random() < 0.5:
            looked = folder.with_name(f"{folder.name}-copy")
            shutil.copytree(folder, looked)
        claims = [text for text in told if not text.startswith(("error", "interrupted"))]

        def look(tell: Callable[[str], None]) -> None:
            found = self.work.look(looked, claims)
            if whole:
                found.unequal.extend(self.work.compare(looked, self.kept))
            tell(json.dumps(asdict(found)))

        ended = in_child(look)
        try:
            found = Found(**json.loads(ended.told[-1]))
        except (IndexError, ValueError):
            found = Found(half=[f"it cannot be looked at: {ended}"])
        if looked is not folder:
            shutil.rmtree(looked)
        for name, problems in asdict(found).items():
            if problems:
                row = self.report.row(keys[-1] if keys else (self.work.name, "none", "none"))
                setattr(row, name, getattr(row, name) + 1)
                self.report.problems.append(f"{keys} {folder.name}: {name}: {problems}; told {told}")


def kill(kills: int, names: list[str], *, seed: int = 0, seconds: float = float("inf")) -> Report:
    """Kill so many processes at each kind of work in turn, or as many as there is time for."""
    # Of a process that is forked no other thread may be at work
    torch.set_num_threads(1)
    report, draw, end = Report(), random.Random(seed), time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as temporary:
        killers = [Killer(name, Path(temporary), draw, report) for name in names]
        done = {killer.name: 0 for killer in killers}
        while sum(done.values()) < kills and time.monotonic() < end:
            killer = min(killers, key=lambda each: done[each.name])
            share = max(1, min(MOST, kills - sum(done.values())))
            done[killer.name] += killer.series(draw.randint(1, share))
    return report


def main() -> None:
    """Kill, and write what was found as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--works", default=",".join(WORKS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    report = kill(given.kills, given.works.split(","), seed=given.seed, seconds=given.seconds)
    rows = [asdict(row) for _, row in sorted(report.rows.items())]
    told = {
        "rows": rows,
        "problems": report.problems,
        "survived": report.survived,
        "series": report.series,
        "hidden": report.hidden,
    }
    text = json.dumps(told, indent=1)
    if given.json is not None:
        given.json.write_text(text)
    else:
        sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
