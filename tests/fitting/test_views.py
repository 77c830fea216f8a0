"""Training views: the right questions, never the record's own test questions unless asked for."""

from __future__ import annotations

import dataclasses
import random
import warnings
from pathlib import Path
from typing import Any

import pytest

from fastedit import EditRequest
from fastedit.fitting.views import WRAPPERS, ViewSource, jittered
from fastedit.objectives import ROLES, Role
from fastedit.objectives.roles import repeated
from tests.engine.conftest import make_edits, picture


@pytest.fixture
def edits() -> list[EditRequest]:
    return make_edits(5)


def by_role(source: ViewSource, index: int) -> dict[Role, object]:
    return {view.role: view.query for view in source.views(index, ROLES)}


def test_record_views_are_the_records_own(edits: list[EditRequest]) -> None:
    found = by_role(ViewSource(edits, None, source="record"), 1)
    edit = edits[1]
    assert list(found) == list(ROLES)
    assert found[Role.TEXT_REPHRASE].prompt == edit.rephrase  # type: ignore[attr-defined]
    assert found[Role.IMAGE_REPHRASE].image is edit.image_rephrase  # type: ignore[attr-defined]
    assert found[Role.TEXT_LOCALITY].prompt == edit.locality_prompt  # type: ignore[attr-defined]
    assert found[Role.IMAGE_LOCALITY].answer == edit.image_locality_answer  # type: ignore[attr-defined]


def test_heldout_views_never_use_the_records_own_test_questions(edits: list[EditRequest]) -> None:
    for pool in (None, make_edits(9)[5:]):
        source = ViewSource(edits, pool)
        for index, edit in enumerate(edits):
            found = by_role(source, index)
            assert set(found) == set(ROLES)
            assert found[Role.TEXT_REPHRASE].prompt not in (edit.prompt, edit.rephrase)  # type: ignore[attr-defined]
            assert found[Role.IMAGE_REPHRASE].image is not edit.image_rephrase  # type: ignore[attr-defined]
            assert found[Role.TEXT_LOCALITY].prompt != edit.locality_prompt  # type: ignore[attr-defined]
            assert found[Role.IMAGE_LOCALITY].image is not edit.image_locality_image  # type: ignore[attr-defined]


def test_paraphrases_are_found_in_the_pool(edits: list[EditRequest]) -> None:
    pool = [
        EditRequest("Which colour is the box?", "red", picture(1), rephrase="What colour has the box?"),
        EditRequest("Tell me the colour of the box.", "red", picture(2), rephrase="Which colour is the  BOX?"),
    ]
    edit = EditRequest("Which colour is the box?", "blue", picture(3), rephrase="What colour has the box?")
    found = by_role(ViewSource([edit], pool), 0)
    assert found[Role.TEXT_REPHRASE].prompt == "Tell me the colour of the box."  # type: ignore[attr-defined]
    assert found[Role.TEXT_REPHRASE].answer == "blue"  # type: ignore[attr-defined]


def test_near_views_ask_the_same_question_of_another_image() -> None:
    pool = [EditRequest("Which colour is it?", "red", picture(i), prediction=f"was {i}") for i in range(3)]
    edit = EditRequest("Which colour is  it?", "blue", picture(9))
    near = by_role(ViewSource([edit], pool), 0)[Role.IMAGE_LOCALITY]
    assert near.prompt == edit.prompt  # type: ignore[attr-defined]
    assert near.answer.startswith("was")  # type: ignore[attr-defined]
    assert Role.IMAGE_LOCALITY not in by_role(ViewSource([edit], pool, near=False), 0)


def test_views_do_not_depend_on_the_place_of_the_edit(edits: list[EditRequest]) -> None:
    pool = make_edits(9)[5:]
    forward, backward = ViewSource(edits, pool), ViewSource(edits[::-1], pool)
    for index in range(len(edits)):
        a, b = by_role(forward, index), by_role(backward, len(edits) - 1 - index)
        assert a[Role.TEXT_LOCALITY] == b[Role.TEXT_LOCALITY]
        assert a[Role.TEXT_REPHRASE] == b[Role.TEXT_REPHRASE]
    assert by_role(ViewSource(edits, pool, seed=1), 0) != by_role(forward, 0)


def test_absent_parts_give_no_view() -> None:
    bare = EditRequest("What is the capital?", "Rome")
    found = by_role(ViewSource([bare], None, source="record"), 0)
    assert list(found) == [Role.EDIT]
    with_pool = by_role(ViewSource([bare], [dataclasses.replace(bare, target="Bern")]), 0)
    assert set(with_pool) == {Role.EDIT, Role.TEXT_REPHRASE}


def test_jitter_keeps_the_picture_recognisable_and_is_reproducible() -> None:
    import numpy as np

    image = picture(4).resize((16, 16)).resize((64, 64))
    one, two = jittered(image, random.Random(3)), jittered(image, random.Random(3))
    assert one.tobytes() == two.tobytes()
    assert one.size == image.size
    assert one.tobytes() != image.tobytes()
    difference = np.abs(np.asarray(one, dtype=float) - np.asarray(image, dtype=float)).mean()
    assert difference < 45


def test_unknown_source_is_named(edits: list[EditRequest]) -> None:
    with pytest.raises(ValueError, match=r"views: source is one of .* \(got views='test'\)"):
        ViewSource(edits, None, source="test")


def test_what_few_records_have_is_found(edits: list[EditRequest]) -> None:
    bare = [EditRequest(f"Question {n}?", "red", picture(n)) for n in range(500)]
    source = ViewSource(edits, [*bare, make_edits(9)[8]], near=False)
    for index in range(len(edits)):
        found = by_role(source, index)
        assert found[Role.TEXT_LOCALITY].prompt == "What is the capital of country 8?"  # type: ignore[attr-defined]
        assert Role.IMAGE_LOCALITY in found


@pytest.mark.parametrize("kind", ["path", "text", "pixels"])
def test_the_edits_own_question_never_stands_for_what_must_stay(tmp_path: Path, kind: str) -> None:
    def image(seed: int) -> Any:
        if kind == "pixels":
            return picture(seed)
        picture(seed).save(tmp_path / f"{seed}.png")
        return tmp_path / f"{seed}.png" if kind == "path" else str(tmp_path / f"{seed}.png")

    edit = EditRequest("Which colour is it?", "blue", image(1))
    same = EditRequest("Which colour is it?", "red", image(1), prediction="red")
    asked = EditRequest(
        "What is it?", "cat", image(2), image_locality_prompt="which colour is it", image_locality_image=image(1),
        image_locality_answer="red", locality_prompt="Which colour is it?", locality_answer="any",
    )  # fmt: skip
    found = by_role(ViewSource([edit], [same, asked]), 0)
    assert Role.IMAGE_LOCALITY not in found
    # In text it is another question
    assert found[Role.TEXT_LOCALITY].answer == "any"  # type: ignore[attr-defined]
    other = dataclasses.replace(same, image=image(3))
    near = by_role(ViewSource([edit], [same, other]), 0)[Role.IMAGE_LOCALITY]
    assert near.image == other.image  # type: ignore[attr-defined]


NO_IMAGE_LOCALITY = dict.fromkeys(("image_locality_image", "image_locality_prompt", "image_locality_answer"))
TEXT_ONLY = {"image": None, "image_rephrase": None, "probes": (), **NO_IMAGE_LOCALITY}


@pytest.mark.parametrize(
    ("source", "changes", "lacking"),
    [
        ("heldout", {"locality_prompt": None, "locality_answer": None}, "text_locality"),
        ("heldout", {"image_locality_answer": None, "prediction": None}, "image_locality"),
        ("record", {"rephrase": None, "image_rephrase": None}, "text_rephrase, image_rephrase"),
        ("record", NO_IMAGE_LOCALITY, "image_locality"),
        (
            "heldout",
            {"image": None, "image_rephrase": None, "probes": (), **NO_IMAGE_LOCALITY},
            "image_rephrase, image_locality",
        ),
    ],
)
def test_views_that_no_edit_will_have_are_told(
    edits: list[EditRequest], source: str, changes: dict[str, Any], lacking: str
) -> None:
    bare = [dataclasses.replace(edit, **changes) for edit in edits]
    with pytest.warns(RuntimeWarning, match=rf"views: no record has what {lacking} views are made of;"):
        ViewSource(bare, None, source=source).check(ROLES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ViewSource(bare, None, source=source).check((Role.EDIT,))
        # One that has it is enough
        ViewSource([*bare, edits[0]], None, source=source).check(ROLES)


def test_a_role_that_is_named_several_times_has_different_views(edits: list[EditRequest]) -> None:
    pool, roles = make_edits(12)[5:], repeated(ROLES, 3)
    source = ViewSource(edits, pool)
    for index in range(len(edits)):
        views = source.views(index, roles)
        assert [view.role for view in views] == sorted(roles)
        for role in ROLES[1:]:
            queries = [view.query for view in views if view.role is role]
            assert all(a != b for n, a in enumerate(queries) for b in queries[:n]), role
        # The first of each is what it is alone, as long as nothing was drawn before it
        assert views[1] == source.views(index, ROLES)[1]


def test_different_views_are_as_many_as_there_are(edits: list[EditRequest]) -> None:
    """Wordings end with those that wrap the question; a record has one of each."""
    edit = EditRequest("Which colour is the box?", "blue", picture(3))
    pool = [EditRequest("Which colour is the box?", "red", picture(1), rephrase="What colour has the box?")]
    wordings = [v.query.prompt for v in ViewSource([edit], pool).views(0, (Role.TEXT_REPHRASE,) * 9)]
    assert wordings[0] == "What colour has the box?"
    assert len(wordings) == len(set(wordings)) == 1 + len(WRAPPERS)
    assert [view.role for view in ViewSource(edits, None, source="record").views(1, repeated(ROLES, 3))] == list(ROLES)
