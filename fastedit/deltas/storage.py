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
from fastedit.deltas.base import DeltaSpec, EditDelta
from fastedit.deltas.kinds import new_stack

FORMAT = "fastedit-deltas/1"


def save_deltas(deltas: Sequence[EditDelta], path: str | Path, places: Sequence[int] | None = None) -> Path:
    """Write deltas to one safetensors file, atomically (written beside, then renamed).

    Tensor names are ``"{index:06d}/{part}"``; header field ``fastedit`` holds format, specs, ids and fingerprints, and
    the places of the deltas in their run where they are not simply one after another.

    Raises:
        ValueError: not as many places as deltas; nothing is written then.
    """
    from safetensors.torch import save_file

    if places is not None and len(places) != len(deltas):
        raise ValueError(f"deltas: a place for every delta (got {len(places)} for {len(deltas)})")
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    entries = []
    specs: list[dict[str, Any]] = []
    for index, delta in enumerate(deltas):
        spec = {**asdict(delta.spec), "options": dict(delta.spec.options)}
        if spec not in specs:
            specs.append(spec)
        entry = {"id": delta.request_id, "model": delta.model_fingerprint, "spec": specs.index(spec)}
        if delta.texts:
            entry["texts"] = dict(delta.texts)
        entries.append(entry)
        for name, tensor in delta.tensors.items():
            tensors[f"{index:06d}/{name}"] = tensor.contiguous()
    content: dict[str, Any] = {"format": FORMAT, "specs": specs, "deltas": entries}
    if places is not None:
        content["places"] = list(places)
    header = {"fastedit": json.dumps(content)}
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata=header)
    partial.replace(path)
    return path


def load_deltas(path: str | Path) -> list[EditDelta]:
    """Read deltas back, with every shape checked against its spec.

    Raises:
        ValueError: not a file of this format, or a part is missing or has the wrong shape.
    """
    with _opened(path) as (file, entries, _):
        return [_read(file, path, index, entry) for index, entry in enumerate(entries)]


_Entry = tuple[DeltaSpec, str, str, dict[str, str]]


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[Any, list[_Entry], list[int] | None]]:
    """The file; per delta its spec, the model's fingerprint and the request's id; and the places, if it names them."""
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
            entries = [
                (specs[e["spec"]], str(e["model"]), str(e["id"]), {k: str(v) for k, v in e.get("texts", {}).items()})
                for e in header["deltas"]
            ]
            places = None if header.get("places") is None else [int(place) for place in header["places"]]
            if places is not None and len(places) != len(entries):
                raise ValueError(f"deltas: a place for every delta (got {len(places)} for {len(entries)})")
        except (KeyError, TypeError, IndexError, json.JSONDecodeError) as error:
            raise ValueError(f"deltas: a complete header (got {error!r} in path={str(path)!r})") from error
        yield file, entries, places


def _read(file: Any, path: str | Path, index: int, entry: _Entry) -> EditDelta:
    spec, model, request_id, texts = entry
    names = set(file.keys())
    tensors = {}
    for name, shape in new_stack(spec, 0, trainable=False).stored_shapes().items():
        key = f"{index:06d}/{name}"
        if key not in names:
            raise ValueError(f"deltas: every part is present (got no {key!r} in path={str(path)!r})")
        tensor = file.get_tensor(key)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"deltas: part {key!r} has shape {shape} (got shape={tuple(tensor.shape)})")
        tensors[name] = tensor
    return EditDelta(spec, tensors, model, request_id, texts)


class StoredDeltas(Sequence[EditDelta]):
    """Deltas in the files of a folder, read when asked for: memory does not grow with their number.

    A file holds what was appended at once and is named by its number, ``deltas-000000.safetensors`` being the first.
    Edits end in any order: files say which place of the run a delta has, and the deltas that are there are in that
    order, also where the run was broken off.

    Args:
        folder: made if it is absent; its files are read in the order of their names.
    Raises:
        ValueError: a file is not of this format, or one is missing in the middle.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        # by place: the file, the number there, and whose it is
        self._found: dict[int, tuple[Path, int, str]] = {}
        self._sorted: list[int] = []
        self._files = 0
        for number, path in enumerate(self.files()):
            if path.name != _file_name(number):
                raise ValueError(f"deltas: files are numbered from 0 without a gap (got {path.name} as file {number})")
            with _opened(path) as (_, entries, places):
                self._add(path, [entry[2] for entry in entries], self._free(path, len(entries), places))

    def files(self) -> list[Path]:
        """The files, in order."""
        return sorted(self.folder.glob("deltas-??????.safetensors"))

    def append(self, deltas: Sequence[EditDelta], places: Sequence[int] | None = None) -> None:
        """Write deltas as one file that is there whole or not at all.

        Args:
            deltas: n. places: of each in the run, in any order over the files; behind the others if absent.
        Raises:
            ValueError: a place for every delta, and none twice; nothing is written then.
        """
        path = self.folder / _file_name(self._files)
        chosen = self._free(path, len(deltas), places)
        save_deltas(deltas, path, places)
        self._add(path, [delta.request_id for delta in deltas], chosen)

    def _free(self, path: Path, count: int, places: Sequence[int] | None) -> Sequence[int]:
        """The places of a file's deltas, once it is known that none is taken twice."""
        first = 1 + max(self._found, default=-1)
        chosen = range(first, first + count) if places is None else places
        seen: set[int] = set()
        for place in chosen:
            if place in self._found or place in seen:
                raise ValueError(f"deltas: every place is taken once (got place={place} again in {path.name})")
            seen.add(place)
        return chosen

    def _add(self, path: Path, ids: Sequence[str], places: Sequence[int]) -> None:
        self._found.update((place, (path, number, ids[number])) for number, place in enumerate(places))
        self._files += 1

    @property
    def request_ids(self) -> list[str]:
        """Whose the deltas are, without reading them."""
        return [self._found[place][2] for place in self.places]

    @property
    def places(self) -> list[int]:
        """The places of the deltas in their run: 0, 1, 2 ... where it was finished."""
        if len(self._sorted) != len(self._found):
            self._sorted = sorted(self._found)
        return self._sorted

    def __len__(self) -> int:
        return len(self._found)

    @overload
    def __getitem__(self, index: int) -> EditDelta: ...
    @overload
    def __getitem__(self, index: slice) -> list[EditDelta]: ...
    def __getitem__(self, index: int | slice) -> EditDelta | list[EditDelta]:
        """Read one delta, or those of a slice."""
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        path, number, _ = self._found[self.places[index]]
        with _opened(path) as (file, entries, _):
            return _read(file, path, number, entries[number])


def _file_name(number: int) -> str:
    return f"deltas-{number:06d}.safetensors"
