"""What a process does that is killed, what must be there after it was, and what there must be in the end."""

from __future__ import annotations

import json
import math
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import fastedit
from fastedit import EditDelta, EditRequest, Ledger
from fastedit.backbone import EditableModel
from fastedit.deltas import load_deltas, save_deltas
from fastedit.ledger import connections, schema
from fastedit.ledger.connections import Connection
from fastedit.ledger.session import Session
from fastedit.training import Artifact, load_artifact
from fastedit.training.state import State
from tests.engine.conftest import make_edits

Tell = Callable[[str], None]
FEW: dict[str, Any] = {"steps": 3, "lr": 1e-2, "show_progress": False, "batch_size": 2}
TRAINER = {"steps": 16, "batch_size": 2, "checkpoint_every": 2, "valid_every": None}
#: Largest difference of a number, in float64.
ALIKE = 1e-8


@cache
def model() -> EditableModel:
    """Loaded once; children that are forked have it."""
    loaded = fastedit.load("random:llava-tiny", dtype="float64")
    assert loaded.fingerprint
    return loaded


@cache
def edits() -> list[EditRequest]:
    """A few edits with one other question each."""
    return [
        replace(
            each, portability=(), probes=(), rephrase=None, image_rephrase=None, image_locality_image=None,
            image_locality_prompt=None, image_locality_answer=None,
        )
        for each in make_edits(6)
    ]  # fmt: skip


@cache
def artifact() -> Artifact:
    """A part that ``ldke`` does not act without."""
    short = {"steps": 1, "batch_size": 2}
    return fastedit.train(model(), "ldke", edits(), trainer=short, show_progress=False, valid_records=2)


class Aim:
    """Counts the calls that change files, by what they are made for; at one of them the process is killed.

    Args:
        section: "create", "commit", "undo", "compact" ...; "" counts. at: which call of it. reach: called there.
    """

    def __init__(self, section: str = "", at: int = 0, reach: Callable[[], None] = lambda: None) -> None:
        self.section, self.at, self.reach = section, at, reach
        self.counts: dict[str, int] = {}
        self._inside: list[str] = []

    def call(self) -> None:
        """A call is about to be made, or was."""
        if not self._inside:
            return
        now = self._inside[-1]
        self.counts[now] = self.counts.get(now, 0) + 1
        if now == self.section and self.counts[now] == self.at:
            self.reach()

    @contextmanager
    def inside(self, section: str) -> Iterator[None]:
        """Calls inside the block are for this, where they are not for what lies around it."""
        self._inside.append(self._inside[-1] if self._inside else section)
        try:
            yield
        finally:
            self._inside.pop()

    def watch(self) -> None:
        """Count the calls of this process from now on, before and behind each."""
        for name in ("fsync", "replace", "unlink", "open", "ftruncate", "pwrite"):
            setattr(os, name, self._counted(getattr(os, name)))
        aim = self

        class Counted(Connection):
            def execute(self, *given: Any) -> sqlite3.Cursor:
                return aim._counted(super().execute)(*given)  # type: ignore[no-any-return]

        connections.Connection = Counted  # type: ignore[misc]

    def _counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*given: Any, **named: Any) -> Any:
            self.call()
            result = real(*given, **named)
            self.call()
            return result

        return counted


def watched(owner: type, name: str, aim: Aim, section: str, tell: Callable[..., None]) -> None:
    """Let calls of a method count as of a section, and tell what it did once it has returned."""
    real = getattr(owner, name)

    def method(self: Any, *given: Any, **named: Any) -> Any:
        with aim.inside(section):
            result = real(self, *given, **named)
        tell(self, *given)
        return result

    setattr(owner, name, method)


@dataclass(frozen=True)
class Found:
    """What is wrong: committed and not there; there in part; other than without a kill; or refused to go on."""

    lost: list[str] = field(default_factory=list)
    half: list[str] = field(default_factory=list)
    unequal: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class LedgerWork:
    """Edits are made, one taken back, files compacted, more edits made.

    Args:
        method, mode: of the edits.
    """

    method: str
    mode: str
    sections = ("create", "commit", "undo", "compact")

    @property
    def name(self) -> str:
        """Of it in tables."""
        return f"{self.method}, {self.mode}"

    def _options(self) -> dict[str, Any]:
        trained = {"artifact": artifact(), "pool": edits()[5:]} if self.method == "ldke" else {}
        return {**FEW, "mode": self.mode, **trained}

    def prepare(self) -> None:
        """Make what all children share."""
        model(), edits(), self._options()

    def watch(self, aim: Aim, tell: Tell) -> None:
        """Count calls and tell of every edit once its commit has returned."""
        watched(Session, "commit", aim, "commit", lambda session, number, *_: tell(f"edit {session._ids[number]}"))
        watched(Ledger, "undo", aim, "undo", lambda *_: tell("undo"))
        watched(Ledger, "compact", aim, "compact", lambda *_: tell("compact"))
        watched(Ledger, "tag", aim, "tag", lambda _, name: tell(f"tag {name}"))

    def run(self, folder: Path, aim: Aim, tell: Tell, *, again: bool) -> None:
        """Do what is not done yet; again: an interrupt is followed by another try, with the same ledger."""
        with aim.inside("create"):
            ledger = fastedit.open_ledger(folder / "edits", model())
        while True:
            try:
                self._steps(ledger)
                break
            except KeyboardInterrupt:
                tell("interrupted")
                if not again:
                    raise
        ledger.close()

    def _steps(self, ledger: Ledger) -> None:
        options = self._options()
        if "first" not in ledger.tags():
            ledger.edit(edits()[:3], self.method, **options)
            ledger.tag("first")
        if not any(event.action == "undo" for event in ledger.history()):
            ledger.undo("edit-1", pool=options.get("pool"))
        if not any(event.action == "compact" for event in ledger.history()):
            ledger.compact()
        if "second" not in ledger.tags():
            ledger.edit(edits()[3:5], self.method, **options)
            ledger.tag("second")

    def look(self, folder: Path, told: list[str]) -> Found:
        """What is missing of what was told, and what is there in part."""
        found = Found()
        if not (folder / "edits" / schema.FILE).exists():
            found.lost.extend(told)
            return found
        with fastedit.open_ledger(folder / "edits", model()) as ledger:
            found.half.extend(ledger.verify().problems)
            history, acting = ledger.history(), ledger.state().edit_ids
            made = [edit for event in history if event.action == "edit" for edit in event.detail["edits"]]
            gone = [edit for event in history if event.action == "undo" for edit in event.detail["edits"]]
            if len(made) != len(set(made)) or sorted(acting) != sorted(set(made) - set(gone)):
                found.half.append(f"edits {acting} act, where {made} were made and {gone} taken back")
            there = {f"edit {edit}" for edit in made} | {f"tag {name}" for name in ledger.tags()}
            there |= {event.action for event in history}
            found.lost.extend(each for each in told if each != "interrupted" and each not in there)
            ids = [delta.request_id for delta in ledger.state().deltas]
            if ids != [ledger.show(edit).name for edit in acting] or len(ledger.state().requests()) != len(ids):
                found.half.append(f"deltas of {ids} act for edits {acting}")
            for name in ledger.tags():
                list(ledger.at(name).deltas)
        return found

    def keep(self, folder: Path, to: Path) -> None:
        """Write down what there is in the end."""
        (to / "summary.json").write_text(json.dumps(self._summary(folder)))
        with fastedit.open_ledger(folder / "edits") as ledger:
            for name in ("first", "second"):
                save_deltas(list(ledger.at(name).deltas), to / f"{name}.safetensors")

    def compare(self, folder: Path, kept: Path) -> list[str]:
        """How what there is differs from what was kept."""
        with fastedit.open_ledger(folder / "edits") as ledger:
            told = [
                problem
                for name in ("first", "second")
                for problem in unequal(list(ledger.at(name).deltas), load_deltas(kept / f"{name}.safetensors"))
            ]
        expected, found = json.loads((kept / "summary.json").read_text()), json.loads(json.dumps(self._summary(folder)))
        return told + [
            f"{name}: {found[name]!s:.300}, not {expected[name]!s:.300}"
            for name in expected
            if not alike(found[name], expected[name])
        ]

    def _summary(self, folder: Path) -> dict[str, Any]:
        with fastedit.open_ledger(folder / "edits") as ledger:
            shown = ledger.edits()
            scores = [
                sorted((plain(asdict(each)) for each in ledger.show(edit.id).scores.values()), key=json.dumps)
                for edit in shown
            ]
            history = [[event.action, dict(event.detail)] for event in ledger.history()]
            state = [[edit.name, edit.status, edit.versions] for edit in shown]
        # Of what was left half written nothing stays
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        # What was interrupted while it closed is closed as well by the next writer, which there may be none of
        files = [name for name in files if not name.endswith((schema.SEAL, "-wal", "-shm"))]
        return {"history": history, "edits": state, "scores": scores, "files": files}


@dataclass(frozen=True)
class TrainingWork:
    """A part of a method is trained, with checkpoints."""

    method: str = "ldke"
    sections = ("checkpoint",)

    @property
    def name(self) -> str:
        """Of it in tables."""
        return f"training {self.method}"

    def prepare(self) -> None:
        """Make what all children share."""
        model(), edits()

    def watch(self, aim: Aim, tell: Tell) -> None:
        """Count calls and tell of every checkpoint."""
        watched(State, "save", aim, "checkpoint", lambda state, _: tell(f"step {state.step}"))

    def run(self, folder: Path, aim: Aim, tell: Tell, *, again: bool) -> None:
        """Train, from the last checkpoint on."""
        del aim
        while True:
            try:
                fastedit.train(
                    model(), self.method, edits(), out=folder / "part.safetensors", trainer=TRAINER,
                    show_progress=False, valid_records=2,
                )  # fmt: skip
                return
            except KeyboardInterrupt:
                tell("interrupted")
                if not again:
                    raise

    def look(self, folder: Path, told: list[str]) -> Found:
        """A checkpoint of no earlier step than was told, or the finished part."""
        found, part = Found(), folder / "part.safetensors"
        steps = [int(each.split()[1]) for each in told if each.startswith("step")]
        state = folder / "part.safetensors.training"
        try:
            if part.exists():
                load_artifact(part)
            elif not state.exists():
                found.lost.extend(told if steps else [])
            else:
                from fastedit.files import open_tensors

                with open_tensors(state, "look") as (_, header, _checksum):
                    if steps and header["step"] < max(steps):
                        found.lost.append(f"step {max(steps)} (got {header['step']})")
        except ValueError as error:
            found.half.append(str(error))
        return found

    def keep(self, folder: Path, to: Path) -> None:
        """Write down what there is in the end."""
        (folder / "part.safetensors").rename(to / "part.safetensors")

    def compare(self, folder: Path, kept: Path) -> list[str]:
        """How what there is differs from what was kept."""
        told = tensors_unequal(
            "part", load_artifact(folder / "part.safetensors").tensors, load_artifact(kept / "part.safetensors").tensors
        )
        left = [path.name for path in folder.iterdir() if path.name != "part.safetensors"]
        return told + ([f"files are left: {left}"] if left else [])


Work = LedgerWork | TrainingWork
WORKS: dict[str, Work] = {
    "lora": LedgerWork("lora", "single"),
    "ft": LedgerWork("ft", "sequential"),
    "grace": LedgerWork("grace", "sequential"),
    "ldke": LedgerWork("ldke", "sequential"),
    "train": TrainingWork(),
}


def unequal(one: list[EditDelta], other: list[EditDelta]) -> list[str]:
    """How deltas differ."""
    if [delta.request_id for delta in one] != [delta.request_id for delta in other]:
        return [f"deltas of {[d.request_id for d in one]}, not of {[d.request_id for d in other]}"]
    return [
        problem
        for a, b in zip(one, other, strict=True)
        for problem in tensors_unequal(a.request_id, a.tensors, b.tensors)
    ]


def tensors_unequal(owner: str, one: Any, other: Any) -> list[str]:
    """How tensors by name differ."""
    if one.keys() != other.keys():
        return [f"{owner}: {sorted(one)}, not {sorted(other)}"]
    return [
        f"{owner}: {name} differs by {(one[name].double() - other[name].double()).abs().max():.1e}"
        for name in one
        if one[name].numel() and float((one[name].double() - other[name].double()).abs().max()) > ALIKE
    ]


def alike(one: Any, other: Any) -> bool:
    """Whether plain values are equal, numbers to ``ALIKE``."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return (math.isnan(one) and math.isnan(other)) or abs(one - other) <= ALIKE
    return bool(one == other)


def plain(value: Any) -> Any:
    """A value as JSON has it."""
    return json.loads(json.dumps(value, default=list))
