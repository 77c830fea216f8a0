"""Tensors as safetensors files with a JSON header and its checksum. Nothing in a file is ever executed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastedit.files.atomic import CHECKSUM, json_text, replacing

#: Field of the file's metadata that holds our header.
FIELD = "fastedit"
#: What torch says where a process has as many mappings as it may have.
NO_ROOM = "Cannot allocate memory"
# As the format spells them
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(
    tensors: Mapping[str, Tensor], header: Mapping[str, Any], path: Path, owner: str, *, exclusive: bool = False
) -> str:
    """Write tensors and a header of plain values as safetensors; the file is there whole or not at all.

    The file is written here and not by the safetensors package: that one makes files for the owner alone, whatever the
    umask says, leaves files of unknown names where it is killed, and hides that a disk is full in a text.

    Returns:
        SHA-256 of the header, which stands in the file. It says nothing of the tensors unless the header does.
    Raises:
        ValueError: a dtype that the format does not have.
        FileExistsError: it is exclusive, and there is a file.
        OSError: it cannot be written; names the path.
    """
    text = json_text(header)
    checksum = hashlib.sha256(text.encode()).hexdigest()
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    table: dict[str, Any] = {"__metadata__": {FIELD: text, CHECKSUM: checksum}}
    # Wide dtypes first, so that every tensor is aligned
    order = sorted(kept, key=lambda name: (-kept[name].element_size(), name))
    start = 0
    for name in order:
        tensor = kept[name]
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{owner}: tensors have a dtype that files know (got {name!r} with dtype={tensor.dtype})")
        end = start + tensor.numel() * tensor.element_size()
        table[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    front = json.dumps(table, separators=(",", ":")).encode()
    front += b" " * (-len(front) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, exclusive=exclusive) as file:
        file.write(len(front).to_bytes(8, "little") + front)
        for name in order:
            if kept[name].numel():
                file.write(_content(kept[name]))
    return checksum


@contextmanager
def open_tensors(path: str | Path, owner: str, format: str | None = None) -> Iterator[tuple[Any, dict[str, Any], str]]:
    """The open file, its header, and the header's checksum ("" where the file has none).

    Args:
        format: what the header must say; None takes any.
    Raises:
        FileNotFoundError: no such file.
        ValueError: not a whole safetensors file, no header of ours, another format, or not the header that was written;
            names the file.
        MemoryError: the process has no room to map it.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no file"
        error_type = ValueError if path.is_dir() else FileNotFoundError
        raise error_type(f"{owner}: the file exists (got {kind} at path={str(path)!r})")
    try:
        opened = safe_open(str(path), framework="pt")
    except PermissionError:
        raise
    except (SafetensorError, OSError, RuntimeError, ValueError, RecursionError, MemoryError) as error:
        if NO_ROOM in str(error):
            # Nothing is wrong with the file
            raise MemoryError(
                f"{owner}: the process must have room to map one more file; on Linux vm.max_map_count says how many "
                f"(got {error})"
            ) from error
        raise ValueError(f"{owner}: a whole safetensors file (got {error} in path={str(path)!r})") from error
    with opened as file:
        metadata = file.metadata() or {}
        if FIELD not in metadata and format is not None:
            raise ValueError(f"{owner}: format is {format!r} (got format=None in path={str(path)!r})")
        if FIELD not in metadata:
            raise ValueError(f"{owner}: a safetensors file with a {FIELD!r} header (got path={str(path)!r})")
        text, stored = metadata[FIELD], metadata.get(CHECKSUM, "")
        if stored and stored != hashlib.sha256(text.encode()).hexdigest():
            raise ValueError(f"{owner}: the header is what was written (its checksum differs in path={str(path)!r})")
        try:
            header = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{owner}: a header in JSON (got {error} in path={str(path)!r})") from error
        if not isinstance(header, dict):
            raise ValueError(f"{owner}: the header is a mapping (got {type(header).__name__} in path={str(path)!r})")
        if format is not None and header.get("format") != format:
            got = header.get("format")
            raise ValueError(f"{owner}: format is {format!r} (got format={got!r:.80} in path={str(path)!r})")
        try:
            yield file, header, stored
        except (SafetensorError, RecursionError) as error:
            raise ValueError(f"{owner}: a whole safetensors file (got {error} in path={str(path)!r})") from error


def read_tensors(path: str | Path, format: str, owner: str) -> tuple[dict[str, Tensor], dict[str, Any], bool]:
    """All tensors of a file, its header, and whether the header was checked.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a safetensors file, no header, or another format; names the file.
    """
    with open_tensors(path, owner, format) as (file, header, stored):
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors, header, bool(stored)


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(json_text([name, str(tensor.dtype), list(tensor.shape)]).encode())
        if tensor.numel():
            digest.update(_content(tensor))
    return digest.hexdigest()


def require_finite(tensors: Mapping[str, Tensor], owner: str, whose: str) -> None:
    """Refuse NaN and infinities.

    Raises:
        ValueError: names the tensor and how many of its values are not finite.
    """
    for name, tensor in tensors.items():
        # The sum is not finite where a value is not, and takes a third of the time; it may be too large by itself
        if not tensor.is_floating_point() or math.isfinite(float(tensor.sum())):
            continue
        if not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise ValueError(f"{owner}: every value is finite (got {bad} that are not in part {name!r} of {whose})")


def _content(tensor: Tensor) -> Any:
    """The bytes of a contiguous tensor with elements, not copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy()
