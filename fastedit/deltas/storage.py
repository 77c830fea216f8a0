"""Deltas on disk: one safetensors file, the specs as JSON in its header. Nothing in a file is ever executed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, overload

from torch import Tensor

from fastedit.backbone import Site
from fastedit.deltas.base import DeltaSpec, EditDelta, new_stack

FORMAT = "fastedit-deltas/1"


def save_deltas(deltas: Sequence[EditDelta], path: str | Path) -> Path:
    """Write deltas to one safetensors file, atomically (written beside, then renamed).

    Tensor names are ``"{index:06d}/{part}"``; header field ``fastedit`` holds format, specs, ids and fingerprints.
    """
    from safetensors.torch import save_file

    path = Path(path)
    tensors: dict[str, Tensor] = {}
    entries = []
    specs: list[dict[str, Any]] = []
    for index, delta in enumerate(deltas):
        spec = {**asdict(delta.spec), "options": dict(delta.spec.options)}
        if spec not in specs:
            specs.append(spec)
        entry = {"id": delta.request_id, "model": delta.model_fingerprint, "spec": specs.index(spec)}
        entries.append(entry)
        for name, tensor in delta.tensors.items():
            tensors[f"{index:06d}/{name}"] = tensor.contiguous()
    header = {"fastedit": json.dumps({"format": FORMAT, "specs": specs, "deltas": entries})}
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata=header)
    partial.replace(path)
    return path


def load_deltas(path: str | Path) -> list[EditDelta]:
    """Read deltas back, with every shape checked against its spec.

    Raises:
        ValueError: not a file of this format, or a part is missing or has the wrong shape.
    """
    with _opened(path) as (file, entries):
        return [_read(file, path, index, entry) for index, entry in enumerate(entries)]


_Entry = tuple[DeltaSpec, str, str]


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[Any, list[_Entry]]]:
    """The file and, per delta, its spec, the model's fingerprint and the request's id."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        raw = (file.metadata() or {}).get("fastedit")
        if raw is None:
            raise ValueError(f"deltas: a safetensors file with a 'fastedit' header (got path={str(path)!r})")
        try:
            header = json.loads(raw)
            if header["format"] != FORMAT:
                raise ValueError(f"deltas: format is {FORMAT!r} (got format={header['format']!r})")
            specs = [
                DeltaSpec(s["kind"], tuple(Site(**site) for site in s["sites"]), dict(s["options"]))
                for s in header["specs"]
            ]
            entries = [(specs[e["spec"]], str(e["model"]), str(e["id"])) for e in header["deltas"]]
        except (KeyError, TypeError, IndexError, json.JSONDecodeError) as error:
            raise ValueError(f"deltas: a complete header (got {error!r} in path={str(path)!r})") from error
        yield file, entries


def _read(file: Any, path: str | Path, index: int, entry: _Entry) -> EditDelta:
    spec, model, request_id = entry
    names = set(file.keys())
    tensors = {}
    for name, shape in new_stack(spec, 0, trainable=False).shapes.items():
        key = f"{index:06d}/{name}"
        if key not in names:
            raise ValueError(f"deltas: every part is present (got no {key!r} in path={str(path)!r})")
        tensor = file.get_tensor(key)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"deltas: part {key!r} has shape {shape} (got shape={tuple(tensor.shape)})")
        tensors[name] = tensor
    return EditDelta(spec, tensors, model, request_id)


class StoredDeltas(Sequence[EditDelta]):
    """Deltas in the files of a folder, read when asked for: memory does not grow with their number.

    A file holds what was appended at once and is named by its place, ``deltas-000000.safetensors`` being the first.

    Args:
        folder: made if it is absent; its files are read in the order of their names.
    Raises:
        ValueError: a file is not of this format, or one is missing in the middle.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        # where every delta is: (file, its number there); and whose it is
        self._places: list[tuple[Path, int]] = []
        self._ids: list[str] = []
        for number, path in enumerate(self.files()):
            if path.name != _file_name(number):
                raise ValueError(f"deltas: files are numbered from 0 without a gap (got {path.name} as file {number})")
            with _opened(path) as (_, entries):
                self._add(path, [request_id for _, _, request_id in entries])

    def files(self) -> list[Path]:
        """The files, in order."""
        return sorted(self.folder.glob("deltas-??????.safetensors"))

    def append(self, deltas: Sequence[EditDelta]) -> None:
        """Write deltas behind the others, as one file that is there whole or not at all."""
        path = self.folder / _file_name(len({path for path, _ in self._places}))
        save_deltas(deltas, path)
        self._add(path, [delta.request_id for delta in deltas])

    def _add(self, path: Path, ids: Sequence[str]) -> None:
        self._places += [(path, number) for number in range(len(ids))]
        self._ids += ids

    @property
    def request_ids(self) -> list[str]:
        """Whose the deltas are, without reading them."""
        return list(self._ids)

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> EditDelta: ...
    @overload
    def __getitem__(self, index: slice) -> list[EditDelta]: ...
    def __getitem__(self, index: int | slice) -> EditDelta | list[EditDelta]:
        """Read one delta, or those of a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        path, number = self._places[index]
        with _opened(path) as (file, entries):
            return _read(file, path, number, entries[number])


def _file_name(number: int) -> str:
    return f"deltas-{number:06d}.safetensors"
