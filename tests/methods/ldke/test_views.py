"""What the classifier learns from: the questions of a record, what is the same, which pairs say something."""

from __future__ import annotations

from dataclasses import replace

import torch

import fastedit
from fastedit import EditRequest, Probe
from fastedit.methods.ldke.views import RELATED, Asked, Pairs, Questions, TokenStore, walked
from fastedit.requests import Query
from tests.engine.conftest import make_edits, picture


def records() -> list[EditRequest]:
    """The second asks the first one's question in other words, about another image."""
    made = make_edits(3)
    made[1] = replace(made[1], prompt=made[0].rephrase or "", rephrase="Say what number 0 is.")
    return made


def kinds(asked: list[Asked]) -> dict[str, int]:
    found: dict[str, int] = {}
    for one in asked:
        found[one.kind] = found.get(one.kind, 0) + 1
    return found


def test_a_record_gives_its_own_questions_and_what_they_make_together() -> None:
    own = Questions(records()).of[0]
    assert kinds(own) == {
        "reliability": 1, "text_generality": 1, "image_generality": 1, "both": 1, "text_locality": 1,
        "image_locality": 1, "near": 2, "same": 2, "blind": 2, "portability": 1,
    }  # fmt: skip
    record = records()[0]
    by_kind: dict[str, list[Asked]] = {}
    for one in own:
        by_kind.setdefault(one.kind, []).append(one)
    (both,) = by_kind["both"]
    assert both.prompt == record.rephrase
    assert both.image == record.image_rephrase
    assert {one.prompt for one in by_kind["near"]} == {record.prompt, record.rephrase}
    assert len({id(one.image) for one in by_kind["same"]}) == 2
    assert {one.image for one in by_kind["blind"]} == {None}
    assert {one.answer for one in own if one.kind in RELATED} == {"nothing"}
    # A probe without a known answer has none: not some answer that a view would be fed
    assert by_kind["near"][0].answer is None


def test_a_record_without_probes_gets_hard_questions_all_the_same() -> None:
    bare = [
        replace(edit, probes=(), rephrase=None, image_rephrase=None, portability=(), image_locality_image=None,
                image_locality_prompt=None, image_locality_answer=None)
        for edit in make_edits(5)
    ]  # fmt: skip
    own = Questions(bare, seed=1).of[2]
    found = kinds(own)
    assert found["reliability"] == found["text_generality"] == found["image_generality"] == 1
    assert found["blind"] == 2
    assert found["same"] >= 2
    for one in own:
        if one.kind == "same":
            assert one.prompt != bare[2].prompt
    text = [replace(edit, image=None) for edit in bare]
    assert "blind" not in kinds(Questions(text).of[0])


def test_wordings_and_pictures_are_one_through_any_record() -> None:
    questions = Questions(records())
    first, second, third = ({one.kind: one for one in own} for own in questions.of)
    relation, entity = questions.relation, questions.entity
    assert relation(first["reliability"]) == relation(first["both"]) == relation(second["text_generality"])
    assert relation(first["reliability"]) != relation(third["reliability"])
    assert entity(first["reliability"]) == entity(first["both"]) != entity(second["reliability"])
    assert entity(first["blind"]) == -1 == entity(third["text_locality"])


def test_pairs_that_say_nothing_are_left_out() -> None:
    edits = records()
    # An image that is asked the first record's question and answered as the first image is
    alike = Probe("near", edits[0].prompt, picture(77), "nothing")
    edits[0] = replace(edits[0], probes=(*edits[0].probes, alike))
    questions = Questions(edits)
    keys = [(record, number) for record in range(3) for number in range(len(questions.of[record]))]
    asked = [questions.of[record][number] for record, number in keys]
    edit = next(row for row, one in enumerate(asked) if one.kind == "reliability")
    pairs = Pairs.of(questions, keys, [edit])
    assert pairs.related.shape == (1, len(keys))
    for row, one in enumerate(asked):
        own = keys[row][0] == 0
        assert bool(pairs.own[0, row]) == own
        assert bool(pairs.related[0, row]) == (own and one.kind in RELATED)
        # The second record asks the same of another image, where the answer is the same as well
        silent = row == edit or (own and one.kind == "portability")
        silent |= (
            one.image is not None
            and not pairs.related[0, row]
            and one.answer == "nothing"
            and (questions.relation(one) == questions.relation(asked[edit]))
        )
        assert bool(pairs.counts[0, row]) == (not silent), (row, one)
    assert sum(not bool(c) for c in pairs.counts[0]) > 4


def test_stored_tokens_are_those_of_a_walk() -> None:
    model = fastedit.load("random:llava-tiny")
    questions = Questions(records())
    keys = [(0, 0), (2, 3), (0, 4), (0, 0)]
    queries = [Query(questions.of[r][n].prompt, questions.of[r][n].image) for r, n in keys]
    expected = walked(model, (1, "ffn"), queries) if model.n_layers > 2 else walked(model, (0, "ffn"), queries)
    point = (1, "ffn") if model.n_layers > 2 else (0, "ffn")
    for room in (1 << 20, 0):
        store = TokenStore(model, point, questions, room)
        for _ in range(2):
            found = store.get(keys)
            torch.testing.assert_close(found.text, expected.text)
            torch.testing.assert_close(found.image, expected.image)
            assert torch.equal(found.text_count, expected.text_count)
        assert bool(store._kept) == (room > 0)


def test_rewordings_ask_what_a_record_asks_and_siblings_something_else_about_its_image() -> None:
    edits, other = records(), [["Is it dark?"], [], ["Is it light?", "Is it far?"]]
    plain, questions = Questions(edits, seed=3), Questions(edits, seed=3, wordings=4, siblings=other)
    for record, own, kept, texts in zip(edits, questions.of, plain.of, other, strict=True):
        assert own[: len(kept)] == kept
        assert own[len(kept) : len(kept) + len(texts)] == [Asked("same", text, record.image, None) for text in texts]
        known = {one.prompt: questions.relation(one) for one in own if not one.means}
        added = own[len(kept) + len(texts) :]
        assert len(added) == 2 * 4
        assert sum(one.kind in RELATED for one in added) == 4
        for one in added:
            # In other words, the same question for whoever counts what is the same
            assert questions.relation(one) == known[one.means]
            assert one.kind not in ("reliability", "image_generality")
            if one.kind in RELATED:
                assert one.means in (record.prompt, record.rephrase)
                assert one.image in (record.image, record.image_rephrase)
        assert any(one.prompt != one.means for one in added)
        edit = next(one for one in kept if one.kind == "reliability")
        assert all(known[text] != questions.relation(edit) for text in texts)
    again = Questions(edits, seed=3, wordings=4, siblings=other)
    assert again.of == questions.of
    assert Questions(edits, seed=4, wordings=4, siblings=other).of != questions.of


def test_siblings_stand_for_questions_by_lot_that_may_be_the_edits_own() -> None:
    """A question of another record may be the edit's own in other words; siblings were asked and are not."""
    bare = [replace(edit, probes=()) for edit in make_edits(5)]
    others = {prompt for edit in bare for prompt in (edit.prompt, edit.rephrase)}
    drawn = [{one.prompt for one in own if one.kind == "same" and not one.means} for own in Questions(bare).of]
    assert all(prompts and prompts <= others for prompts in drawn)
    known = [["Is it dark?"], [], [], [], []]
    asked = [
        {one.prompt for one in own if one.kind == "same" and not one.means}
        for own in Questions(bare, wordings=4, siblings=known).of
    ]
    assert asked == [{"Is it dark?"}, *drawn[1:]]


def test_a_question_in_text_is_reworded_without_an_image() -> None:
    text = [replace(edit, image=None, image_rephrase=None, probes=()) for edit in make_edits(5)]
    for own in Questions(text, wordings=3).of:
        added = [one for one in own if one.means and one.kind in RELATED]
        assert len(added) == 3
        assert all(one.image is None for one in added)
