"""From a file to raw records: size, encoding, JSON syntax and the outer shape, before any field is looked at.

Two containers are read: one JSON list, and JSON Lines (one object a line). Which schema the objects follow is
another question (`fastedit.data.detect`), so an MMEdit file may be either.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, cast

from fastedit.data.problems import Collector, RecordErrors

#: Largest record file, in bytes. The largest public one has 4 MB.
MAX_FILE_BYTES = 512 * 2**20


class JsonObject(dict[str, object]):
    """A JSON object that remembers which of its keys occurred more than once."""

    __slots__ = ("repeated",)

    def __init__(self, pairs: Iterable[tuple[str, object]] = ()) -> None:
        pairs = list(pairs)
        super().__init__(pairs)
        self.repeated: tuple[str, ...] = ()
        if len(self) != len(pairs):
            seen: set[str] = set()
            twice: dict[str, None] = {}
            for key, _ in pairs:
                if key in seen:
                    twice[key] = None
                seen.add(key)
            self.repeated = tuple(twice)


@dataclass(frozen=True, slots=True)
class RawRecord:
    """One parsed JSON value at the place of a record; `line` is None in a JSON list."""

    index: int
    line: int | None
    value: object


def read_text(path: Path, collector: Collector) -> str:
    """Return the file's text, UTF-8 with or without a byte order mark.

    Raises:
        FileNotFoundError: there is no such file.
        RecordErrors: not a regular file, too large, or not UTF-8.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        _stop(collector, "must be a regular file")
    if status.st_size > MAX_FILE_BYTES:
        _stop(collector, f"must not be larger than {MAX_FILE_BYTES} bytes", status.st_size)
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        start = error.start
        _stop(collector, f"must be UTF-8; byte {start} is not", data[start : start + 4])


def _stop(collector: Collector, rule: str, value: object = None, line: int | None = None) -> NoReturn:
    collector.add(rule, value=value, line=line)
    raise RecordErrors(collector.problems)


def parse_json(text: str) -> tuple[object, str]:
    """Return (value, "") or (None, rule) where the text is not JSON; never raises for bad text."""
    try:
        return json.loads(text, object_pairs_hook=JsonObject), ""
    except json.JSONDecodeError as error:
        return None, f"must be JSON: {error.msg} at line {error.lineno} column {error.colno}"
    except RecursionError:
        return None, "must be JSON that is not nested that deep"
    except ValueError as error:
        # Integers beyond Python's digit limit.
        return None, f"must be JSON with numbers of a sane size: {str(error)[:80]}"


def read_records(path: Path, collector: Collector) -> list[RawRecord]:
    """Return the records of a JSON list or a JSON Lines file, unchecked.

    Lines that are not JSON become problems of the collector, and reading goes on with the next line.

    Raises:
        FileNotFoundError: there is no such file.
        RecordErrors: the file as a whole cannot be read as records.
    """
    text = read_text(path, collector)
    start = text.lstrip()[:1]
    if start == "[":
        records = _read_list(text, collector)
    elif start == "{":
        records = _read_lines(text, collector)
    else:
        _stop(collector, "must be a JSON list of records, or JSON Lines", text.strip()[:40])
    if not records and not collector.failed:
        _stop(collector, "must hold at least one record")
    return records


def _read_list(text: str, collector: Collector) -> list[RawRecord]:
    value, rule = parse_json(text)
    if rule:
        _stop(collector, rule)
    # The text begins with "[" and is JSON.
    return [RawRecord(index, None, item) for index, item in enumerate(cast(list[object], value))]


def _read_lines(text: str, collector: Collector) -> list[RawRecord]:
    # Only "\n" ends a record: str.splitlines would also cut at U+2028 inside a text.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if parse_json(lines[0][1])[1] and len(lines) > 1 and not parse_json(text)[1]:
        _stop(collector, "must be a JSON list of records, or JSON Lines, not one object over several lines")
    records = []
    for index, (number, line) in enumerate(lines):
        value, rule = parse_json(line)
        if rule:
            collector.add(rule.replace("at line 1 ", "at "), index=index, value=line, line=number)
        else:
            records.append(RawRecord(index, number, value))
    return records
