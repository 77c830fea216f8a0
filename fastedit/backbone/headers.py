"""Headers of safetensors files: what a checkpoint holds, without reading a weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from .json_files import parse_object

#: As the library has it.
MOST_HEADER_BYTES = 100_000_000
#: Bytes of an entry by type; types that are not named here are left to the library.
_ENTRY_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1} | {
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file.

    Args:
        dtype: as the file spells it, "BF16". shape: of the tensor. file: that holds it.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by name.

    Raises:
        ValueError: "load: <file> must ... (got ...)": truncated, or a header that contradicts the file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            got = f"{size} bytes, a header of {length if len(start) == 8 else 'unknown length'}"
            raise ValueError(f"load: {path} must hold its whole safetensors header (got {got})")
        if length > MOST_HEADER_BYTES:
            raise ValueError(f"load: {path}: the header must have at most {MOST_HEADER_BYTES} bytes (got {length})")
        content = file.read(length)
    entries = parse_object(content, f"{path}: the header")
    tensors: dict[str, StoredTensor] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        tensor, begin, end = _stored(path, name, entry)
        tensors[name] = tensor
        spans.append((begin, end, name))
    held = size - 8 - length
    last = 0
    for begin, end, name in sorted(spans):
        if begin != last:
            raise ValueError(f"load: {path}: tensors must follow each other (got {name!r} at byte {begin}, not {last})")
        last = end
    if last != held:
        raise ValueError(f"load: {path} must hold the {last} bytes of its tensors (got {held}: cut off or damaged)")
    return tensors


def _stored(path: Path, name: str, entry: Any) -> tuple[StoredTensor, int, int]:
    """One entry of a header: the tensor, and where its bytes begin and end."""
    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not (isinstance(dtype, str) and _counts(shape) and _counts(offsets) and len(offsets) == 2):
        rule = "every tensor must have a dtype, a shape and two data_offsets"
        raise ValueError(f"load: {path}: {rule} (got {name!r:.80}: {entry!r:.120})")
    begin, end = offsets
    width = _ENTRY_BYTES.get(dtype)
    if end < begin or (width is not None and end - begin != width * math.prod(shape)):
        rule = "the bytes of a tensor must be those of its shape"
        raise ValueError(f"load: {path}: {rule} (got {name!r:.80}: {dtype} {shape}, {end - begin} bytes)")
    return StoredTensor(dtype, tuple(shape), path), begin, end


def _counts(value: Any) -> TypeGuard[list[int]]:
    """Whether a value is a list of whole numbers that are not negative."""
    return isinstance(value, list) and all(type(part) is int and part >= 0 for part in value)
