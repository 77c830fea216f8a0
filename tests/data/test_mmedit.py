import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from fastedit.data import RecordErrors, fingerprint, read_edits, without_prefix, write_mmedit
from fastedit.requests import EditRequest, Probe, Query


def test_the_eleven_fields_find_their_places(write: Callable[..., Path], record: Callable[..., dict]) -> None:
    (edit,) = read_edits(write([record(3)]))
    assert edit == EditRequest(
        prompt="How many buses are in picture 3?",
        target="5",
        image="val2014/COCO_val2014_000000000003.jpg",
        rephrase="What is the number of buses in picture 3?",
        image_rephrase="val2014_image_rephrase/3.png",
        locality_prompt="nq question: who wrote book 3",
        locality_answer="author 3",
        image_locality_image="val2014/COCO_val2014_000000500003.jpg",
        image_locality_prompt="What sport is this?",
        image_locality_answer="motocross",
        prediction="no",
        id="edits.json#0",
    )


def test_the_prefix_is_kept_and_can_be_removed() -> None:
    assert without_prefix("nq question: who wrote it") == "who wrote it"
    assert without_prefix("who wrote the nq question: x") == "who wrote the nq question: x"


@pytest.mark.parametrize("key", ["src", "alt", "pred", "image", "loc", "m_loc_a"])
def test_every_key_must_be_there(write: Callable[..., Path], record: Callable[..., dict], key: str) -> None:
    broken = record(1)
    del broken[key]
    with pytest.raises(RecordErrors) as caught:
        read_edits(write([record(0), broken]))
    assert (caught.value.problems[0].index, caught.value.problems[0].field) == (1, key)
    assert "must be present" in caught.value.problems[0].rule


def test_a_part_may_be_null(write: Callable[..., Path], record: Callable[..., dict]) -> None:
    absent = dict.fromkeys(
        ("pred", "rephrase", "image", "image_rephrase", "loc", "loc_ans", "m_loc", "m_loc_q", "m_loc_a")
    )
    (edit,) = read_edits(write([record(**absent)]))
    assert edit == EditRequest("How many buses are in picture 0?", "2", id="edits.json#0")
    with pytest.raises(RecordErrors, match="alt: must not be null"):
        read_edits(write([record(alt=None)]))


def test_written_files_are_read_back_with_their_images(tmp_path: Path) -> None:
    pictures = [Image.effect_noise((6, 6), 40 + i).convert("RGB") for i in range(3)]
    edits = [
        EditRequest(
            f"What is in {i}? é\u2028", f"thing {i}", picture, "Again?", None, "Who?", "me",
            portability=(Query("And then?", picture, "x", "2-hop"),),
            probes=(Probe("near", f"What is in {i}?", pictures[i - 1], "y"), Probe("blind", f"What is in {i}?")),
            tags=("hard",), id=f"pocket-{i}", paraphrases=(Query("What, please?", picture, f"thing {i}", "polite"),),
        )
        for i, picture in enumerate(pictures)
    ]  # fmt: skip
    write_mmedit(edits, tmp_path / "out.json", images=tmp_path / "images")
    assert len(json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))) == 3
    again = read_edits(tmp_path / "out.json", images=tmp_path / "images")
    assert again.detection is not None
    assert (again.detection.format, again.detection.release) == ("mmedit", None)
    assert [edit.id for edit in again] == ["pocket-0", "pocket-1", "pocket-2"]
    for before, after in zip(edits, again, strict=True):
        assert after.probes[0].image != after.image == after.paraphrases[0].image
        assert (before.prompt, before.tags, before.portability[0].kind) == (
            after.prompt, after.tags, after.portability[0].kind
        )  # fmt: skip
    # What was read back and written again is the same file.
    write_mmedit(again, tmp_path / "again.json", images=tmp_path / "images")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "out.json").read_bytes()
    assert fingerprint(read_edits(tmp_path / "again.json", images=tmp_path / "images")) == fingerprint(again)


def test_no_edits_make_an_empty_list(tmp_path: Path) -> None:
    write_mmedit([], tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == []


@pytest.mark.parametrize(
    ("name", "records", "first"),
    [
        ("vqa_eval.json", 2093, ("How many tennis balls are in the picture?", "2")),
        ("vqa_train.json", 6345, ("How many skyscrapers are there?", "2")),
        ("caption_eval_edit.json", 1000, ("a photo of", "Employees working at a cafe that has donuts on the counter.")),
        ("caption_train_edit.json", 2849, ("a photo of", "A selection of wooden kitchen tools on a counter.")),
        ("old_release/caption_eval_edit.json", 1000, ("a photo of", "A couple trays of cookies on a counter.")),
    ],
)
def test_the_public_files_are_read_whole(shared: Path, name: str, records: int, first: tuple[str, str]) -> None:
    edits = read_edits(shared / "mmedit" / name, format="mmedit")
    assert len(edits) == records
    assert (edits[0].prompt, edits[0].target) == first
    assert all(edit.locality_prompt and edit.locality_prompt.startswith("nq question: ") for edit in edits)
    assert all(edit.target == edit.target.strip() and edit.image_locality_answer for edit in edits)
    assert [w for w in edits.warnings if w.index is not None] == []


def test_the_one_record_with_its_photo_can_be_opened(shared: Path) -> None:
    from fastedit.data import open_image

    root = shared / "mmedit" / "images"
    edits = read_edits(shared / "mmedit" / "vqa_train.json", images=root, skip_missing="parts")
    (edit,) = edits
    assert edit.id == "vqa_train.json#94"
    assert (edit.prompt, edit.target) == ("What color are the flowers in the vase?", "yellow")
    assert edit.image is not None
    assert open_image(edit.image).size == (426, 640)
    # Its other two images are not there, so these parts are absent and the text parts remain.
    assert edit.image_rephrase is edit.image_locality_image is edit.image_locality_prompt is None
    assert edit.locality_prompt == "nq question: 10 cloverfield lane is a sequel to what movie"
    assert len(edits.skipped) == 6344
