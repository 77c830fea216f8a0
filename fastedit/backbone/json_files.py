"""JSON files of strangers: an object of plain values, or one sentence that says which rule the file breaks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

#: Deeper than any checkpoint's files are, and far from where recursion ends.
MOST_LEVELS = 100
#: The largest whole number that every reader of JSON takes exactly.
LARGEST = 2**53
MOST_BYTES = 512 << 20


def read_object(path: Path, *, plain_numbers: bool = False) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Args:
        path: of the file.
        plain_numbers: also refuse numbers that are not finite or that other readers would round.
    Raises:
        ValueError: "load: <file> must be ... (got ...)".
    """
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"load: {path} must be smaller than {MOST_BYTES >> 20} MiB (got {size >> 20} MiB)")
    return parse_object(path.read_bytes(), str(path), plain_numbers=plain_numbers)


def parse_object(content: bytes, name: str, *, plain_numbers: bool = False) -> dict[str, Any]:
    """Return the object that some bytes spell in JSON; `name` is what messages call them."""
    try:
        entries = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"load: {name} must be UTF-8 text (got {error.reason} at byte {error.start})") from None
    except RecursionError:
        raise ValueError(f"load: {name} must be nested less than {MOST_LEVELS} deep (got more)") from None
    except ValueError as error:
        # JSON's own errors, and whole numbers of thousands of digits
        raise ValueError(f"load: {name} must be JSON (got {error})") from None
    if not isinstance(entries, dict):
        raise ValueError(f"load: {name} must hold one object (got {_kind(entries)})")
    _check_values(entries, name, plain_numbers)
    return entries


def _check_values(entries: dict[str, Any], name: str, plain_numbers: bool) -> None:
    """Walk all values without recursion."""
    waiting: list[tuple[str, Any, int]] = [("", entries, 1)]
    while waiting:
        field, value, level = waiting.pop()
        if level > MOST_LEVELS:
            raise ValueError(f"load: {name} must be nested less than {MOST_LEVELS} deep (got more)")
        if isinstance(value, dict):
            waiting += [(f"{field}.{key}" if field else key, part, level + 1) for key, part in value.items()]
        elif isinstance(value, list):
            waiting += [(f"{field}[{number}]", part, level + 1) for number, part in enumerate(value)]
        elif plain_numbers and isinstance(value, (int, float)) and not (math.isfinite(value) and abs(value) < LARGEST):
            raise ValueError(f"load: {name}: {field} must be finite and below 2**53 (got {field}={value!r:.40})")


def _kind(value: Any) -> str:
    """Name a JSON value's kind."""
    names = {list: "a list", str: "text", bool: "a truth value", int: "a number", float: "a number"}
    return names.get(type(value), "null")
