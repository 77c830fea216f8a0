"""A folder is there whole or not at all, and nothing that is no export is ever overwritten."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from fastedit.export.placing import EXPORT_FILE, placing


def write(folder: Path, text: str, *, overwrite: bool = False) -> None:
    with placing(folder, "text", overwrite=overwrite) as placement:
        (placement.path / "deep").mkdir()
        (placement.path / "deep" / "a.txt").write_text(text)
        placement.report["lines"] = 1


def left(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_folder_appears_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "out"
    with placing(folder, "text") as placement:
        (placement.path / "a.txt").write_text("a")
        placement.report["error"] = float("nan")
        assert left(folder) == [".fastedit.lock"]
    assert placement.exported.files == (folder / "a.txt", folder / EXPORT_FILE)
    assert placement.exported.report == {"error": None}
    assert json.loads((folder / EXPORT_FILE).read_text())["kind"] == "text"
    assert left(tmp_path) == ["new/out/a.txt", f"new/out/{EXPORT_FILE}"]


def test_nothing_is_left_of_what_failed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), placing(tmp_path / "out", "text") as placement:
        (placement.path / "no" / "a.txt").write_text("a")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_export_that_was_there(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with pytest.raises(OSError, match="full"), placing(tmp_path / "out", "text", overwrite=True):
        raise OSError("full")
    assert (tmp_path / "out" / "deep" / "a.txt").read_text() == "old"
    assert left(tmp_path) == ["out/deep/a.txt", f"out/{EXPORT_FILE}"]


def test_an_export_is_replaced_where_that_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    (tmp_path / "out" / "more.txt").write_text("of the old one")
    with pytest.raises(ValueError, match=r"is new or empty .* overwrite=True replaces an earlier export"):
        write(tmp_path / "out", "new")
    write(tmp_path / "out", "new", overwrite=True)
    assert (tmp_path / "out" / "deep" / "a.txt").read_text() == "new"
    assert left(tmp_path) == ["out/deep/a.txt", f"out/{EXPORT_FILE}"]


def test_what_is_no_export_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"holds an earlier export .* \(got 'photo.png' in"):
        write(tmp_path, "new", overwrite=True)
    assert left(tmp_path) == ["photo.png"]


def test_what_a_killed_export_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".out.0123abcd.partial").mkdir()
    (tmp_path / ".out.0123abcd.old.partial").mkdir()
    (tmp_path / ".other.0123abcd.partial").mkdir()
    write(tmp_path / "out", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.0123abcd.partial", "out"]


def test_one_writes_at_a_time(tmp_path: Path) -> None:
    refused: list[str] = []

    def second() -> None:
        try:
            write(tmp_path / "out", "second")
        except ValueError as error:
            refused.append(str(error))

    with placing(tmp_path / "out", "text") as placement:
        (placement.path / "a.txt").write_text("first")
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(refused) == 1
    assert "one process writes at a time" in refused[0]
    assert (tmp_path / "out" / "a.txt").read_text() == "first"
