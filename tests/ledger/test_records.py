"""Requests come back as they were given."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastedit import EditRequest, Probe, Query, Video
from fastedit.data.images import open_image
from fastedit.data.problems import MissingImageError
from fastedit.ledger import DamagedLedger
from fastedit.ledger.records import ImageStore, from_record, image_names, question_digest, to_record
from fastedit.requests import images_of
from tests.engine.conftest import make_edits, picture


def pixels(visual: object) -> list[bytes]:
    return [np.asarray(open_image(source)).tobytes() for source in images_of(visual)]  # type: ignore[arg-type]


def test_every_part_comes_back(tmp_path: Path) -> None:
    picture(7).save(tmp_path / "a.png")
    picture(8).save(tmp_path / "b.jpg")
    first = replace(
        make_edits(1)[0], tags=("hard", "two"), prediction="",
        probes=(Probe("same", "So?", picture(3), wording="unseen"), Probe("text_locality", "Who?")),
        paraphrases=(Query("which", picture(4), "b", "polite"),),
    )  # fmt: skip
    listed = replace(
        first, image=(tmp_path / "a.png", picture(9)), image_rephrase=tmp_path / "b.jpg",
        image_locality_image=Video((picture(1), picture(2)), fps=2.5), target=" two  words\n",
    )  # fmt: skip
    plain = EditRequest("Who?", "She")
    store = ImageStore(tmp_path / "edits")
    (tmp_path / "edits").mkdir()
    for request in (first, listed, plain):
        record = json.loads(json.dumps(to_record(request, store)))
        back = from_record(record, ImageStore(tmp_path / "edits"))
        for name in ("image", "image_rephrase", "image_locality_image"):
            assert pixels(getattr(back, name)) == pixels(getattr(request, name))
            assert type(getattr(back, name)) is type(getattr(request, name)) or not isinstance(
                getattr(request, name), (tuple, Video)
            )
        bare = {"image": None, "image_rephrase": None, "image_locality_image": None, "image_locality_prompt": None}
        bare |= {"image_locality_answer": None, "portability": (), "probes": (), "paraphrases": ()}
        assert replace(back, **bare) == replace(request, **bare)  # type: ignore[arg-type]
        assert [(q.prompt, q.answer, q.kind) for q in back.portability] == [
            (q.prompt, q.answer, q.kind) for q in request.portability
        ]
        assert [(p.score, p.prompt, p.answer, pixels(p.image)) for p in back.probes] == [
            (p.score, p.prompt, p.answer, pixels(p.image)) for p in request.probes
        ]
        assert [(p.kind, p.prompt, p.answer, pixels(p.image)) for p in back.paraphrases] == [
            (p.kind, p.prompt, p.answer, pixels(p.image)) for p in request.paraphrases
        ]
        assert question_digest(back) == question_digest(request)
        # What was read from the ledger is written as what it was read from
        assert to_record(back, store) == record
    # A file is copied as it is
    assert (tmp_path / "b.jpg").read_bytes() in [
        path.read_bytes() for path in (tmp_path / "edits" / "images").iterdir()
    ]


def test_questions_are_told_apart_by_wording_and_pixels(tmp_path: Path) -> None:
    picture(1).save(tmp_path / "a.png")
    asked = EditRequest("What is it?", "a cat", picture(1))
    same = (replace(asked, image=tmp_path / "a.png"), replace(asked, prompt='"what is IT"', target="x"))
    other = (
        replace(asked, image=picture(2)), replace(asked, prompt="What was it?"), replace(asked, image=None),
        replace(asked, image=(picture(1), picture(2))), replace(asked, image=Video((picture(1),))),
    )  # fmt: skip
    assert {question_digest(each) for each in same} == {question_digest(asked)}
    assert len({question_digest(each) for each in (asked, *other)}) == 6


def test_a_name_that_is_none_opens_no_file(tmp_path: Path) -> None:
    store = ImageStore(tmp_path)
    for name in ("../../secret.png", "/etc/passwd", "a.png", "0" * 64, 7, None, "0" * 64 + ".png\n"):
        with pytest.raises(DamagedLedger, match="an image's name is its checksum"):
            from_record({"prompt": "a", "target": "b", "image": name}, store)
    with pytest.raises(DamagedLedger, match="a stored request is complete"):
        from_record({"prompt": "a", "target": "b", "evil": 1}, store)


def test_an_image_that_is_absent_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(MissingImageError):
        to_record(EditRequest("a", "b", tmp_path / "absent.png"), ImageStore(tmp_path))
    assert not (tmp_path / "images").exists()


def test_names_of_images_are_found_wherever_they_stand(tmp_path: Path) -> None:
    request = EditRequest(
        "a", "b", (picture(1), picture(2)), image_rephrase=Video((picture(3),)),
        portability=(Query("c", picture(4)),), probes=(Probe("near", "d", picture(5)),),
    )  # fmt: skip
    store = ImageStore(tmp_path)
    assert len(set(image_names(to_record(request, store)))) == 5
    assert {path.name for path in (tmp_path / "images").iterdir()} == set(image_names(to_record(request, store)))
    assert [store.problem(path.name) for path in (tmp_path / "images").iterdir()] == [""] * 5


def test_an_image_in_another_mode_is_kept_as_it_is_seen(tmp_path: Path) -> None:
    store = ImageStore(tmp_path)
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    back = from_record(to_record(EditRequest("a", "b", grey), store), store)
    assert pixels(back.image) == pixels(grey)
