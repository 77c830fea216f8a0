"""Deltas in a folder: read one by one and checked, made only where that is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastedit.deltas import EditDelta, StoredDeltas
from tests.deltas.test_storage import deltas, equal
from tests.files.damage import flipped, refused_or_same


def stored(folder: Path) -> tuple[StoredDeltas, list[EditDelta]]:
    made = deltas(4)
    store = StoredDeltas.create(folder)
    store.append([made[2], made[0]], [2, 0])
    store.append([made[1], made[3]], [1, 3])
    return store, made


def test_they_come_back_in_order(tmp_path: Path) -> None:
    store, made = stored(tmp_path / "new" / "deltas")
    for each in (store, StoredDeltas(store.folder)):
        assert equal(list(each), made)
        assert each.checksum == store.checksum != ""
    store.append([])
    assert len(store.files()) == 2


def test_reading_never_makes_a_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"deltas: the folder exists \(got folder=.*typo"):
        StoredDeltas(tmp_path / "typo")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"deltas: the folder exists \(got folder=.*file"):
        StoredDeltas(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert len(StoredDeltas.create(tmp_path)) == 0
    stored(tmp_path)
    with pytest.raises(ValueError, match=r"the folder is new or empty \(got .* with 4 deltas\)"):
        StoredDeltas.create(tmp_path)


def test_a_flipped_bit_is_refused_when_the_folder_or_the_delta_is_read(tmp_path: Path) -> None:
    store, made = stored(tmp_path)
    path = store.files()[1]
    refused = refused_or_same(path, lambda: list(StoredDeltas(tmp_path)), lambda read: equal(read, made))
    assert refused >= 500


def reads(store: StoredDeltas, number: int, made: EditDelta) -> bool:
    """Whether a delta is what was written, and not refused."""
    try:
        return store[number].id == made.id
    except ValueError:
        return False


def test_reading_one_checks_that_one_alone(tmp_path: Path) -> None:
    store, made = stored(tmp_path)
    path = store.files()[1]
    content = path.read_bytes()
    front = 8 + int.from_bytes(content[:8], "little")
    seen = set()
    for place in flipped(path):
        if place // 8 < front:
            continue
        bad = [number for number in (1, 3) if not reads(store, number, made[number])]
        assert len(bad) == 1
        seen.add(bad[0])
    assert seen == {1, 3}


def test_a_file_that_another_writer_put_there_is_not_replaced(tmp_path: Path) -> None:
    made = deltas(4)
    one, other = StoredDeltas.create(tmp_path), StoredDeltas.create(tmp_path)
    one.append(made[:2])
    with pytest.raises(ValueError, match=r"one process writes a folder \(got deltas-000000"):
        other.append(made[2:])
    assert equal(list(StoredDeltas(tmp_path)), made[:2])
    assert len(list(tmp_path.iterdir())) == 1


def test_files_that_are_replaced_under_a_reader_are_noticed(tmp_path: Path) -> None:
    made = deltas(4)
    StoredDeltas.create(tmp_path / "a").append(made[:2])
    StoredDeltas.create(tmp_path / "b").append(made[2:])
    store = StoredDeltas(tmp_path / "a")
    (tmp_path / "b" / "deltas-000000.safetensors").replace(tmp_path / "a" / "deltas-000000.safetensors")
    with pytest.raises(ValueError, match="files stay as they were"):
        store[0]


def test_what_killed_writers_left_is_no_delta(tmp_path: Path) -> None:
    store, made = stored(tmp_path)
    (tmp_path / "deltas-000002.safetensors.0badc0de.partial").write_bytes(b"half")
    (tmp_path / "deltas-000002.safetensors.partial").write_bytes(b"half")
    again = StoredDeltas(tmp_path)
    assert equal(list(again), made)
    again.append(deltas(1))
    assert len(StoredDeltas(tmp_path)) == 5
    assert len(store.files()) == 3
