"""Training views: the right questions, never the record's own test questions unless asked for."""

from __future__ import annotations

import dataclasses
import random

import pytest

from fastedit import EditRequest
from fastedit.objectives import ROLES, Role
from fastedit.views import ViewSource, jittered
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
