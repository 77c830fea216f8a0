"""One door to every export: kinds and options by name, deltas and requests checked before any work."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import fastedit
from fastedit.backbone import EditableModel
from fastedit.deltas import EditDelta, StoredDeltas
from fastedit.export import Exported, export_deltas
from tests.engine.conftest import make_edits


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return fastedit.load("random:llava-tiny", dtype="float64")


@pytest.fixture(scope="module")
def delta(model: EditableModel) -> EditDelta:
    run = fastedit.edit(model, make_edits(1), "lora", steps=2, layers=1, evaluate=False, show_progress=False)
    return run.deltas[0]


@pytest.fixture
def only_one(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A kind of export that keeps what it was called with."""
    import fastedit.export
    import fastedit.export.placing as module

    calls: list[Any] = []

    def export_nothing(
        model: EditableModel, deltas: Any, folder: Path, *, requests: Any = (), overwrite: bool = False
    ) -> Exported:
        calls.append((deltas, folder, requests, overwrite))
        return Exported("nothing", folder)

    monkeypatch.setattr(module, "export_nothing", export_nothing, raising=False)
    monkeypatch.setitem(fastedit.export.EXPORTS, "nothing", ("placing", "export_nothing"))
    return calls


def test_an_export_says_what_it_is() -> None:
    assert repr(Exported("peft", Path("out"), (Path("out/a"),))) == "<Exported: peft as 1 file in 'out'>"


def test_the_kind_gets_checked_deltas_and_its_options(
    model: EditableModel, delta: EditDelta, only_one: list[Any], tmp_path: Path
) -> None:
    edits = make_edits(1)
    export_deltas("nothing", model, delta, str(tmp_path), requests=edits, overwrite=True)
    assert only_one == [([delta], tmp_path, edits, True)]


def test_unknown_kinds_and_options_name_the_nearest(
    model: EditableModel, delta: EditDelta, only_one: list[Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"kind 'merge' is not known; did you mean 'merged'\?"):
        export_deltas("merge", model, [delta], tmp_path)
    with pytest.raises(ValueError, match=r"option 'overwrit' .* did you mean 'overwrite'\? \(got overwrit=True\)"):
        export_deltas("nothing", model, [delta], tmp_path, overwrit=True)
    assert not only_one


def test_deltas_and_requests_are_checked_first(
    model: EditableModel, delta: EditDelta, only_one: list[Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="at least one delta"):
        export_deltas("nothing", model, [], tmp_path)
    with pytest.raises(ValueError, match=r"got 2 requests for 1 deltas"):
        export_deltas("nothing", model, delta, tmp_path, requests=make_edits(2))
    with pytest.raises(TypeError, match="must be an EditDelta or a list of them"):
        export_deltas("nothing", model, [delta, "edit"], tmp_path)  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"its deltas are in \.deltas"):
        export_deltas("nothing", model, SimpleNamespace(deltas=[delta]), tmp_path)  # type: ignore[arg-type]
    other = fastedit.load("random:llava-tiny", dtype="float32")
    with pytest.raises(ValueError, match="fitted on"):
        export_deltas("nothing", other, delta, tmp_path)
    assert not only_one


def test_deltas_in_files_are_not_held_together(
    model: EditableModel, delta: EditDelta, only_one: list[Any], tmp_path: Path
) -> None:
    stored = StoredDeltas.create(tmp_path / "deltas")
    stored.append([delta, delta])
    export_deltas("nothing", model, stored, tmp_path / "out")
    assert only_one[0][0] is stored
