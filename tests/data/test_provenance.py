import dataclasses
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from fastedit.data import fingerprint
from fastedit.requests import EditRequest, Probe, Query

EDIT = EditRequest(
    "p", "t", "i.png", "r", "j.png", "l", "la", "k.png", "m", "ma",
    (Query("q", "i.png", "x", "2-hop"),), (Probe("near", "p", "n.png", "y"),), "old", "id", ("hard",),
)  # fmt: skip


def test_it_is_a_stable_hash() -> None:
    # A change of this value invalidates every stored result: raise the version in the module instead.
    assert fingerprint([EDIT]) == "b17d26b6c9d726783e249c0188aac535d614300cfe6fe7cdeca405c1fdf48f59"
    assert fingerprint([EDIT]) == fingerprint((dataclasses.replace(EDIT),))


def test_every_field_but_the_id_counts() -> None:
    whole = fingerprint([EDIT])
    changed = {
        "portability": (), "probes": (), "tags": (), "id": "other", "prompt": "P", "target": "T", "image": "I.png",
        "rephrase": "R", "image_rephrase": "J.png", "locality_prompt": "L", "locality_answer": "LA",
        "image_locality_image": "K.png", "image_locality_prompt": "M", "image_locality_answer": "MA", "prediction": "O",
        "paraphrases": (Query("Q", kind="polite"),),
    }  # fmt: skip
    assert set(changed) == {field.name for field in dataclasses.fields(EditRequest)}
    for name, value in changed.items():
        assert (fingerprint([dataclasses.replace(EDIT, **{name: value})]) == whole) == (name == "id"), name


def test_order_counts() -> None:
    other = EditRequest("a", "b")
    assert len({fingerprint(edits) for edits in ([EDIT, other], [other, EDIT], [EDIT], [EDIT, other, other])}) == 4


def test_text_does_not_slip_between_fields() -> None:
    assert fingerprint([EditRequest("a", "b", rephrase="c")]) != fingerprint([EditRequest("a", "b", prediction="c")])
    assert fingerprint([EditRequest("a b", "c")]) != fingerprint([EditRequest("a", "b c")])


def test_images_count_by_content(images: Callable[..., Path], tmp_path: Path) -> None:
    root = images("a.png", "b.png")
    (tmp_path / "copy.png").write_bytes((root / "a.png").read_bytes())
    a, copy, b = (EditRequest("p", "t", path) for path in (root / "a.png", str(tmp_path / "copy.png"), root / "b.png"))
    assert fingerprint([a]) == fingerprint([copy]) != fingerprint([b])
    picture = Image.new("RGB", (2, 2))
    one, two = EditRequest("p", "t", picture), EditRequest("p", "t", picture.copy())
    assert fingerprint([one]) == fingerprint([two]) != fingerprint([a])


def test_paths_that_cannot_be_read_count_as_text() -> None:
    assert fingerprint([EditRequest("p", "t", "no/a.png")]) == fingerprint([EditRequest("p", "t", Path("no/a.png"))])
    assert fingerprint([EditRequest("p", "t", "no/a.png")]) != fingerprint([EditRequest("p", "t", "no/b.png")])
