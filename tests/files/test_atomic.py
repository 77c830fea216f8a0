"""Files that are there whole or not at all, and JSON that says when it was changed."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from fastedit.files import clear_partial, read_json, replacing, write_json
from tests.files.damage import refused_or_same
from tests.files.test_tensors import umask

CONTENT: dict[str, Any] = {
    "name": "é", "list": [1, 2.5, None, True], "deep": {"b": 1e-300, "a": 0.1}, "text": "x\ny", 7: (1, 2),
}  # fmt: skip
READ = {"name": "é", "list": [1, 2.5, None, True], "deep": {"b": 1e-300, "a": 0.1}, "text": "x\ny", "7": [1, 2]}


def test_a_block_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with replacing(path) as file:
        file.write(b"one")

    def fails(error: Exception) -> None:
        with replacing(path) as file:
            file.write(b"two")
            raise error

    with pytest.raises(RuntimeError):
        fails(RuntimeError())
    with pytest.raises(OSError, match=rf"No space left on device: '{path}'"):
        fails(OSError(errno.ENOSPC, "No space left on device"))
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]


def test_an_exclusive_file_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    for links in (True, False):
        if not links:
            # a file system without links
            monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
        with replacing(path, exclusive=True) as file:
            file.write(b"one")
        with pytest.raises(FileExistsError), replacing(path, exclusive=True) as file:
            file.write(b"two")
        assert path.read_bytes() == b"one"
        assert list(tmp_path.iterdir()) == [path]
        path.unlink()


def test_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    for name in ("x.partial", "x.0badc0de.partial", "y.0badc0de.partial", "x"):
        (tmp_path / name).write_text("")
    clear_partial(tmp_path, "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "y.0badc0de.partial"]
    clear_partial(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_json_comes_back_checked(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with umask(0o027):
        write_json(path, CONTENT)
    assert read_json(path, "test") == (READ, True)
    assert path.stat().st_mode & 0o777 == 0o640
    data = json.loads(path.read_text())
    assert len(data.pop("sha256")) == 64
    assert data == READ
    path.write_text(json.dumps(data))
    assert read_json(path, "test") == (READ, False)


def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, CONTENT)

    # A bit of the checksum's name makes a field of it, and the rest is what was written
    def same(read: tuple[dict[str, Any], bool]) -> bool:
        return {name: value for name, value in read[0].items() if name in READ} == READ

    assert refused_or_same(path, lambda: read_json(path, "test"), same) > 400


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "[" * 10_000, "\xff", '{"sha256": 7}', '{"sha256": "0"}'])
def test_what_is_no_whole_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"test: .*x\.json"):
        read_json(path, "test")
    with pytest.raises(FileNotFoundError, match=r"test: the file exists"):
        read_json(tmp_path / "absent", "test")
