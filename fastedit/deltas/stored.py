"""Deltas in the files of a folder, written while a run goes on and read when asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import overload

from fastedit.deltas.base import EditDelta
from fastedit.deltas.storage import DeltaFile, Header, opened, write_deltas
from fastedit.files import json_text


class StoredDeltas(Sequence[EditDelta]):
    """Deltas in the files of a folder, read when asked for: memory does not grow with their number.

    A file holds what was appended at once and is named by its number, ``deltas-000000.safetensors`` being the first.
    Edits end in any order: files say which number in the run a delta has, and the deltas that are there are in that
    order, also where the run was broken off. Reading one checks it and its file's header, and nothing else.

    Those that a router chooses from act from here: they are read when rows are routed to them
    (``fastedit.deltas.mapped``).

    Args:
        folder: that exists; its files are read in the order of their names. ``StoredDeltas.create`` makes one.
    Raises:
        FileNotFoundError: no such folder.
        ValueError: a file is not of this format, or one is missing in the middle.
    """

    is_mapped = True

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            error_type = ValueError if self.folder.exists() else FileNotFoundError
            raise error_type(f"deltas: the folder exists (got folder={str(folder)!r}); StoredDeltas.create makes one")
        # by number of the edit: that of the file, the row there, whose it is, and its id ("" where it is not known)
        self._found: dict[int, tuple[int, int, str, str]] = {}
        self._sorted: list[int] = []
        self._checksums: list[str] = []
        # of the file that was read last
        self._header: Header | None = None
        for number, path in enumerate(self.files()):
            if path.name != _file_name(number):
                raise ValueError(f"deltas: files are numbered from 0 without a gap (got {path.name} as file {number})")
            with opened(path) as file:
                header = file.header
            if number == 0:
                header.warn()
            numbers = self._free(path.name, len(header), header.numbers)
            self._add([(entry.request_id, entry.sha256) for entry in header.entries], numbers, header.checksum)

    def __repr__(self) -> str:
        return f"<StoredDeltas: {len(self)} deltas in {self.folder}>"

    @classmethod
    def create(cls, folder: str | Path) -> StoredDeltas:
        """Make a folder for deltas; one that exists must hold none.

        Raises:
            ValueError: it holds some.
            OSError: it cannot be made.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        stored = cls(folder)
        if stored:
            raise ValueError(f"deltas: the folder is new or empty (got {folder} with {len(stored)} deltas)")
        return stored

    def files(self) -> list[Path]:
        """The files, in order."""
        return sorted(self.folder.glob("deltas-??????.safetensors"))

    @property
    def checksum(self) -> str:
        """SHA-256 over the headers of all files; "" where a file has no checksum."""
        if "" in self._checksums:
            return ""
        return hashlib.sha256(json_text(self._checksums).encode()).hexdigest()

    def append(self, deltas: Sequence[EditDelta], numbers: Sequence[int] | None = None) -> None:
        """Write deltas as one file that is there whole or not at all.

        Args:
            deltas: n. numbers: of each in the run, in any order over the files; behind the others if absent.
        Raises:
            ValueError: a number for every delta, and none twice; a value that is not finite; or another writer has put
                a file there. Nothing is written then.
            OSError: the file cannot be written, the disk is full ...; nothing is left of it then.
        """
        if not deltas and not numbers:
            return
        path = self.folder / _file_name(len(self._checksums))
        chosen = self._free(path.name, len(deltas), numbers)
        try:
            checksum = write_deltas(deltas, path, numbers, exclusive=True)
        except FileExistsError:
            detail = f"{path.name} of another one in folder={str(self.folder)!r}"
            raise ValueError(f"deltas: one process writes a folder (got {detail})") from None
        self._add([(delta.request_id, delta.id) for delta in deltas], chosen, checksum)

    def _free(self, where: str, count: int, numbers: Sequence[int] | None) -> Sequence[int]:
        """The numbers of a file's deltas, once it is known that none is taken twice."""
        first = 1 + max(self._found, default=-1)
        chosen = range(first, first + count) if numbers is None else numbers
        seen: set[int] = set()
        for number in chosen:
            if number in self._found or number in seen:
                raise ValueError(f"deltas: every number is taken once (got number={number} again in {where})")
            seen.add(number)
        return chosen

    def _add(self, ids: Sequence[tuple[str, str]], numbers: Sequence[int], checksum: str) -> None:
        file = len(self._checksums)
        self._found.update((number, (file, row, *ids[row])) for row, number in enumerate(numbers))
        self._checksums.append(checksum)

    @property
    def request_ids(self) -> list[str]:
        """Whose the deltas are, without reading them."""
        return [self._found[number][2] for number in self.numbers]

    @property
    def ids(self) -> list[str]:
        """``EditDelta.id`` of the deltas, without reading them; of files without checksums they are read."""
        known = [self._found[number][3] for number in self.numbers]
        return [sha256 or self[index].id for index, sha256 in enumerate(known)]

    @property
    def numbers(self) -> list[int]:
        """The numbers of the deltas in their run: 0, 1, 2 ... where it was finished."""
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
        file_number, row, *_ = self._found[self.numbers[index]]
        with self._opened(file_number) as file:
            return file.read(row)

    def __iter__(self) -> Iterator[EditDelta]:
        """Read all in order; a file is opened once for as many as lie beside each other in it."""
        for file_number, numbers in groupby(list(self.numbers), key=lambda number: self._found[number][0]):
            with self._opened(file_number) as file:
                for number in numbers:
                    yield file.read(self._found[number][1])

    @contextmanager
    def _opened(self, number: int) -> Iterator[DeltaFile]:
        """A file, of which it is known that it is the one that was there."""
        path = self.folder / _file_name(number)
        with opened(path, self._header) as file:
            self._header = file.header
            if file.header.checksum != self._checksums[number]:
                raise ValueError(f"deltas: files stay as they were (got another content in path={str(path)!r})")
            yield file


def _file_name(number: int) -> str:
    return f"deltas-{number:06d}.safetensors"
