"""Questions nearly in the words of another, and which of them ask the same."""

from __future__ import annotations

import random
from dataclasses import replace

import fastedit
from fastedit import EditRequest
from fastedit.methods.captured import answered
from fastedit.methods.meta.siblings import COUNT, Siblings, siblings_of
from fastedit.pocket.templates import TEMPLATES


def record(prompt: str, rephrase: str | None = None) -> EditRequest:
    return EditRequest(prompt, "red", rephrase=rephrase)


RECORDS = [
    record("What colour is the circle?", "What color is the circle?"),
    record("What color is the circle?", "What is the colour of the circle?"),
    record("What colour is the square?"),
    record("Which country has this flag?"),
]


def test_what_any_record_gives_as_a_rephrase_is_no_sibling() -> None:
    found = Siblings(RECORDS).of("what colour is  the circle?", random.Random(0), 5)
    assert found[:1] == ["What colour is the square?"] or "What colour is the square?" in found
    assert not any("circle" in text for text in found)
    assert not any("flag" in text for text in Siblings(RECORDS[:3]).of("Which flag?", random.Random(0), 5))


def test_without_the_record_that_says_so_they_are_two_questions() -> None:
    assert "What color is the circle?" in Siblings([RECORDS[2], record("What color is the circle?")]).of(
        "What colour is the circle?", random.Random(0), 5
    )


def test_draws_are_the_same_for_the_same_state_and_no_more_than_asked() -> None:
    known = Siblings([record(text.format("circle")) for text in TEMPLATES["colour"]])
    first = known.of("What colour is the square?", random.Random(3), 2)
    assert len(first) == 2
    assert first == known.of("What colour is the square?", random.Random(3), 2)
    assert Siblings([]).of("Why?", random.Random(0), 2) == []


def test_what_the_model_answers_alike_is_no_sibling() -> None:
    """Of questions about one picture those that have the answer of the record's own may be other words for it."""
    model = fastedit.load("pocket-llava")
    edits = [replace(edit, rephrase=None) for edit in fastedit.read_edits("pocket-vqa", split="train", limit=24)]
    found = siblings_of(model, edits, seed=0)
    assert found == siblings_of(model, edits, seed=0)
    assert sum(len(texts) == COUNT for texts in found) > len(edits) // 2
    asked = {edit.prompt for edit in edits}
    by_words = Siblings(edits)
    left_out = 0
    for edit, texts in zip(edits, found, strict=True):
        assert len(set(texts)) == len(texts) <= COUNT
        assert set(texts) <= asked - {edit.prompt}
        said = model.generate([fastedit.Query(text, edit.image) for text in texts]) if texts else []
        assert edit.prediction not in said
        near = by_words.of(edit.prompt, random.Random(0), 8)
        left_out += sum(answered(model, [fastedit.Query(text, edit.image, edit.prediction) for text in near]))
    # Without a record that says so, "What color is it?" stands among the siblings of "Which colour is it?"
    assert left_out > 0


def test_records_without_an_image_or_a_known_answer_have_no_siblings() -> None:
    model = fastedit.load("pocket-llava")
    edits = fastedit.read_edits("pocket-vqa", split="train", limit=4)
    bare = [replace(edits[0], prediction=None), replace(edits[1], image=None, image_rephrase=None), *edits[2:]]
    assert siblings_of(model, bare, seed=0)[:2] == [[], []]


def test_an_answer_is_given_where_greedy_decoding_gives_all_of_it() -> None:
    model = fastedit.load("pocket-llava")
    edits = fastedit.read_edits("pocket-vqa", split="train", limit=70)
    asked = [fastedit.Query(edit.prompt, edit.image, edit.prediction) for edit in edits]
    asked += [replace(query, answer=edit.target) for query, edit in zip(asked, edits, strict=True)]
    said = model.generate([replace(query, answer=None) for query in asked])
    assert answered(model, asked) == [text == query.answer for text, query in zip(said, asked, strict=True)]
