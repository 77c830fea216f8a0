"""Files with one bit turned, as disks and networks give them back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def flipped(path: Path, count: int = 300, seed: int = 0) -> Iterator[int]:
    """Turn a bit of a file, one position after another and each alone; the file is whole again in the end.

    Positions are drawn from the whole file, and half as many from its first kilobytes, where the header is.
    """
    content = path.read_bytes()
    draw = random.Random(seed)
    places = [draw.randrange(8 * len(content)) for _ in range(count)]
    places += [draw.randrange(8 * min(len(content), 4096)) for _ in range(count // 2)]
    for place in (*range(64), *places):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        yield place
    path.write_bytes(content)


def refused_or_same(path: Path, load: Callable[[], Any], same: Callable[[Any], bool], name: str | None = None) -> int:
    """How many flips were refused; every other one gave what was written.

    Every refusal is a ValueError that names the file (or ``name``).
    """
    refused = 0
    for place in flipped(path):
        value, message = None, ""
        try:
            value = load()
        except ValueError as error:
            message = str(error)
        if message:
            assert (name or str(path)) in message, f"bit {place}: {message}"
            refused += 1
        else:
            assert same(value), f"bit {place} changed what was read"
    return refused
