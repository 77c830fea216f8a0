"""Deltas in files: all that was written comes back, and nothing else does."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fastedit.backbone import Site
from fastedit.deltas import DeltaSpec, EditDelta, load_deltas, save_deltas, storage
from fastedit.deltas.kinds import new_stack
from fastedit.files import open_tensors, write_tensors
from tests.files.damage import refused_or_same

SITES = (Site(0, "up", "up", 5, 7), Site(1, "down", "down", 7, 5))
LOW = DeltaSpec("low_rank", SITES, {"rank": 2, "scale": 1.5, "seed": 3})
FULL = DeltaSpec("full", SITES)


def deltas(count: int = 3) -> list[EditDelta]:
    made: list[EditDelta] = []
    for number in range(count):
        spec = (LOW, FULL)[number % 2]
        generator = torch.Generator().manual_seed(number)
        shapes = new_stack(spec, 0, trainable=False).stored_shapes()
        tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        before = tuple(delta.id for delta in made)
        merged = before[:2] if number == 2 else ()
        texts = {"template": "é {prompt}"} if number else {}
        made.append(EditDelta(spec, tensors, "f" * 64, f"é{number}", texts, None if number == 1 else before, merged))
    return made


def equal(read: list[EditDelta], made: list[EditDelta]) -> bool:
    return len(read) == len(made) and all(
        (a.id, a.request_id, a.model_fingerprint, a.fitted_on, a.merged, a.texts)
        == (b.id, b.request_id, b.model_fingerprint, b.fitted_on, b.merged, b.texts)
        for a, b in zip(read, made, strict=True)
    )


def rewritten(path: Path, change: Callable[[dict[str, Any]], None], tensors: dict[str, Any] | None = None) -> None:
    """The file with another header, whose checksum is right."""
    with open_tensors(path, "test") as (file, header, _):
        kept = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    change(header)
    write_tensors(kept | (tensors or {}), header, path, "test")


def test_all_that_a_delta_says_comes_back(tmp_path: Path) -> None:
    made = deltas(4)
    read = load_deltas(save_deltas(made, tmp_path / "a.safetensors"))
    assert equal(read, made)
    assert [delta.fitted_on for delta in read][:2] == [(), None]
    assert read[2].merged == (made[0].id, made[1].id)
    assert read[3].fitted_on == tuple(delta.id for delta in made[:3])


def test_ids_of_a_long_sequence_take_little_room(tmp_path: Path) -> None:
    """Each refers to all before it: 500 times 250 ids of 64 letters would be 8 MB."""
    made = [replace(deltas(1)[0], fitted_on=tuple(f"{n:064d}" for n in range(k))) for k in range(500)]
    size = save_deltas(made, tmp_path / "long").stat().st_size
    without = save_deltas([replace(delta, fitted_on=None) for delta in made], tmp_path / "plain").stat().st_size
    assert size - without < 500 * 100
    assert [delta.fitted_on for delta in load_deltas(tmp_path / "long")] == [delta.fitted_on for delta in made]


def test_a_flipped_bit_is_refused_wherever_it_is(tmp_path: Path) -> None:
    made = deltas()
    path = save_deltas(made, tmp_path / "deltas.safetensors")
    refused = refused_or_same(path, lambda: load_deltas(path), lambda read: equal(read, made))
    assert refused >= 500
    assert equal(load_deltas(path), made)


@pytest.mark.parametrize("length", [0, 4, 8, 40, 400, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, length: int) -> None:
    path = save_deltas(deltas(), tmp_path / "deltas.safetensors")
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"deltas: a whole safetensors file \(got .*deltas\.safetensors"):
        load_deltas(path)


DEEP = "[" * 10_000 + "]" * 10_000


@pytest.mark.parametrize("header", [DEEP, "[]", "7", "null", "{", '"text"', '{"format": ' + DEEP + "}"])
def test_a_header_that_is_none_is_refused(tmp_path: Path, header: str) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(2)}, path, metadata={"fastedit": header})
    with pytest.raises(ValueError, match=r"deltas: .*x\.safetensors"):
        load_deltas(path)


def test_a_table_of_tensors_that_is_nested_deep_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    front = b'{"a":' + DEEP.encode() + b"}"
    path.write_bytes(len(front).to_bytes(8, "little") + front)
    with pytest.raises(ValueError, match=r"a whole safetensors file \(got .*x\.safetensors"):
        load_deltas(path)


def _rank(header: dict[str, Any]) -> None:
    header["specs"][0]["options"]["rank"] = 10**9


def _width(header: dict[str, Any]) -> None:
    header["specs"][0]["sites"][0]["d_in"] = 10**12


def _set(*keys: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        target: Any = header
        for key in keys[:-1]:
            target = target[key]
        target[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        _rank,
        _width,
        _set("specs", value={"a": 1}),
        _set("specs", 0, "kind", value="fulll"),
        _set("specs", 0, "options", value={}),
        _set("specs", 0, "options", "rank", value="two"),
        _set("specs", 0, "sites", 0, value=[]),
        _set("specs", 0, "sites", 0, "d_in", value="wide"),
        _set("specs", 0, "sites", value=[]),
        _set("deltas", value={"a": 1}),
        _set("deltas", 0, "spec", value=9),
        _set("deltas", 0, "spec", value=-1),
        _set("deltas", 0, "sha256", value="0" * 64),
        _set("deltas", 2, "fitted_on", value=[[0, 10**12]]),
        _set("deltas", 2, "fitted_on", value=[[0, 2]] * 1000),
        _set("deltas", 2, "merged", value=[["a", "b"]]),
        _set("deltas", 2, "texts", value=[1]),
        _set("places", value=[1]),
        _set("places", value=["a", "b", "c"]),
        _set("format", value="fastedit-deltas/9"),
        _set("format", value=[[]]),
    ],
)
def test_headers_that_say_something_else_are_refused(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Also where the checksum was made to fit."""
    path = save_deltas(deltas(), tmp_path / "x.safetensors")
    rewritten(path, change)
    with pytest.raises(ValueError, match=r"deltas: .*x\.safetensors"):
        load_deltas(path)


@pytest.mark.parametrize(
    ("kind", "options"), [("low_rank", {"rank": 9}), ("localized", {"rank": 9, "slots": 1}), ("key_value", {"n": 9})]
)
def test_shapes_of_no_edit_cost_nothing(kind: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a header says; a fresh delta starts from drawn values."""
    drawn: list[int] = []
    real = torch.rand

    def rand(*given: Any, **named: Any) -> torch.Tensor:
        values = real(*given, **named)
        drawn.append(values.numel())
        return values

    monkeypatch.setattr(torch, "rand", rand)
    spec = DeltaSpec(kind, SITES[1:], options)
    shapes = new_stack(spec, 0, trainable=False).stored_shapes()
    assert any(9 in shape for shape in shapes.values())
    assert sum(drawn) == 0
    new_stack(spec, 1, trainable=False)
    assert sum(drawn) > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_at_both_ends(tmp_path: Path, bad: float) -> None:
    made = deltas()
    part = "0.up:up"
    path = save_deltas(made, tmp_path / "x.safetensors")
    made[0].tensors[part][1, 2] = bad
    message = rf"deltas: every value is finite \(got 1 that are not in part '{part}' of delta 0 \(id='é0'\)"
    with pytest.raises(ValueError, match=message):
        save_deltas(made, tmp_path / "other.safetensors")
    assert list(tmp_path.iterdir()) == [path]
    worse = replace(made[0])  # its id is not the remembered one
    rewritten(path, _set("deltas", 0, "sha256", value=worse.id), {f"000000/{part}": made[0].tensors[part]})
    with pytest.raises(ValueError, match=message + r".*x\.safetensors"):
        load_deltas(path)


def test_files_without_checksums_are_read_with_a_warning(tmp_path: Path) -> None:
    made = deltas()
    path = save_deltas(made, tmp_path / "x.safetensors")
    with open_tensors(path, "test") as (file, header, _):
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    for entry in header["deltas"]:
        for name in ("sha256", "fitted_on", "merged"):
            del entry[name]
    del header["ids"]
    save_file(tensors, path, metadata={"fastedit": json.dumps({**header, "format": "fastedit-deltas/1"})})
    with pytest.warns(UserWarning, match=r"x\.safetensors was written without checksums"):
        read = load_deltas(path)
    assert [delta.id for delta in read] == [delta.id for delta in made]
    assert [delta.fitted_on for delta in read] == [None] * 3
    assert [delta.merged for delta in read] == [()] * 3
    # what says that it has checksums must have them
    save_file(tensors, path, metadata={"fastedit": json.dumps({**header, "format": "fastedit-deltas/2"})})
    with pytest.raises(ValueError, match=r"the header has a checksum \(got none"):
        load_deltas(path)


def test_absent_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"deltas: the file exists \(got no file at path=.*absent"):
        load_deltas(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"deltas: the file exists \(got a folder at path="):
        load_deltas(tmp_path)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads mappings from /proc")
@pytest.mark.parametrize("copied", [0, 1 << 18])
def test_a_delta_that_is_held_keeps_no_file_mapped(
    copied: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process has some 65,000 mappings at most: each edit of a ledger has a file of its own until it is compacted."""
    monkeypatch.setattr(storage, "COPIED", copied)
    path = save_deltas(deltas(1), tmp_path / "held.safetensors")
    with storage.opened(path) as file:
        held = file.read(0)
    mapped = str(path) in Path("/proc/self/maps").read_text()
    assert mapped == (copied == 0)
    assert held.id == load_deltas(path)[0].id
