"""What is damaged is found by name, and edits that do not hold are told."""

from __future__ import annotations

import random
import shutil
import sqlite3
from pathlib import Path

import pytest

import fastedit
from fastedit import DamagedLedger, EditRequest, Ledger
from fastedit.backbone import EditableModel
from tests.ledger.conftest import FEW


@pytest.fixture(scope="module")
def written(model: EditableModel, edits: list[EditRequest], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed ledger with some of everything."""
    folder = tmp_path_factory.mktemp("written") / "edits"
    with fastedit.open_ledger(folder, model) as ledger:
        ledger.edit(edits[:3], "grace", **FEW)
        ledger.tag("three")
        ledger.compact()
        ledger.edit(edits[3:5], "grace", **FEW)
    return folder


def flip(path: Path, place: int) -> None:
    """Turn one bit of a file."""
    content = bytearray(path.read_bytes())
    content[place // 8] ^= 1 << (place % 8)
    path.write_bytes(bytes(content))


def found_in(folder: Path) -> tuple[str, ...]:
    """What is wrong with a ledger, where it can be opened and where it cannot."""
    try:
        with fastedit.open_ledger(folder) as ledger:
            return ledger.verify().problems
    except fastedit.LedgerError as error:
        return (str(error),)


def test_a_ledger_that_was_closed_is_sound(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written, tmp_path / "copy")
    found = fastedit.open_ledger(tmp_path / "copy").verify()
    assert (found.problems, found.edits, found.asked) == ((), 5, None)
    assert str(found).endswith("5 edits that act: sound")
    assert found.files > 12


def test_a_bit_that_flips_is_found_by_the_name_of_its_file(written: Path, tmp_path: Path) -> None:
    draw = random.Random(3)
    files = [path.relative_to(written) for path in sorted(written.rglob("*")) if path.is_file()]
    assert not [path for path in files if "-" in path.name]
    assert {"ledger.sqlite", "commits.log", "ledger.sha256"} <= {str(path) for path in files}
    tries = [(path, draw.randrange(8 * (written / path).stat().st_size)) for path in files for _ in range(4)
             if (written / path).stat().st_size]  # fmt: skip
    tries += [
        (Path("ledger.sqlite"), draw.randrange(8 * (written / "ledger.sqlite").stat().st_size)) for _ in range(60)
    ]
    for number, (name, place) in enumerate(tries):
        copy = tmp_path / str(number)
        shutil.copytree(written, copy)
        flip(copy / name, place)
        problems = found_in(copy)
        # What cannot be opened says so at once, by the name of the database whichever of the two it is
        wanted = {name.name, "ledger.sqlite"} if name.name == "commits.log" else {name.name}
        assert any(each in problem for problem in problems for each in wanted), (name, place, problems)
        shutil.rmtree(copy)


def test_commits_that_are_lost_with_the_wal_file_are_missed(
    model: EditableModel, edits: list[EditRequest], tmp_path: Path
) -> None:
    ledger = fastedit.open_ledger(tmp_path / "edits", model)
    ledger.edit(edits[:2], "grace", evaluate=False, **FEW)
    copy = tmp_path / "copy"
    shutil.copytree(ledger.folder, copy)
    wal = copy / "ledger.sqlite-wal"
    assert wal.stat().st_size
    fastedit.open_ledger(copy).close()
    # SQLite takes the frames up to the first that is broken, and says nothing
    shutil.rmtree(copy)
    shutil.copytree(ledger.folder, copy)
    flip(wal, 8 * (wal.stat().st_size - 100))
    (copy / "ledger.sqlite-shm").unlink()
    with pytest.raises(DamagedLedger, match=r"ledger\.sqlite and ledger.sqlite-wal hold every commit"):
        fastedit.open_ledger(copy)


def test_a_missing_file_is_named(written: Path, tmp_path: Path) -> None:
    for folder in ("segments", "images"):
        copy = tmp_path / folder
        shutil.copytree(written, copy)
        gone = sorted((copy / folder).iterdir())[0]
        gone.unlink()
        problems = fastedit.open_ledger(copy).verify().problems
        assert problems == (f"{folder}/{gone.name}: cannot be read, No such file or directory",)


@pytest.mark.parametrize("change", [
    "DELETE FROM events WHERE id = 3", "DELETE FROM versions WHERE edit = 2",
    "UPDATE versions SET until = 1 WHERE id = 2",
    "UPDATE edits SET target = 'mauve' WHERE id = 1", "UPDATE versions SET row = 7 WHERE id = 1",
    "DELETE FROM events WHERE id = (SELECT max(id) FROM events)", "INSERT INTO tags VALUES ('evil', 2, 'x')",
])  # fmt: skip
def test_rows_that_were_changed_are_found(written: Path, tmp_path: Path, change: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(written, copy)
    (copy / "ledger.sha256").unlink()
    connection = sqlite3.connect(copy / "ledger.sqlite")
    connection.execute(change)
    connection.commit()
    connection.close()
    problems = found_in(copy)
    assert any("ledger.sqlite" in problem for problem in problems)


def test_edits_that_do_not_hold_are_told(ledger: Ledger, edits: list[EditRequest]) -> None:
    told = {"mode": "single", "evaluate": False, "show_progress": False}
    ledger.edit(edits[:1], "lora", steps=60, lr=1e-2, **told)
    ledger.edit(edits[1:2], "lora", steps=1, lr=1e-9, **told)
    found = ledger.verify(ask=True)
    assert (found.sound, found.asked, [each.edit for each in found.lost]) == (True, 2, [2])
    assert "1 of 2 edits hold" in str(found)
    assert "edit 2: 'What is number 1 here?' is answered" in str(found)


def test_a_damaged_delta_does_not_act(written: Path, model: EditableModel, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(written, copy)
    path = sorted((copy / "segments").iterdir())[0]
    flip(path, 8 * (path.stat().st_size - 5))
    with fastedit.open_ledger(copy, model) as ledger, pytest.raises(DamagedLedger, match=path.name):
        list(ledger.state().deltas)
