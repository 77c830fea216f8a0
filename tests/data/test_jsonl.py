from collections.abc import Callable
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastedit.data import RecordErrors, read_edits, write_jsonl
from fastedit.requests import EditRequest, Probe, Query

prompts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1, max_size=20).filter(
    lambda text: bool(text.strip())
)
answers = prompts.map(str.strip)
paths = (
    st.text("abc./ é", min_size=1, max_size=9)
    .filter(lambda path: bool(path.strip()) and not path.startswith("/") and ".." not in path.split("/"))
    .map(lambda path: PurePosixPath(path).as_posix())
    .filter(lambda path: bool(path.strip()))  # "./ " is a path, and normalises to a blank one
)


@st.composite
def edits(draw: st.DrawFn) -> list[EditRequest]:
    made = []
    for number in range(draw(st.integers(1, 3))):
        maybe = lambda strategy: draw(st.none() | strategy)  # noqa: E731
        image = maybe(paths)
        local = draw(st.booleans())
        question = maybe(prompts)
        made.append(
            EditRequest(
                draw(prompts), draw(answers), image, maybe(prompts), maybe(paths) if image else None,
                question, maybe(answers) if question else None,
                draw(paths) if local else None, draw(prompts) if local else None, maybe(answers) if local else None,
                tuple(Query(draw(prompts), maybe(paths), maybe(answers), draw(st.sampled_from(["", "2-hop"])))
                      for _ in range(draw(st.integers(0, 2)))),
                tuple(Probe(kind, draw(prompts), draw(paths) if kind == "near" else None, maybe(answers))
                      for kind in draw(st.lists(st.sampled_from(["near", "blind", "same"]), max_size=2))),
                maybe(st.just("") | answers), f"id {number}", tuple(draw(st.lists(prompts, max_size=2))),
            )
        )  # fmt: skip
    return made


@given(edits())
def test_what_is_written_is_read_back(written: list[EditRequest]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder, "edits.jsonl")
        write_jsonl(written, path)
        read = read_edits(path, format="jsonl")
    assert list(read) == written
    assert not read.warnings


def test_two_keys_are_enough(write: Callable[..., Path]) -> None:
    edits = read_edits(
        write([{"prompt": "p", "target": "t"}, {"prompt": "q", "target": "u", "image": None}], "a.jsonl")
    )
    assert list(edits) == [EditRequest("p", "t", id="a.jsonl#0"), EditRequest("q", "u", id="a.jsonl#1")]


def test_a_json_list_of_the_same_objects_is_read(write: Callable[..., Path]) -> None:
    (edit,) = read_edits(write([{"prompt": "p", "target": "t", "id": "x"}]))
    assert edit == EditRequest("p", "t", id="x")


def test_problems_name_the_line(write: Callable[..., Path]) -> None:
    path = write(b'{"prompt": "p", "target": "t"}\n\n{"prompt": "p"}\n{"prompt": "p", "target": "t", "image": "/x"}\n')
    with pytest.raises(RecordErrors) as caught:
        read_edits(path, format="jsonl")
    assert [(p.index, p.line, p.field) for p in caught.value.problems] == [(1, 3, "target"), (2, 4, "image")]


def test_mmedit_records_may_be_lines(write: Callable[..., Path], record: Callable[..., dict]) -> None:
    edits = read_edits(write([record(0), record(1)], "a.jsonl"))
    assert edits.detection is not None
    assert edits.detection.format == "mmedit"
    assert [edit.target for edit in edits] == ["2", "3"]
