"""All images of some edits are looked at once, and every problem has its place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from fastedit import EditRequest, Probe, Query
from fastedit.data import EditList, check_images, read_edits
from fastedit.data.check import ImageLooks, image_fields
from fastedit.data.images import check_image
from fastedit.data.reader import collect_edits

WHOLE = EditRequest(
    "what?", "red", "a.png", image_rephrase="b.png", image_locality_image="c.png", image_locality_prompt="who?",
    portability=(Query("so?", "d.png", "two"), Query("and?")),
    probes=(Probe("blind", "x"), Probe("near", "x", "e.png")), id="whole",
)  # fmt: skip


def test_every_image_of_an_edit_is_named() -> None:
    assert list(image_fields(WHOLE)) == [
        ("image", "a.png"), ("image_rephrase", "b.png"), ("image_locality_image", "c.png"),
        ("portability[0].image", "d.png"), ("probes[1].image", "e.png"),
    ]  # fmt: skip


def test_every_broken_image_is_a_problem_and_each_is_looked_at_once(images: Callable[..., Path]) -> None:
    root = images("good.png")
    (root / "page.jpg").write_text("<html>404</html>")
    (root / "cut.png").write_bytes((root / "good.png").read_bytes()[:50])
    looked = []

    def size(source: object) -> tuple[int, int]:
        looked.append(source)
        return check_image(source)  # type: ignore[arg-type]

    sound = EditRequest("what?", "red", root / "good.png", id="sound")
    broken = dataclasses.replace(
        WHOLE, image=root / "page.jpg", image_rephrase=root / "good.png", image_locality_image=root / "absent.png",
        portability=(Query("so?", root / "page.jpg", "two"),), probes=(Probe("near", "x", root / "cut.png"),),
    )  # fmt: skip
    problems = check_images([sound, broken, sound, broken], size=size)
    assert len(looked) == 4
    assert [(p.index, p.id, p.field, p.rule.split(",")[0]) for p in problems[:3]] == [
        (1, "whole", "image", "must be one of PNG"),
        (1, "whole", "image_locality_image", "no such file"),
        (1, "whole", "probes[0].image", "cannot be decoded"),
    ]
    assert [p.index for p in problems[3:]] == [3, 3, 3]
    assert problems[1].missing == str(root / "absent.png")
    assert str(problems[0]).startswith("edits[1] (id 'whole'), image: must be one of PNG, JPEG, WEBP, BMP, GIF (got '")
    assert str(root / "page.jpg")[-79:] in str(problems[0])


def test_images_in_memory_are_looked_at(tmp_path: Path) -> None:
    Image.effect_noise((64, 64), 60).save(tmp_path / "x.png")
    (tmp_path / "x.png").write_bytes((tmp_path / "x.png").read_bytes()[:300])
    edits = [
        EditRequest("what?", "red", Image.new("RGB", (4, 4))),
        EditRequest("what?", "red", Image.open(tmp_path / "x.png")),
        EditRequest("what?", "red", Image.new("F", (4, 4), 1000.0)),
    ]
    assert [problem.index for problem in check_images(edits)] == [1, 2]


def test_what_was_raised_holds_no_pixels(tmp_path: Path) -> None:
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    error = ImageLooks().at(tmp_path / "page.jpg")
    assert isinstance(error, ValueError)
    assert error.__traceback__ is error.__cause__ is error.__context__ is None


def test_problems_of_a_file_name_its_record_line_and_key(
    images: Callable[..., Path], write: Callable[..., Path], record: Callable[..., dict]
) -> None:
    root = images("good.png")
    (root / "page.jpg").write_text("<html>404</html>")
    good = {"image": "good.png", "image_rephrase": "good.png", "m_loc": "good.png"}
    rows = [record(0, **good), record(1, **good | {"image": "gone.png"}), record(2, **good | {"m_loc": "page.jpg"})]
    path = write(rows, "edits.jsonl")
    edits = read_edits(path, images=root, skip_missing=True)
    # The first of what was read is not the first of the file
    for part in (edits, edits[1:], edits[::-1]):
        (problem,) = check_images(part)
        assert (problem.file, problem.index, problem.line, problem.field) == (str(path), 2, 3, "m_loc")
        assert str(problem).startswith(f"{path} record 2 (line 3), m_loc: must be one of PNG")
    assert isinstance(edits[1:], EditList)
    assert edits[1:].source == edits.source
    assert edits[0].prompt == rows[0]["src"]


def test_an_edit_of_ones_own_among_read_ones_is_told_by_its_place(
    images: Callable[..., Path], write: Callable[..., Path], record: Callable[..., dict]
) -> None:
    edits = read_edits(write([record(0, id="first")], "edits.jsonl"))
    edits.append(EditRequest("what?", "red", "absent.png", id="mine"))
    problems = check_images(edits)
    assert str(problems[-1]) == "edits[1] (id 'mine'), image: no such file (got 'absent.png')"
    assert "record 0 (line 1, id 'first'), image: not found below" in str(problems[0])


def test_what_can_be_read_is_returned_beside_the_problems(
    images: Callable[..., Path], write: Callable[..., Path], record: Callable[..., dict]
) -> None:
    root = images("good.png")
    (root / "page.jpg").write_text("<html>404</html>")
    good = {"image": "good.png", "image_rephrase": "good.png", "m_loc": "good.png"}
    rows = [
        record(0, **good, alt=""),
        record(1, **good | {"image": "page.jpg", "m_loc": "gone.png"}),
        record(2, **good),
    ]
    edits, problems = collect_edits(write(rows), images=root)
    assert [problem.field for problem in problems] == ["alt", "m_loc"]
    # The record whose one image is missing is looked at with the others
    assert [problem.field for problem in check_images(edits)] == ["image"]
    assert [edit.image_locality_prompt for edit in edits] == [None, "What sport is this?"]


@pytest.mark.parametrize("images_given", [True, False])
def test_links_out_of_the_root_are_refused_with_and_without_images(
    images: Callable[..., Path], write: Callable[..., Path], record: Callable[..., dict], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, images_given: bool,
) -> None:  # fmt: skip
    root = images("good.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    path = write([record(0, image="out.png", image_rephrase="good.png", m_loc="good.png")])
    monkeypatch.chdir(root)
    edits, problems = collect_edits(path, images=root if images_given else None)
    problems += check_images(edits)
    assert [(p.field, p.rule.split(";")[0]) for p in problems] == [
        ("image", "must not leave the image root by a symbolic link")
    ]
