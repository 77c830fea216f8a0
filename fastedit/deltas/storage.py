"""Deltas on disk: one safetensors file, the specs as JSON in its header. Nothing in a file is ever executed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastedit.backbone import Site
from fastedit.deltas.base import DeltaSpec, EditDelta
from fastedit.deltas.kinds import new_stack
from fastedit.files import open_tensors, require_finite, write_tensors

FORMAT, UNCHECKED = "fastedit-deltas/2", "fastedit-deltas/1"
#: Bytes of a part up to which it is copied when it is read: what routers look at, and entries of a codebook.
COPIED = 1 << 18
# How deltas of files without a checksum are read
_WARNING = "deltas: {path} was written without checksums ({format}): what it holds is not checked; save it again"


def save_deltas(deltas: Sequence[EditDelta], path: str | Path, numbers: Sequence[int] | None = None) -> Path:
    """Write deltas to one safetensors file, atomically (written beside, then renamed).

    Tensor names are ``"{index:06d}/{part}"``; header field ``fastedit`` holds format, specs, ids, fingerprints and
    checksums, and the numbers of the deltas in their run where they are not simply one after another.

    Raises:
        ValueError: not as many numbers as deltas, or a value that is not finite; nothing is written then.
        OSError: the file cannot be written; nothing is left of it then.
    """
    path = Path(path)
    write_deltas(deltas, path, numbers)
    return path


def write_deltas(
    deltas: Sequence[EditDelta], path: Path, numbers: Sequence[int] | None = None, *, exclusive: bool = False
) -> str:
    """What ``save_deltas`` does; returns the header's checksum.

    Raises:
        FileExistsError: it is exclusive, and there is a file.
    """
    return write_tensors(*_content(deltas, numbers), path, "deltas", exclusive=exclusive)


def load_deltas(path: str | Path) -> list[EditDelta]:
    """Read deltas back, each checked against its checksum and every shape against its spec.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file of this format, not the content that was written, a part that is missing or has the wrong
            shape, or a value that is not finite; names the file.
    """
    return read_deltas(path)[0]


def read_deltas(path: str | Path) -> tuple[list[EditDelta], str]:
    """What ``load_deltas`` does; and the header's checksum."""
    with opened(path) as file:
        file.header.warn()
        return [file.read(index) for index in range(len(file.header))], file.header.checksum


def header_checksum(path: str | Path) -> str:
    """SHA-256 of a file's header, which holds the checksum of every delta in it: equal means equal files.

    Raises:
        ValueError, FileNotFoundError: as ``load_deltas``. A file without checksums has "".
    """
    with opened(path) as file:
        return file.header.checksum


def _content(deltas: Sequence[EditDelta], numbers: Sequence[int] | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a file."""
    if numbers is not None and len(numbers) != len(deltas):
        raise ValueError(f"deltas: a number for every delta (got {len(numbers)} for {len(deltas)})")
    tensors: dict[str, Tensor] = {}
    entries = []
    specs: dict[str, int] = {}
    whole: list[dict[str, Any]] = []
    # The ids that deltas refer to. In a sequence each refers to all before it: numbers of the first and how many
    table: dict[str, int] = {}
    for index, delta in enumerate(deltas):
        require_finite(delta.tensors, "deltas", _named(index, delta.request_id))
        number = specs.setdefault(delta.spec.text, len(specs))
        if number == len(whole):
            whole.append({**asdict(delta.spec), "options": dict(delta.spec.options)})
        entry = {
            "id": delta.request_id,
            "model": delta.model_fingerprint,
            "spec": number,
            "sha256": delta.id,
            "fitted_on": None if delta.fitted_on is None else _spans(delta.fitted_on, table),
            "merged": _spans(delta.merged, table),
        }
        if delta.texts:
            entry["texts"] = dict(delta.texts)
        entries.append(entry)
        for name, tensor in delta.tensors.items():
            tensors[f"{index:06d}/{name}"] = tensor
    content: dict[str, Any] = {"format": FORMAT, "specs": whole, "deltas": entries, "ids": list(table)}
    if numbers is not None:
        content["places"] = list(numbers)
    return tensors, content


def _spans(ids: Sequence[str], table: dict[str, int]) -> list[list[int]]:
    """Ids as runs of neighbours in the table, [first, count], which takes those that it lacks."""
    spans: list[list[int]] = []
    for each in ids:
        number = table.setdefault(each, len(table))
        if spans and number == sum(spans[-1]):
            spans[-1][1] += 1
        else:
            spans.append([number, 1])
    return spans


def _named(index: int, request_id: str) -> str:
    return f"delta {index} (id={request_id!r:.80})"


@dataclass(frozen=True)
class _Entry:
    """What a header says of one delta; ``sha256`` is "" where it says no checksum."""

    spec: int
    model: str
    request_id: str
    texts: Mapping[str, str]
    sha256: str
    fitted_on: Sequence[Sequence[int]] | None
    merged: Sequence[Sequence[int]]

    @staticmethod
    def of(entry: Mapping[str, Any], checked: bool) -> _Entry:
        """The entry in a header, of a file with checksums or without."""
        texts = {str(name): str(text) for name, text in entry.get("texts", {}).items()}
        known = (int(entry["spec"]), str(entry["model"]), str(entry["id"]), texts)
        if not checked:
            return _Entry(*known, "", None, ())
        return _Entry(*known, str(entry["sha256"]), entry["fitted_on"], entry["merged"])


class Header:
    """What a file of deltas says of them, checked."""

    def __init__(self, header: Mapping[str, Any], checksum: str, path: str | Path) -> None:
        self.path, self.checksum = path, checksum
        self.format = header.get("format")
        if self.format not in (FORMAT, UNCHECKED):
            raise ValueError(f"deltas: format is {FORMAT!r} (got format={self.format!r:.80} in path={str(path)!r})")
        if not checksum and self.format == FORMAT:
            raise ValueError(f"deltas: the header has a checksum (got none in path={str(path)!r})")
        try:
            self.specs = [_spec(each) for each in header["specs"]]
            self.entries = [_Entry.of(entry, self.format == FORMAT) for entry in header["deltas"]]
            self._ids = [str(each) for each in header.get("ids", ())]
            numbers = header.get("places")
            self.numbers = None if numbers is None else [int(number) for number in numbers]
            for entry in self.entries:
                # Negative numbers would count from the end
                range(len(self.specs))[entry.spec]
        except (KeyError, TypeError, IndexError, ValueError, AttributeError, OverflowError) as error:
            raise ValueError(f"deltas: a complete header (got {error!r:.200} in path={str(path)!r})") from error
        if self.numbers is not None and len(self.numbers) != len(self.entries):
            detail = f"{len(self.numbers)} for {len(self.entries)}"
            raise ValueError(f"deltas: a number for every delta (got {detail} in path={str(path)!r})")
        self._shapes: dict[int, dict[str, tuple[int, ...]]] = {}

    def __len__(self) -> int:
        return len(self.entries)

    def warn(self) -> None:
        """Say so where the file has no checksums."""
        if self.format == UNCHECKED:
            warnings.warn(_WARNING.format(path=self.path, format=self.format), UserWarning, stacklevel=4)

    def stored_shapes(self, number: int) -> dict[str, tuple[int, ...]]:
        """Shape by part of the deltas of a spec."""
        if number not in self._shapes:
            try:
                self._shapes[number] = new_stack(self.specs[number], 0, trainable=False).stored_shapes()
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RuntimeError, MemoryError) as error:
                detail = f"{error!r:.200} of spec {number} in path={str(self.path)!r}"
                raise ValueError(f"deltas: specs that deltas can have (got {detail})") from error
        return self._shapes[number]

    def members(self, spans: Sequence[Sequence[int]]) -> tuple[str, ...]:
        """The ids that spans stand for."""
        members: list[str] = []
        try:
            for first, count in spans:
                if not 0 <= first <= first + count <= len(self._ids) or len(members) + count > len(self._ids):
                    raise ValueError(f"ids {first} to {first + count} of {len(self._ids)}")
                members += self._ids[first : first + count]
        except (TypeError, ValueError) as error:
            raise ValueError(f"deltas: a complete header (got {error!r:.200} in path={str(self.path)!r})") from error
        return tuple(members)


class DeltaFile:
    """An open file of deltas."""

    def __init__(self, file: Any, header: Header, path: str | Path) -> None:
        self.header, self.path, self._file = header, path, file
        self._keys = set(file.keys())

    def read(self, index: int) -> EditDelta:
        """One delta, checked."""
        entry = self.header.entries[index]
        tensors: dict[str, Tensor] = {}
        for name, shape in self.header.stored_shapes(entry.spec).items():
            key = f"{index:06d}/{name}"
            if key not in self._keys:
                raise ValueError(f"deltas: every part is present (got no {key!r} in path={str(self.path)!r})")
            found = tuple(self._file.get_slice(key).get_shape())
            if found != shape:
                detail = f"part {key!r} of {str(self.path)!r}"
                raise ValueError(f"deltas: {detail} has shape {shape} (got shape={found})")
            tensor = self._file.get_tensor(key)
            # A mapped part keeps all of its file mapped, and a process has no more than some ten thousand mappings
            tensors[name] = tensor.clone() if tensor.nbytes <= COPIED else tensor
        fitted_on = None if entry.fitted_on is None else self.header.members(entry.fitted_on)
        delta = EditDelta(
            self.header.specs[entry.spec],
            tensors,
            entry.model,
            entry.request_id,
            entry.texts,
            fitted_on,
            self.header.members(entry.merged),
        )
        whose = f"{_named(index, entry.request_id)} in path={str(self.path)!r}"
        if entry.sha256 and delta.id != entry.sha256:
            raise ValueError(f"deltas: the content is what was written (the checksum differs of {whose})")
        require_finite(tensors, "deltas", whose)
        return delta


def _spec(content: Mapping[str, Any]) -> DeltaSpec:
    sites = tuple(Site(**site) for site in content["sites"])
    return DeltaSpec(str(content["kind"]), sites, dict(content["options"]))


@contextmanager
def opened(path: str | Path, known: Header | None = None) -> Iterator[DeltaFile]:
    """A file of deltas, its header checked.

    Args:
        known: of the file read before, taken where this one is the same.
    """
    with open_tensors(path, "deltas") as (file, header, checksum):
        same = known is not None and checksum and known.checksum == checksum and known.path == path
        yield DeltaFile(file, known if known is not None and same else Header(header, checksum, path), path)
