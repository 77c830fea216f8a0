"""Artifacts: what was saved comes back, and what does not fit is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fastedit.training import Artifact, load_artifact, require_artifact, save_artifact
from tests.files.damage import refused_or_same


class FakeModel:
    fingerprint = "f" * 64

    def __init__(self) -> None:
        self.artifacts: dict[str, Artifact] = {}


def artifact(**changes: Any) -> Artifact:
    values: dict[str, Any] = {
        "kind": "mend",
        "model_fingerprint": "f" * 64,
        "config": {"rank": 4, "names": ("up", "down"), "lr": 0.1},
        "tensors": {"net/u": torch.arange(6.0).view(2, 3).T, "half": torch.ones(3, dtype=torch.bfloat16)},
        "metrics": {"score": 0.5},
    }
    return Artifact(**(values | changes))


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    made = artifact()
    path = save_artifact(made, tmp_path / "new" / "mend.safetensors")
    model = FakeModel()
    read = load_artifact(path, model, kind="mend")  # type: ignore[arg-type]
    assert read.id == made.id
    assert model.artifacts == {made.id: read}
    assert (read.kind, read.config, read.metrics) == (made.kind, made.config, made.metrics)
    assert read.config["names"] == ["up", "down"]
    for name, tensor in made.tensors.items():
        assert read.tensors[name].dtype == tensor.dtype
        assert torch.equal(read.tensors[name], tensor)
    assert [p.name for p in path.parent.iterdir()] == ["mend.safetensors"]


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "ke"},
        {"model_fingerprint": "e" * 64},
        {"config": {"rank": 5, "names": ("up", "down"), "lr": 0.1}},
        {"tensors": {"net/u": torch.arange(6.0).view(3, 2), "half": torch.ones(3, dtype=torch.bfloat16)}},
        {"tensors": {"net/v": torch.arange(6.0).view(2, 3).T, "half": torch.ones(3, dtype=torch.bfloat16)}},
        {"tensors": {"net/u": torch.arange(6.0).view(2, 3).T, "half": torch.ones(3, dtype=torch.float16)}},
    ],
)
def test_identity_is_that_of_everything_that_acts(changes: dict[str, Any]) -> None:
    assert artifact(**changes).id != artifact().id


def test_metrics_are_no_part_of_the_identity() -> None:
    assert artifact(metrics={}).id == artifact().id


def test_tensors_are_copies() -> None:
    source = torch.zeros(2)
    made = artifact(tensors={"a": source})
    source += 1
    assert made.tensors["a"].tolist() == [0, 0]


def test_refused_on_another_model_or_for_another_method(tmp_path: Path) -> None:
    path = save_artifact(artifact(model_fingerprint="0" * 64), tmp_path / "a.safetensors")
    model = FakeModel()
    with pytest.raises(ValueError, match=r"mend: the artifact was trained on the model in use.*got model='0000"):
        load_artifact(path, model)  # type: ignore[arg-type]
    assert model.artifacts == {}
    with pytest.raises(ValueError, match=r"ke: the artifact is of this kind.*got kind='mend'"):
        load_artifact(path, kind="ke")
    assert load_artifact(path).kind == "mend"


def test_none_is_refused_with_the_call_that_makes_one() -> None:
    with pytest.raises(ValueError, match=r"fastedit\.train\(model, 'odedit\+mend', records\)"):
        require_artifact(None, "odedit+mend")


def test_broken_files_are_refused(tmp_path: Path) -> None:
    path = save_artifact(artifact(), tmp_path / "a.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[:-4])
    with pytest.raises(ValueError, match="whole safetensors file"):
        load_artifact(path)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="content is what was written"):
        load_artifact(path)
    with pytest.raises(FileNotFoundError, match="the file exists"):
        load_artifact(tmp_path / "absent")


def test_a_flipped_bit_is_refused_wherever_it_is(tmp_path: Path) -> None:
    """In the metrics too, which are no part of what acts."""
    made = artifact(metrics={"score": 0.5, "validation": [0.1 * n for n in range(50)]})
    path = save_artifact(made, tmp_path / "a.safetensors")

    def same(read: Artifact) -> bool:
        return (read.id, read.metrics) == (made.id, made.metrics)

    assert refused_or_same(path, lambda: load_artifact(path), same) >= 500


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, bad: float) -> None:
    broken = artifact(tensors={"net/u": torch.tensor([1.0, bad])})
    with pytest.raises(ValueError, match=r"every value is finite \(got 1 that are not in part 'net/u' of the artifact"):
        save_artifact(broken, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []
    header = {
        "format": "fastedit-artifact/1",
        "kind": "mend",
        "model": "f" * 64,
        "config": broken.config,
        "metrics": {},
    }
    metadata = {"fastedit": json.dumps({**header, "id": broken.id})}
    save_file(dict(broken.tensors), tmp_path / "b.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match=r"every value is finite \(got 1 .*b\.safetensors"):
        load_artifact(tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    "change", [{"config": []}, {"config": None}, {"metrics": 7}, {"id": 7}, {"id": None}, {"kind": ""}]
)
def test_headers_that_say_something_else_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    header = {"format": "fastedit-artifact/1", "kind": "mend", "model": "f", "config": {}, "metrics": {}, "id": "0"}
    save_file({"a": torch.ones(1)}, tmp_path / "x", metadata={"fastedit": json.dumps({**header, **change})})
    with pytest.raises(ValueError, match=r"artifact: .*x'"):
        load_artifact(tmp_path / "x")


def test_other_formats_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"format is 'fastedit-artifact/1' \(got format=None"):
        load_artifact(path)
    save_file({"a": torch.ones(1)}, path, metadata={"fastedit": json.dumps({"format": "fastedit-artifact/1"})})
    with pytest.raises(ValueError, match="complete header"):
        load_artifact(path)


def test_settings_must_be_plain() -> None:
    with pytest.raises(ValueError, match="config is made of plain values"):
        artifact(config={"a": torch.ones(1)})
    with pytest.raises(ValueError, match="kind is a method's name"):
        artifact(kind="")
