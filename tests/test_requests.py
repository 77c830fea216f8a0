import dataclasses
from pathlib import Path

import pytest
from PIL import Image

from fastedit.requests import EditRequest, Probe, Query


def test_a_request_needs_only_a_prompt_and_a_target() -> None:
    edit = EditRequest("What is this?", "a bus")
    others = [field for field in dataclasses.fields(edit) if field.name not in ("prompt", "target")]
    assert {getattr(edit, field.name) for field in others} == {None, (), ""}
    assert edit.query == Query("What is this?", None, "a bus")


def test_a_request_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        EditRequest("a", "b").target = "c"  # type: ignore[misc]


def test_images_are_paths_or_pictures() -> None:
    picture = Image.new("RGB", (2, 2))
    edit = EditRequest("a", "b", image=picture, image_rephrase="x.png", portability=[Query("c", Path("d.png"))])
    assert edit.image is picture
    assert edit.portability == (Query("c", Path("d.png")),)


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"prompt": " "}, ValueError, "EditRequest: prompt must not be empty"),
        ({"target": ""}, ValueError, "EditRequest: target must not be empty"),
        ({"target": 2}, TypeError, r"target must be text \(got target=2\)"),
        ({"rephrase": ""}, ValueError, "rephrase must not be empty"),
        ({"image": 3}, TypeError, "image must be a path or a PIL image"),
        ({"image": b"x"}, TypeError, "image must be a path or a PIL image"),
        ({"image_rephrase": ""}, ValueError, "image_rephrase must not be an empty path"),
        ({"locality_answer": "x"}, ValueError, "locality_answer needs locality_prompt"),
        ({"image_locality_image": "x"}, ValueError, "go together .got image_locality_image without image_loc"),
        ({"image_locality_prompt": "x"}, ValueError, "go together"),
        ({"image_locality_answer": "x"}, ValueError, "image_locality_answer needs"),
        ({"portability": "x"}, TypeError, "portability must be a list of Query"),
        ({"probes": [Query("x")]}, TypeError, r"probes must hold Probe \(got probes\[0\] of type Query\)"),
        ({"paraphrases": [Query("x")]}, ValueError, r"paraphrases have a kind of text_.*polite \(got .*kind=''"),
        ({"paraphrases": [Probe("blind", "x")]}, TypeError, "paraphrases must hold Query"),
        ({"tags": "hard"}, TypeError, "tags must be a list of str"),
        ({"prediction": 3}, TypeError, "prediction must be text"),
        ({"id": None}, TypeError, "id must be text"),
    ],
)
def test_what_is_wrong_without_reading_is_refused(fields: dict, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        EditRequest(**{"prompt": "a", "target": "b"} | fields)


def test_an_empty_prediction_is_a_prediction() -> None:
    assert EditRequest("a", "b", prediction="").prediction == ""


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"kind": "far", "prompt": "x"}, "kind must be one of near, blind, same"),
        ({"kind": "near", "prompt": "x"}, "a near probe needs another image"),
        ({"kind": "blind", "prompt": "x", "image": "y"}, "a blind probe has no image"),
        ({"kind": "text_locality", "prompt": "x", "image": "y"}, "a text_locality probe has no image"),
        ({"kind": "image_locality", "prompt": "x"}, "a image_locality probe needs another image"),
        ({"kind": "same", "prompt": "x", "image": "y", "wording": "odd"}, 'wording must be "" or "unseen"'),
        ({"kind": "same", "prompt": " ", "image": "y"}, "prompt must not be empty"),
        ({"kind": "same", "prompt": "x", "image": "y", "answer": ""}, "answer must not be empty"),
    ],
)
def test_a_probe_is_what_its_kind_says(fields: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Probe(**fields)


def test_a_probe_in_unseen_wording_counts_for_another_score() -> None:
    assert [Probe("same", "x", "y.png", wording=wording).score for wording in ("", "unseen")] == ["same", "same_unseen"]


def test_a_probe_is_a_query() -> None:
    assert Probe("near", "x", "y.png", "z").query == Query("x", "y.png", "z")


def test_a_query_has_text_for_a_kind() -> None:
    with pytest.raises(TypeError, match="kind must be text"):
        Query("x", kind=2)  # type: ignore[arg-type]
