"""Where a run writes is tried before any work, and is nobody else's meanwhile."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

import fastedit
from fastedit import EditRequest
from fastedit.backbone import EditableModel
from fastedit.engine.output import claim_output, claim_result, expected_output_bytes
from fastedit.files import claim_file
from fastedit.methods import resolve
from tests.engine.conftest import make_edits
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
