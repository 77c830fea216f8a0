from collections.abc import Callable
from pathlib import Path

import pytest

from fastedit.data import RecordErrors, read_edits
from fastedit.requests import Query

ONE_HOP = {
    "port_edit_q": "Where is it?",
    "port_edit_a": "Ohio",
    "port_q": "Where is what is shown?",
    "port_a": "Ohio\n",
}
TWO_HOP = {"port_type": "2-hop", "Q&A": {"Question": "Who rules where it is?", "Answer": "X"}}


def test_both_shapes_become_queries_about_the_edit_image(
    write: Callable[..., Path], entity: Callable[..., dict]
) -> None:
    (first, second, third) = read_edits(
        write(
            [entity(0, port_new=[ONE_HOP]), entity(1, port_new=[TWO_HOP, TWO_HOP | {"port_type": "4-hop"}]), entity(2)]
        )
    )
    assert first.portability == (Query("Where is what is shown?", "m.00/google_1.jpg", "Ohio", "1-hop"),)
    assert [query.kind for query in second.portability] == ["2-hop", "4-hop"]
    assert second.portability[0] == Query("Who rules where it is?", "m.01/google_1.jpg", "X", "2-hop")
    assert third.portability == ()


def test_our_own_portability_comes_after(write: Callable[..., Path], entity: Callable[..., dict]) -> None:
    (edit,) = read_edits(write([entity(port_new=[ONE_HOP], portability=[{"prompt": "p"}])]))
    assert [query.prompt for query in edit.portability] == ["Where is what is shown?", "p"]


@pytest.mark.parametrize(
    ("port_new", "field", "rule"),
    [
        ({}, "port_new", "must be a list"),
        (["x"], "port_new[0]", "must be an object"),
        ([{k: v for k, v in ONE_HOP.items() if k != "port_q"}], "port_new[0].port_q", "must be present"),
        ([{k: v for k, v in ONE_HOP.items() if k != "port_edit_a"}], "port_new[0].port_edit_a", "must be present"),
        ([ONE_HOP | {"port_a": ""}], "port_new[0].port_a", "must not be empty"),
        ([TWO_HOP | {"port_type": "5-hop"}], "port_new[0].port_type", "must be one of 1-hop"),
        ([{"port_type": "1-hop"}], "port_new[0].Q&A", "must be present"),
        ([{"Q&A": TWO_HOP["Q&A"]}], "port_new[0].port_type", "must be present"),
        ([TWO_HOP | {"Q&A": {"Question": "x"}}], "port_new[0].Q&A.Answer", "must be present"),
        ([ONE_HOP, TWO_HOP | {"Q&A": 3}], "port_new[1].Q&A", "must be an object"),
    ],
)
def test_bad_portability_is_reported_at_its_field(
    write: Callable[..., Path], entity: Callable[..., dict], port_new: object, field: str, rule: str
) -> None:
    with pytest.raises(RecordErrors) as caught:
        read_edits(write([entity(port_new=port_new)]))
    assert any(p.field == field and rule in p.rule for p in caught.value.problems), caught.value.problems


@pytest.mark.parametrize("image", ["", 3, None, "../x.jpg"])
def test_a_bad_image_beside_portability_is_one_problem(
    write: Callable[..., Path], entity: Callable[..., dict], image: object
) -> None:
    with pytest.raises(RecordErrors) as caught:
        read_edits(write([entity(image=image, port_new=[ONE_HOP])]))
    assert {p.field for p in caught.value.problems} <= {"image", "image_rephrase"}


def test_a_missing_image_is_reported_once(
    write: Callable[..., Path], entity: Callable[..., dict], images: Callable[..., Path]
) -> None:
    root = images("m.00/bing_2.jpg", "m.09/x.jpg")
    with pytest.raises(RecordErrors) as caught:
        read_edits(write([entity(port_new=[ONE_HOP])]), images=root)
    assert [p.field for p in caught.value.problems] == ["image"]


@pytest.mark.parametrize(
    ("name", "records", "queries"), [("eval.json", 3174, 0), ("eval_edit_onehop.json", 1278, 1278)]
)
def test_the_public_files_are_read_whole(shared: Path, name: str, records: int, queries: int) -> None:
    edits = read_edits(shared / "vlkeb" / name)
    assert len(edits) == records
    assert edits.detection is not None
    assert edits.detection.format == "vlkeb"
    assert sum(len(edit.portability) for edit in edits) == queries
    assert all(query.image == edit.image and query.answer for edit in edits for query in edit.portability)
    assert not edits.warnings
