import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fastedit.data import files
from fastedit.data.files import JsonObject, parse_json, read_records
from fastedit.data.problems import Collector, RecordErrors


def records_of(path: Path) -> list[tuple[int, int | None, object]]:
    collector = Collector(path)
    records = [(r.index, r.line, r.value) for r in read_records(path, collector)]
    collector.stop_if_failed()
    return records


def test_a_list_and_lines_hold_the_same_records(write: Callable[..., Path]) -> None:
    assert records_of(write(b' [{"a": 1}, {"b": 2}]\n')) == [(0, None, {"a": 1}), (1, None, {"b": 2})]
    assert records_of(write(b'{"a": 1}\r\n\n  \n{"b": 2}')) == [(0, 1, {"a": 1}), (1, 4, {"b": 2})]


def test_a_byte_order_mark_is_no_content(write: Callable[..., Path]) -> None:
    assert records_of(write(b'\xef\xbb\xbf[{"a": 1}]')) == [(0, None, {"a": 1})]


def test_only_a_newline_ends_a_record(write: Callable[..., Path]) -> None:
    line = '{"a": "x\u2028y\x85z"}'.encode()
    assert records_of(write(line)) == [(0, 1, {"a": "x\u2028y\x85z"})]


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"", "JSON list of records, or JSON Lines"),
        (b" \n ", "JSON list of records, or JSON Lines"),
        (b"3", "JSON list of records, or JSON Lines"),
        (b"src,alt\na,b", "JSON list of records, or JSON Lines"),
        (b"[]", "at least one record"),
        (b'[{"a": 1},]', "must be JSON: .* line 1 column"),
        (b'[{"a": 1}] x', "must be JSON: Extra data"),
        (b'{\n "questions": ["a"],\n "answers": ["b"]\n}', "not one object over several lines"),
        (b'[{"a": "\xff"}]', r"must be UTF-8; byte 8 is not \(got b'\\xff"),
        ('[{"a": 1}]'.encode("utf-16"), "must be UTF-8; byte 0"),
        (b"[" * 100_000, "not nested that deep"),
        (b"[" + b"9" * 5000 + b"]", "numbers of a sane size"),
    ],
)
def test_a_file_that_holds_no_records_is_refused(write: Callable[..., Path], content: bytes, rule: str) -> None:
    with pytest.raises(RecordErrors, match=rule) as caught:
        records_of(write(content))
    assert [problem.index for problem in caught.value.problems] == [None]


def test_every_bad_line_is_reported_with_its_number(write: Callable[..., Path]) -> None:
    with pytest.raises(RecordErrors) as caught:
        records_of(write(b'{"a": 1}\nnonsense\n\n{"b": }\n{"c": 3}\n'))
    assert [(p.index, p.line) for p in caught.value.problems] == [(1, 2), (2, 4)]


def test_a_repeated_key_is_remembered() -> None:
    value, rule = parse_json('{"a": 1, "b": {"c": 1, "c": 2}, "a": 3, "a": 4}')
    assert rule == ""
    assert isinstance(value, JsonObject)
    assert value.repeated == ("a",)
    assert value["b"].repeated == ("c",)  # type: ignore[attr-defined]


def test_size_is_checked_before_reading(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 10)
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail("was read"))
    with pytest.raises(RecordErrors, match="must not be larger than 10 bytes"):
        records_of(write(b'[{"a": 1000}]'))


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    with pytest.raises(RecordErrors, match="regular file"):
        records_of(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RecordErrors, match="regular file"):
        records_of(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError):
        records_of(tmp_path / "absent")
