"""Writing that leaves the old file or the new one, never a part; JSON files with a checksum."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

#: Ending of a file that is being written; where its writer was killed it stays behind and is of no use.
PARTIAL = ".partial"
#: Name of the field that holds the SHA-256 over all other fields.
CHECKSUM = "sha256"


@contextmanager
def replacing(path: Path, *, exclusive: bool = False) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of ``path`` when the block ends well; else ``path`` is as it was.

    Its mode is that of any new file (the umask says which).

    Raises:
        FileExistsError: it is exclusive, and there is a file.
        OSError: it cannot be written, the disk is full, ...; names the path.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _put(partial, path, exclusive)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            # Of a failed write Python names no file, of a failed open the one that nobody asked for
            error.filename, error.filename2 = str(path), None
        raise


def _put(partial: Path, path: Path, exclusive: bool) -> None:
    if not exclusive:
        partial.replace(path)
        return
    try:
        os.link(partial, path)
    except FileExistsError:
        raise
    except OSError:
        # A file system without links
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
        partial.replace(path)
    else:
        partial.unlink()


def clear_partial(folder: Path, name: str = "*") -> None:
    """Remove what killed writers of files of this name left in a folder; only for who has claimed them."""
    for pattern in (f"{name}{PARTIAL}", f"{name}.*{PARTIAL}"):
        for partial in folder.glob(pattern):
            if not partial.is_dir():
                partial.unlink(missing_ok=True)


def json_text(value: Any) -> str:
    """The one text of a plain value: what checksums are taken of."""
    return json.dumps(value, sort_keys=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a mapping of plain values with a checksum over them."""
    # as it will be read: tuples become lists and keys become text
    content = json.loads(json.dumps(content))
    checked = {CHECKSUM: _checksum(content), **content}
    with replacing(path) as file:
        file.write((json.dumps(checked, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: Path, owner: str) -> tuple[dict[str, Any], bool]:
    """The mapping in a file, without its checksum, and whether there was one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no JSON, no mapping, or not the content that was written; names the file.
    """
    if not path.exists():
        raise FileNotFoundError(f"{owner}: the file exists (got path={str(path)!r})")
    try:
        content = json.loads(path.read_bytes().decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{owner}: a whole JSON file (got {error} in path={str(path)!r})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{owner}: a mapping (got {type(content).__name__} in path={str(path)!r})")
    stored = content.pop(CHECKSUM, None)
    if stored is not None and stored != _checksum(content):
        raise ValueError(f"{owner}: the content is what was written (its checksum differs in path={str(path)!r})")
    return content, stored is not None


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json_text(content).encode()).hexdigest()
