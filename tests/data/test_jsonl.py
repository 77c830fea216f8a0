import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastedit.data import RecordErrors, check_images, fingerprint, read_edits, write_jsonl
from fastedit.requests import PARAPHRASE_KINDS, WORDINGS, EditRequest, Probe, Query, Video

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
                tuple(Probe(kind, draw(prompts), draw(paths) if kind == "near" else None, maybe(answers),
                            draw(st.sampled_from(WORDINGS)))
                      for kind in draw(st.lists(st.sampled_from(["near", "blind", "same"]), max_size=2))),
                maybe(st.just("") | answers), f"id {number}", tuple(draw(st.lists(prompts, max_size=2))),
                tuple(Query(draw(prompts), maybe(paths), maybe(answers), kind)
                      for kind in draw(st.lists(st.sampled_from(PARAPHRASE_KINDS), max_size=2))),
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


def test_lists_of_images_and_videos_go_there_and_back(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (9, 9), "red" if name == "a.png" else "blue").save(tmp_path / name)
    edits = [
        EditRequest("which {image} {image}?", "left", ["a.png", "b.png"], image_rephrase=["b.png", "c.png"], id="1"),
        EditRequest(
            "what moves?", "a dot", Video(["a.png", "b.png", "c.png"], 2.5), id="2",
            portability=(Query("why?", ["c.png", "a.png"], "so"),),
            probes=(Probe("near", "what moves?", Video(["c.png"])), Probe("same", "who?", ["b.png", "a.png"])),
        ),
    ]  # fmt: skip
    path = tmp_path / "edits.jsonl"
    write_jsonl(edits, path)
    assert read_edits(path) == edits
    first, second = map(json.loads, path.read_text().splitlines())
    assert first["image"] == ["a.png", "b.png"]
    assert second["image"] == {"video": ["a.png", "b.png", "c.png"], "fps": 2.5}
    found = read_edits(path, images=tmp_path)
    assert found[0].image == (tmp_path / "a.png", tmp_path / "b.png")
    assert found[1].image == Video([tmp_path / "a.png", tmp_path / "b.png", tmp_path / "c.png"], 2.5)
    assert found[1].probes[1].image == (tmp_path / "b.png", tmp_path / "a.png")
    write_jsonl(found, path, images=tmp_path)
    assert read_edits(path) == edits
    assert fingerprint(read_edits(path, images=tmp_path)) == fingerprint(found)
    swapped = [replace(found[0], image=found[0].image[::-1]), found[1]]
    assert fingerprint(swapped) != fingerprint(found)


def test_what_is_wrong_with_a_list_names_the_element(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    path = tmp_path / "edits.jsonl"

    def rules(image: object, images: Path | None = None) -> str:
        path.write_text(json.dumps({"prompt": "what?", "target": "x", "image": image}))
        with pytest.raises(RecordErrors) as caught:
            read_edits(path, images=images)
        return str(caught.value)

    assert "image: must hold 1 to 1000 paths" in rules([])
    assert "image[1]: must be a path as text (got 3)" in rules(["a.png", 3])
    assert "image[1]: must not leave the image root by '..'" in rules(["a.png", "../b.png"])
    assert "image.video[0]: must be relative to the image root, not absolute" in rules({"video": ["/a.png"]})
    assert "image.video: must be a list of paths, one a frame" in rules({"video": "frames"})
    assert "image.fps: must be a finite number above 0 (got 0)" in rules({"video": ["a.png"], "fps": 0})
    lost = rules(["a.png", "absent.png"], tmp_path)
    assert "image[1]: not found below the image root (got 'absent.png')" in lost
    assert "1 image file not found" in lost
    path.write_text(json.dumps({"prompt": "what?", "target": "x", "image": ["a.png", "broken.png"]}))
    (problem,) = check_images(read_edits(path, images=tmp_path))
    assert problem.field == "image[1]"
    assert problem.rule.startswith("must be one of PNG")
