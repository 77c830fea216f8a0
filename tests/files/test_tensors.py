"""Tensors in files: as safetensors reads them, with the mode that the umask says, refused where they are damaged."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastedit.files import read_tensors, require_finite, tensors_digest, write_tensors

TENSORS = {
    "b/odd": torch.arange(7, dtype=torch.uint8),
    "a": torch.arange(6.0).view(2, 3).T,
    "half": torch.linspace(0, 1, 5).to(torch.bfloat16),
    "double": torch.ones((), dtype=torch.float64),
    "none": torch.zeros(0, 4),
    "yes": torch.tensor([True, False, True]),
    "é": torch.tensor([-1, 2**40]),
}


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def test_what_was_written_is_what_safetensors_reads(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.safetensors"
    checksum = write_tensors(TENSORS, {"format": "test", "b": [1.5, "é"]}, path, "test")
    read = load_file(path)
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["sha256"] == checksum
    tensors, header, checked = read_tensors(path, "test", "test")
    assert checked
    assert header == {"format": "test", "b": [1.5, "é"]}
    assert tensors_digest(tensors) == tensors_digest(TENSORS)
    assert [each.name for each in path.parent.iterdir()] == ["x.safetensors"]


def test_tensors_begin_where_their_dtype_may_begin(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_tensors(TENSORS, {"format": "test"}, path, "test")
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    with safe_open(path, framework="pt") as file:
        for name, tensor in TENSORS.items():
            assert file.get_tensor(name).data_ptr() % tensor.element_size() == 0, name


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_the_mode_follows_the_umask(tmp_path: Path, mask: int) -> None:
    path = tmp_path / "x"
    with umask(mask):
        write_tensors(TENSORS, {"format": "test"}, path, "test")
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_what_was_there_stays_where_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_tensors({"a": torch.ones(1)}, {"format": "test"}, path, "test")
    with pytest.raises(ValueError, match="a dtype that files know"):
        write_tensors({"a": torch.ones(1, dtype=torch.complex64)}, {"format": "test"}, path, "test")
    with pytest.raises(FileExistsError):
        write_tensors({"a": torch.zeros(1)}, {"format": "test"}, path, "test", exclusive=True)
    assert load_file(path)["a"].item() == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_header_that_was_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    save_file({"a": torch.ones(1)}, path, metadata={"fastedit": '{"format": "test"}', "sha256": "0" * 64})
    with pytest.raises(ValueError, match=r"test: the header is what was written \(its checksum differs in path=.*x"):
        read_tensors(path, "test", "test")
    save_file({"a": torch.ones(1)}, path, metadata={"fastedit": '{"format": "test"}'})
    assert read_tensors(path, "test", "test")[2] is False


@pytest.mark.parametrize(
    ("change", "equal"),
    [
        (lambda t: t, True),
        (lambda t: t | {"more": torch.ones(1)}, False),
        (lambda t: {("c" if k == "a" else k): v for k, v in t.items()}, False),
        (lambda t: t | {"a": t["a"].reshape(6)}, False),
        (lambda t: t | {"yes": t["yes"].to(torch.uint8)}, False),
        (lambda t: dict(reversed(t.items())), True),
    ],
)
def test_digests_tell_tensors_apart(change: object, equal: bool) -> None:
    assert (tensors_digest(change(TENSORS)) == tensors_digest(TENSORS)) is equal  # type: ignore[operator]


def test_values_that_are_not_finite_are_counted() -> None:
    require_finite(TENSORS, "test", "them")
    bad = {"a": torch.tensor([1.0, torch.nan, -torch.inf], dtype=torch.bfloat16)}
    with pytest.raises(ValueError, match=r"test: every value is finite \(got 2 that are not in part 'a' of them\)"):
        require_finite(bad, "test", "them")


def test_a_process_without_room_for_a_mapping_finds_no_fault_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "whole.safetensors"
    write_tensors({"a": torch.zeros(2)}, {"format": "f"}, path, "test")

    def full(*_: object, **__: object) -> object:
        raise RuntimeError(f"unable to mmap 64 bytes from file <{path}>: Cannot allocate memory (12)")

    monkeypatch.setattr("safetensors.safe_open", full)
    with pytest.raises(MemoryError, match=r"^test: the process must have room to map one more file; .*max_map_count"):
        read_tensors(path, "f", "test")
