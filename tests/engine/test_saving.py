"""A run's folder holds one run as a whole, whenever its writer is stopped."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fastedit
from fastedit import EditRequest
from fastedit.backbone import EditableModel
from fastedit.deltas import StoredDeltas, save_deltas
from fastedit.engine.run import Run, Timing
from fastedit.evaluation import EditScores, Score
from fastedit.files import claim_folder
from fastedit.fitting.solver import FitOutcome
from fastedit.report import REPORT
from fastedit.training import Artifact, save_artifact
from tests.deltas.test_storage import deltas as some_deltas
from tests.files.damage import flipped
from tests.files.test_tensors import umask

#: How the deltas of a run lie: in memory, in files elsewhere, in files in the folder itself.
LAYOUTS = ("memory", "elsewhere", "inside")


def make(label: str, layout: str, folder: Path, *, artifact: bool, elsewhere: Path) -> Run:
    """A run whose every part tells its label."""
    shift = 10 * (1 + ["old", "new", "third"].index(label))
    made = [
        replace(delta, tensors={k: t + shift for k, t in delta.tensors.items()}, request_id=f"{label}-{n}")
        for n, delta in enumerate(some_deltas(3))
    ]
    deltas: Any = made
    if layout != "memory":
        deltas = StoredDeltas.create(folder / "deltas" if layout == "inside" else elsewhere / f"{label}-stored")
        deltas.append([made[1], made[0]], [1, 0])
        deltas.append([made[2]], [2])
    part = Artifact("mend", "f" * 64, {"label": label}, {"a": torch.full((3,), float(shift))}) if artifact else None
    answer = {"score": "reliability", "prompt": "Who?", "wanted": label, "before": "", "after": label}
    scored = [EditScores({"reliability": 1.0}, {"reliability": 0.5}, [answer]) for _ in made]
    return Run(
        deltas,
        [FitOutcome("converged", shift + n, 0.25, float("nan")) for n in range(3)],
        {"strict": {"reliability": Score(0.5, 0.25, 0.75, 3)}},
        scored,
        Timing(1.0, {"solve": 2.0}, shift, 100.0),
        {"label": label, "model": {"fingerprint": "f" * 64}},
        {2: {"strict": {"reliability": Score(0.5, 0.25, 0.75, 2)}}},
        part,
    )


def whole(run: Run) -> tuple[Any, ...]:
    """Everything that a run says."""
    ids = [(delta.id, delta.request_id, delta.fitted_on) for delta in run.deltas]
    return ids, json.dumps(run.record(), sort_keys=True), None if run.artifact is None else run.artifact.id


def pairs() -> Iterator[Any]:
    for old, new in (
        ("none", "memory"), ("none", "elsewhere"), ("none", "inside"), ("memory", "memory"), ("memory", "elsewhere"),
        ("memory", "inside"), ("elsewhere", "memory"), ("elsewhere", "elsewhere"), ("inside", "memory"),
    ):  # fmt: skip
        for artifacts in ((False, True), (True, False), (True, True)):
            yield pytest.param(old, new, artifacts, id=f"{old}-{new}-{'+'.join('01'[a] for a in artifacts)}")


class Killed(BaseException):
    """No handler catches it."""


@contextmanager
def dies_at(call: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The process ends before the n-th call that changes a disk, and makes no other: no handler cleans up either."""
    calls: list[str] = []

    def patched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def called(*given: Any, **named: Any) -> Any:
            calls.append(name)
            if len(calls) > call:
                raise Killed
            return real(*given, **named)

        return called

    with monkeypatch.context() as patch:
        for name in ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync", "link", "ftruncate"):
            patch.setattr(os, name, patched(name, getattr(os, name)))
        patch.setattr(shutil, "copyfile", patched("copyfile", shutil.copyfile))
        yield calls


@pytest.mark.parametrize(("old", "new", "artifacts"), list(pairs()))
def test_a_kill_at_any_moment_leaves_the_old_run_or_the_new_one(
    old: str, new: str, artifacts: tuple[bool, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, call = set(), 0
    while True:
        base = tmp_path / str(call)
        folder = base / "run"
        known = {}
        if old != "none":
            before = make("old", old, folder, artifact=artifacts[0], elsewhere=base)
            before.save(folder)
            known["old"] = whole(before)
        after = make("new", new, folder, artifact=artifacts[1], elsewhere=base)
        known["new"] = whole(after)
        ended = False
        with dies_at(call, monkeypatch):
            try:
                after.save(folder)
                ended = True
            except Killed:
                pass
        try:
            read = whole(Run.load(folder))
        except FileNotFoundError:
            assert old == "none"
            seen.add("nothing")
        else:
            seen.add(next(name for name, run in known.items() if run == read))
        # What the killed one left does not stand in the way of the next
        after.save(folder)
        assert whole(Run.load(folder)) == known["new"]
        left = {path.name for path in folder.iterdir()}
        stored = {"deltas"} if new != "memory" or old == "inside" else {"deltas.safetensors"}
        stored |= {"deltas.safetensors"} if new == "memory" else set()
        assert left == {"scores.json", REPORT} | stored | ({"artifact.safetensors"} if artifacts[1] else set())
        shutil.rmtree(base)
        if ended:
            break
        call += 1
    assert call > 5
    assert seen == ({"nothing", "new"} if old == "none" else {"old", "new"})


@pytest.mark.parametrize("layout", ["memory", "elsewhere"])
def test_a_full_disk_leaves_the_run_that_was_there(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    folder = tmp_path / "run"
    old = make("old", "memory", folder, artifact=True, elsewhere=tmp_path)
    new = make("new", layout, folder, artifact=True, elsewhere=tmp_path)
    old.save(folder)
    names = sorted(path.name for path in folder.iterdir())
    real_fsync, real_copy = os.fsync, shutil.copyfile
    for at in range(3):
        count = [0]

        def full(real: Callable[..., Any], *given: Any, counted: list[int] = count, at: int = at) -> Any:
            counted[0] += 1
            if counted[0] > at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*given)

        monkeypatch.setattr(os, "fsync", lambda fd, full=full: full(real_fsync, fd))
        monkeypatch.setattr(shutil, "copyfile", lambda a, b, full=full: full(real_copy, a, b))
        message = r"run: it was not saved, and what was in .*run' is as it was: No space left on device"
        with pytest.raises(OSError, match=message):
            new.save(folder)
        assert whole(Run.load(folder)) == whole(old)
        assert sorted(path.name for path in folder.iterdir()) == names


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_disk_that_is_really_full_leaves_the_run_that_was_there(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], check=False)
    if mount.returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        old = make("old", "memory", disk / "run", artifact=True, elsewhere=tmp_path)
        old.save(disk / "run")
        large = {"a": torch.zeros(1 << 20)}
        new = replace(old, artifact=Artifact("mend", "f" * 64, {}, large))
        with pytest.raises(OSError, match=r"what was in .* is as it was: No space left on device"):
            new.save(disk / "run")
        assert whole(Run.load(disk / "run")) == whole(old)
        assert not list(disk.rglob("*.partial"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("layouts", [("memory", "memory"), ("elsewhere", "memory"), ("elsewhere", "elsewhere")])
def test_a_process_that_is_killed_leaves_one_whole_run(layouts: tuple[str, str], tmp_path: Path) -> None:
    folder, draw = tmp_path / "run", random.Random(3)
    labels = ("old", "new")
    runs = [
        make(label, layout, folder, artifact=True, elsewhere=tmp_path)
        for label, layout in zip(labels, layouts, strict=True)
    ]
    known = [whole(run) for run in runs]
    runs[0].save(folder)
    for _ in range(12):
        writer = os.fork()
        if writer == 0:
            try:
                while True:
                    for run in runs:
                        run.save(folder)
            finally:
                os._exit(1)
        end = time.monotonic() + draw.uniform(0.0, 0.15)
        while time.monotonic() < end:
            # A writer that never rests may be faster than the reader; deltas in files are read later
            with suppress(FileNotFoundError, ValueError):
                assert whole(Run.load(folder)) in known
        os.kill(writer, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1]) == -signal.SIGKILL
        assert whole(Run.load(folder)) in known


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("artifact", [False, True])
def test_saved_twice_and_loaded_and_saved_again(layout: str, artifact: bool, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = make("old", layout, folder, artifact=artifact, elsewhere=tmp_path)
    expected = whole(run)
    for _ in range(2):
        assert whole(Run.load(run.save(folder))) == expected
    loaded = Run.load(folder)
    assert whole(Run.load(loaded.save(folder))) == expected
    assert whole(Run.load(loaded.save(tmp_path / "other"))) == expected
    assert whole(Run.load(run.save(tmp_path / "other"))) == expected
    assert whole(Run.load(folder)) == expected


def test_deltas_of_a_run_that_was_not_saved_are_not_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    inside = make("old", "inside", folder, artifact=False, elsewhere=tmp_path)
    other = make("new", "elsewhere", folder, artifact=False, elsewhere=tmp_path)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"deltas in the folder is free .*another run.*move them away, or save"):
            other.save(folder)
        # nor those of one that was saved where it wrote them
        assert whole(Run.load(inside.save(folder))) == whole(inside)


def test_a_folder_that_another_process_writes_is_refused(tmp_path: Path) -> None:
    import threading

    run = make("old", "memory", tmp_path, artifact=False, elsewhere=tmp_path)
    errors: list[str] = []

    def save() -> None:
        try:
            run.save(tmp_path)
        except ValueError as error:
            errors.append(str(error))

    with claim_folder(tmp_path, "test"):
        thread = threading.Thread(target=save)
        thread.start()
        thread.join()
        assert "run: one process writes at a time" in errors[0]
        run.save(tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_flipped_bit_anywhere_in_a_run_is_refused(layout: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = make("old", layout, folder, artifact=True, elsewhere=tmp_path)
    expected = whole(run)
    run.save(folder)
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != REPORT]
    assert len(files) == (3 if layout == "memory" else 4)
    for path in files:
        refused = 0
        for place in flipped(path, count=200):
            read, message = None, ""
            try:
                read = whole(Run.load(folder))
            except (ValueError, FileNotFoundError) as error:
                message = str(error)
            refused += bool(message)
            assert path.name in message or str(path) in message or read == expected, (
                f"{path.name}, bit {place}: {message}"
            )
        assert refused > 300
    assert whole(Run.load(folder)) == expected


def test_files_of_different_runs_are_not_put_together(tmp_path: Path) -> None:
    """Each whole by itself, with the same ids of edits."""
    for layout in ("memory", "elsewhere"):
        a, b = tmp_path / layout / "a", tmp_path / layout / "b"
        one = make("old", layout, a, artifact=True, elsewhere=tmp_path / layout)
        other = make("new", layout, b, artifact=True, elsewhere=tmp_path / layout)
        one.save(a)
        other.save(b)
        for name in sorted(path.name for path in a.iterdir() if path.name != REPORT):
            shutil.move(a / name, tmp_path / "kept")
            (shutil.copytree if (b / name).is_dir() else shutil.copyfile)(b / name, a / name)
            with pytest.raises(ValueError, match="are of one run"):
                Run.load(a)
            (shutil.rmtree if (a / name).is_dir() else os.unlink)(a / name)
            shutil.move(tmp_path / "kept", a / name)
        assert whole(Run.load(a)) == whole(one)


@pytest.mark.parametrize("mask", [0o022, 0o027])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_files_of_a_run_have_the_mode_of_the_umask(mask: int, layout: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with umask(mask):
        make("old", layout, folder, artifact=True, elsewhere=tmp_path).save(folder)
    for path in (folder, *folder.rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask, path


def test_runs_of_earlier_versions_are_read_with_a_warning(tmp_path: Path) -> None:
    run = make("old", "memory", tmp_path, artifact=True, elsewhere=tmp_path)
    assert isinstance(run.deltas, list)
    save_deltas(run.deltas, tmp_path / "deltas.safetensors")
    assert run.artifact is not None
    save_artifact(run.artifact, tmp_path / "artifact.safetensors")
    (tmp_path / "scores.json").write_text(json.dumps(run.record()))
    with pytest.warns(UserWarning, match=r"scores\.json was written without checksums"):
        assert whole(Run.load(tmp_path)) == whole(run)
    new = make("new", "elsewhere", tmp_path, artifact=False, elsewhere=tmp_path)
    assert whole(Run.load(new.save(tmp_path))) == whole(new)
    assert not (tmp_path / "deltas.safetensors").exists()
    assert not (tmp_path / "artifact.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "fastedit-run/9"}, r"run: format is 'fastedit-run/2'.*got format='fastedit-run/9'"),
        ({"edits": None}, r"run: scores\.json is complete"),
        ({"timing": {"more": 1}}, r"run: scores\.json is complete"),
        ({"provenance": None}, r"run: scores\.json is complete"),
    ],
)
def test_scores_that_are_incomplete_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    from fastedit.files import read_json, write_json

    make("old", "memory", tmp_path, artifact=False, elsewhere=tmp_path).save(tmp_path)
    write_json(tmp_path / "scores.json", {**read_json(tmp_path / "scores.json", "test")[0], **change})
    with pytest.raises(ValueError, match=message):
        Run.load(tmp_path)


def test_leftovers_of_killed_processes_are_cleaned_up(tmp_path: Path) -> None:
    old = make("old", "memory", tmp_path, artifact=False, elsewhere=tmp_path)
    old.save(tmp_path)
    for name in ("deltas.safetensors.next", "scores.json.0badc0de.partial", "scores.json.partial", ".fastedit.lock"):
        (tmp_path / name).write_bytes(b"half")
    for name in ("deltas.next", "deltas.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "deltas-000000.safetensors.0badc0de.partial").write_bytes(b"half")
    assert whole(Run.load(tmp_path)) == whole(old)
    old.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deltas.safetensors", REPORT, "scores.json"]


def test_a_run_is_exported_with_its_own_edits(model: EditableModel, edits: list[EditRequest], tmp_path: Path) -> None:
    run = fastedit.edit(model, edits[:2], "lora", steps=2, mode="sequential", evaluate=False, show_progress=False)
    exported = run.export("merged", tmp_path / "out", model, edits=edits[:2], max_new_tokens=2)
    assert exported.report["held"]["asked"] == 2
    assert exported.report["edits"] == ["edit-0", "edit-1"]
    with pytest.raises(ValueError, match=r"edits\[0\] with id='edit-1', of the run 'edit-0'"):
        run.export("merged", tmp_path / "other", model, edits=edits[1::-1])
    with pytest.raises(ValueError, match="did you mean 'merged'"):
        run.export("merge", tmp_path / "other", model)
    assert not (tmp_path / "other").exists()
