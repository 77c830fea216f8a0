"""Where a run writes is tried before any work, and is nobody else's meanwhile."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest

import fastedit
from fastedit import EditRequest
from fastedit.backbone import EditableModel
from fastedit.deltas import StoredDeltas
from fastedit.engine import Run
from fastedit.engine.output import claim_output, claim_result, expected_output_bytes
from fastedit.files import claim_file, claim_folder
from fastedit.methods import resolve
from tests.engine.conftest import make_edits
from tests.engine.test_editing import largest_difference, run
from tests.engine.test_train import BRIEF, SMALL


def in_a_thread(call: Any) -> str:
    """What a call is refused with elsewhere."""
    errors: list[str] = []

    def attempt() -> None:
        try:
            call()
        except ValueError as error:
            errors.append(str(error))

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    return errors[0] if errors else ""


def test_a_folder_is_made_for_the_block_and_goes_if_it_stays_empty(tmp_path: Path) -> None:
    with claim_output(tmp_path / "a" / "b") as folder:
        assert folder.is_dir()
        assert in_a_thread(lambda: claim_output(folder).__enter__()).startswith("output: one process writes at a time")
    assert list(tmp_path.iterdir()) == []
    with claim_output(tmp_path / "a") as folder:
        (folder / "kept").write_text("")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept"]


@pytest.mark.parametrize("name", ["scores.json", "comparison.json", "deltas.safetensors", "deltas-000000.safetensors"])
def test_an_earlier_run_is_refused_unless_it_may_be_overwritten(tmp_path: Path, name: str) -> None:
    for path in (tmp_path / name, tmp_path / "two" / "deltas" / "deltas-000000.safetensors"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    for folder in (tmp_path, tmp_path / "two"):
        with pytest.raises(ValueError, match=r"output: the folder holds no earlier run.*--overwrite \(got .*folder="):
            claim_output(folder).__enter__()
        with claim_output(folder, overwrite=True):
            pass
    assert (tmp_path / name).exists()


def test_a_disk_without_room_is_refused(tmp_path: Path) -> None:
    for claim, path in ((claim_output, tmp_path), (claim_result, tmp_path / "x")):
        with claim(path, expected_bytes=1 << 20):  # type: ignore[operator]
            pass
        with pytest.raises(
            ValueError, match=r"out: the disk has room for what will be written \(got 1,.* MiB for .* MiB"
        ):
            claim(path, expected_bytes=1 << 80, field="out").__enter__()  # type: ignore[operator]


@pytest.mark.parametrize("method", ["ft", "lora", "grace", "wise", "ike", "tpatcher"])
def test_what_is_expected_is_what_is_written(
    exact_model: EditableModel, edits: list[EditRequest], tmp_path: Path, method: str
) -> None:
    settings: dict[str, Any] = {} if method == "ike" else {"steps": 1}
    made = fastedit.edit(
        exact_model, edits, method, pool=make_edits(8)[5:], evaluate=True, show_progress=False, **settings
    )
    folder = made.save(tmp_path / "run")
    size = sum(path.stat().st_size for path in folder.iterdir())
    expected = expected_output_bytes(exact_model, resolve(method, settings), len(edits))
    assert size <= expected < 2 * size + 100_000


def test_a_deltas_folder_that_cannot_be_used_is_refused_before_any_work(
    model: EditableModel, edits: list[EditRequest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(model), "encode", lambda *_a, **_k: pytest.fail("work had started"))
    (tmp_path / "file").write_text("")

    def attempt(folder: Path) -> None:
        fastedit.edit(model, edits, "ft", deltas_folder=folder)

    for folder, message in (
        (tmp_path / "file", r"edit: the folder is no file \(got folder="),
        (tmp_path / "file" / "deltas", r"edit: what folder lies in is no file"),
    ):
        with pytest.raises(ValueError, match=message):
            attempt(folder)
    with claim_folder(tmp_path / "deltas", "test"):
        assert "edit: one process writes at a time; process" in in_a_thread(lambda: attempt(tmp_path / "deltas"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("usage", (), {"free": 10})())
    with pytest.raises(ValueError, match=r"edit: the disk has room for what will be written"):
        attempt(tmp_path / "deltas")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_two_processes_do_not_share_a_folder(
    exact_model: EditableModel, edits: list[EditRequest], tmp_path: Path
) -> None:
    """Both begin at once; the second ends at once, and the first with its own deltas alone."""
    folder = tmp_path / "deltas"
    ready, go = os.pipe()
    children = []
    for method in ("lora", "ft"):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.read(ready, 1)
                made = run(exact_model, edits, method, batch_size=1, steps=3, deltas_folder=folder)
                code = 0 if {delta.spec.kind for delta in made.deltas} == {made.deltas[0].spec.kind} else 3
            except ValueError as error:
                code = 2 if "edit: one process writes at a time" in str(error) else 4
            finally:
                os._exit(code)
        children.append(child)
    os.write(go, b"ab")
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    os.close(ready)
    os.close(go)
    assert sorted(codes) == [0, 2]
    left = StoredDeltas(folder)
    assert len(left) == len(edits)
    assert {delta.spec.kind for delta in left} == {("low_rank", "full")[codes.index(0)]}
    assert not [path for path in folder.iterdir() if not path.name.startswith("deltas-")]


def test_deltas_of_an_earlier_run_are_removed_where_that_is_asked_for(
    exact_model: EditableModel, edits: list[EditRequest], tmp_path: Path
) -> None:
    folder = tmp_path / "run" / "deltas"
    first = run(exact_model, edits, batch_size=2, steps=1, deltas_folder=folder)
    first.save(tmp_path / "run")
    second = run(exact_model, edits[:2], batch_size=2, steps=2, deltas_folder=folder, overwrite=True)
    assert len(StoredDeltas(folder)) == 2
    # the scores that are still there are not those of these deltas
    with pytest.raises(ValueError, match="are of one run"):
        Run.load(tmp_path / "run")
    again = Run.load(second.save(tmp_path / "run"))
    assert largest_difference(list(again.deltas), list(second.deltas)) == 0
    (folder / "deltas-000000.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"new or empty \(got .* with deltas that cannot be read\); overwrite=True"):
        run(exact_model, edits[:2], steps=1, deltas_folder=folder)
    run(exact_model, edits[:2], steps=1, deltas_folder=folder, overwrite=True)


def test_a_disk_that_is_full_meanwhile_costs_no_delta_that_was_written(
    exact_model: EditableModel, edits: list[EditRequest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.fsync, [0]

    def full(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Exception, match=r"No space left on device: '.*deltas-000002\.safetensors'"):
        run(exact_model, edits, batch_size=1, steps=1, deltas_folder=tmp_path / "deltas")
    monkeypatch.undo()
    left = StoredDeltas(tmp_path / "deltas")
    assert left.request_ids == [edit.id for edit in edits[:2]]
    kept = run(exact_model, edits[:2], batch_size=1, steps=1)
    assert largest_difference(list(left), list(kept.deltas)) == 0
    assert len(list(left.folder.iterdir())) == 2


def test_training_tries_its_file_before_any_work(
    model: EditableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attempt(out: Path) -> Any:
        return fastedit.train(model, "mend", make_edits(6), out=out, trainer=BRIEF, **SMALL)

    with monkeypatch.context() as patch:
        patch.setattr(type(model), "encode", lambda *_a, **_k: pytest.fail("work had started"))
        (tmp_path / "file").write_text("")
        with pytest.raises(ValueError, match=r"train: what file lies in is no file"):
            attempt(tmp_path / "file" / "mend")
        with pytest.raises(ValueError, match=r"train: the file is no folder"):
            attempt(tmp_path)
        with claim_file(tmp_path / "mend", "test"):
            assert "train: one process writes at a time" in in_a_thread(lambda: attempt(tmp_path / "mend"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("usage", (), {"free": 10})())
    monkeypatch.setattr("fastedit.engine.train.train_task", lambda *_a, **_k: pytest.fail("work had started"))
    with pytest.raises(ValueError, match=r"train: the disk has room"):
        attempt(tmp_path / "mend")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
