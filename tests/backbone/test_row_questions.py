"""Questions are found in rows of tokens that processors make, and exchanged there."""

from __future__ import annotations

import pytest

import fastedit
from fastedit import Query
from fastedit.backbone import EditableModel
from fastedit.backbone.row_questions import rewrite_row
from tests.engine.conftest import picture
from tests.engine.stock_calls import load

MODELS = [
    "random:llava-tiny",
    "random:blip2-tiny",
    "random:qwen2vl-tiny",
    "pocket-llava",
    "pocket-blip2",
    "generic:gemma3",
]
QUESTIONS = ["what is it ?", "What is number 0 here? ", "two  spaces ", "line\nbreak", "é, ü and 7%", "user assistant"]


def tokens(model: EditableModel, query: Query) -> list[int]:
    encoded = model.encode([query], answers=False)
    ids: list[int] = encoded.input_ids[0].tolist()
    return ids


@pytest.mark.parametrize("seen", [True, False], ids=["image", "text"])
@pytest.mark.parametrize("name", MODELS)
def test_a_question_is_exchanged_as_if_the_other_had_been_asked(name: str, seen: bool) -> None:
    model = load(name, "float32" if name.startswith("pocket") else "float64")
    image = picture(3) if seen else None
    for question in QUESTIONS:
        found = rewrite_row(model, tokens(model, Query(question, image)), lambda text: f"New Fact: red\n{text} too")
        assert found.ids == tokens(model, Query(f"New Fact: red\n{question} too", image)), question
        marked = [token == model.adapter.image_token_id for token in found.ids]
        first, end = found.image
        assert any(marked) == seen
        assert not any((*marked[:first], *marked[end:]))


def test_tokens_that_no_question_has_are_refused() -> None:
    model = load("random:qwen2vl-tiny")
    ids = tokens(model, Query("what is it ?", picture(3)))
    for broken in (ids[:-1], ids[1:], [*ids, ids[-1]]):
        with pytest.raises(ValueError, match="the model's own template makes of a question"):
            rewrite_row(model, broken, lambda text: text)
    limit = model.adapter.text.config.max_position_embeddings
    with pytest.raises(ValueError, match=f"at most {limit} tokens"):
        rewrite_row(model, ids, lambda text: text * limit)


def test_a_template_is_looked_at_on_both_sides_of_a_question() -> None:
    model = fastedit.load("random:llava-tiny", template="Q {} A {image} now:")
    image = picture(3)
    found = rewrite_row(model, tokens(model, Query("what ?", image)), lambda text: f"say red {text}")
    assert found.ids == tokens(model, Query("say red what ?", image))
