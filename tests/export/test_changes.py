"""The changed weights alone: applied to their base they are the merged checkpoint, to any other they are refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import fastedit
from fastedit import EditRequest
from fastedit.backbone import EditableModel
from fastedit.backbone.fingerprint import weights_hash
from fastedit.deltas import EditDelta
from fastedit.export import export_deltas
from fastedit.export.changes import FILE
from fastedit.files import read_tensors, write_tensors


@pytest.fixture(scope="module")
def folder(model: EditableModel, deltas: list[EditDelta], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("delta") / "out"
    exported = export_deltas("delta", model, deltas, path)
    assert len(exported.files) == 2
    assert set(exported.report["weights"]) == set(read_tensors(path / FILE, "fastedit.changes/1", "test")[0])
    return path


def answers(model: EditableModel, edits: list[EditRequest]) -> list[str]:
    return model.generate([edit.query for edit in edits], max_new_tokens=12)


def test_a_model_has_the_edits_until_they_are_undone(
    model: EditableModel, deltas: list[EditDelta], folder: Path, edits: list[EditRequest]
) -> None:
    with fastedit.applied(model, deltas):
        wanted = answers(model, edits)
    user = fastedit.load("pocket-llava")
    weights, before = weights_hash(user.hf), answers(user, edits)
    applied = fastedit.apply_delta(user.hf, folder)
    assert answers(user, edits) == wanted != before
    applied.undo()
    applied.undo()
    assert weights_hash(user.hf) == weights
    with fastedit.apply_delta(user, folder):
        assert answers(user, edits) == wanted
    assert (weights_hash(user.hf), answers(user, edits)) == (weights, before)


def test_a_checkpoint_becomes_the_merged_one(
    model: EditableModel, deltas: list[EditDelta], folder: Path, tmp_path: Path
) -> None:
    export_deltas("merged", model, deltas, tmp_path / "merged")
    assert fastedit.apply_delta("pocket-llava", folder, out=tmp_path / "new") == tmp_path / "new"
    merged, new = (fastedit.load(tmp_path / name) for name in ("merged", "new"))
    assert weights_hash(merged.hf) == weights_hash(new.hf) != weights_hash(model.hf)
    with pytest.raises(ValueError, match=r"new or empty"):
        fastedit.apply_delta("pocket-llava", folder, out=tmp_path / "new")


def test_another_base_is_refused_by_name(folder: Path) -> None:
    other = fastedit.load("pocket-llava")
    name = "model.language_model.layers.2.mlp.up_proj.weight"
    with torch.no_grad():
        other.hf.get_parameter(name)[0, 0] += 1
    weights = weights_hash(other.hf)
    with pytest.raises(ValueError, match=rf"got another '{name}'; the delta is of 'pocket-llava' in float32"):
        fastedit.apply_delta(other.hf, folder)
    assert weights_hash(other.hf) == weights
    with pytest.raises(ValueError, match=r"the architecture that .* Blip2ForConditionalGeneration .*'pocket-llava'"):
        fastedit.apply_delta(fastedit.load("pocket-blip2").hf, folder)
    with pytest.raises(ValueError, match=r"in their type and shape \(got torch.bfloat16"):
        fastedit.apply_delta(fastedit.load("pocket-llava", dtype="bfloat16"), folder)
    with pytest.raises(ValueError, match=r"out names the new folder where base is a checkpoint"):
        fastedit.apply_delta("pocket-llava", folder)
    with pytest.raises(ValueError, match=r"a model is changed in place"):
        fastedit.apply_delta(other, folder, out="somewhere")


def test_weights_that_were_trained_since_are_not_overwritten(folder: Path) -> None:
    user = fastedit.load("pocket-llava").hf
    applied = fastedit.apply_delta(user, folder)
    with torch.no_grad():
        user.get_parameter("model.language_model.layers.2.mlp.up_proj.weight")[0, 0] += 1
    weights = weights_hash(user)
    with pytest.raises(ValueError, match="undo later changes first"):
        applied.undo()
    assert weights_hash(user) == weights


@pytest.mark.parametrize("damage", ["bit", "names", "not finite", "gap", "format", "link", "absent"])
def test_a_file_of_anybody_is_checked(damage: str, model: EditableModel, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    file = tmp_path / "copy" / FILE
    tensors, header, _ = read_tensors(file, "fastedit.changes/1", "test")
    name = sorted(tensors)[0]
    error: type[Exception] = ValueError
    if damage == "bit":
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)
        rule = "the checksum of '.*' differs"
    elif damage == "names":
        write_tensors({name: tensors[name]}, header, file, "test")
        rule = "lists the tensors of the file"
    elif damage == "not finite":
        from fastedit.files import tensors_digest

        tensors[name][0, 0] = float("nan")
        header["tensors"][name]["changed"] = tensors_digest({"": tensors[name]})
        write_tensors(tensors, header, file, "test")
        rule = "every value is finite"
    elif damage == "gap":
        write_tensors(tensors, {**header, "dtype": "float7"}, file, "test")
        rule = "names model, architecture and dtype"
    elif damage == "format":
        write_tensors(tensors, {**header, "format": "other"}, file, "test")
        rule = "format is 'fastedit.changes/1'"
    elif damage == "link":
        file.rename(tmp_path / "outside")
        file.symlink_to(tmp_path / "outside")
        rule = "a link out of"
    else:
        file.unlink()
        rule, error = "the file exists", FileNotFoundError
    weights = weights_hash(model.hf)
    with pytest.raises(error, match=rule):
        fastedit.apply_delta(model, tmp_path / "copy")
    assert weights_hash(model.hf) == weights


def test_an_error_on_the_way_puts_everything_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastedit.export import changes

    user = fastedit.load("pocket-llava").hf
    weights, written = weights_hash(user), changes._write
    calls: list[Any] = []

    def half(hf: Any, values: Any) -> None:
        calls.append(values)
        if len(calls) == 1:
            written(hf, dict(list(values.items())[:1]))
            raise KeyboardInterrupt
        written(hf, values)

    monkeypatch.setattr(changes, "_write", half)
    with pytest.raises(KeyboardInterrupt):
        fastedit.apply_delta(user, folder)
    assert weights_hash(user) == weights
