from pathlib import Path

import pytest
from PIL import Image

from fastedit.data import Conflict, Duplicate, leakage, read_edits, report
from fastedit.data.report import question_key
from fastedit.requests import EditRequest


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("What colour is it?", " what  COLOUR\nis it"),
        ("What colour is it?", '"What colour is it?"'),
        ("a photo of", "A photo of."),
    ],
)
def test_questions_are_compared_without_dress(first: str, second: str) -> None:
    assert question_key(first) == question_key(second)


def test_different_questions_stay_different() -> None:
    texts = ["is it red?", "is it a red one?", "is its red?", "is it re-d?", "3.5?", "35?"]
    assert len({question_key(text) for text in texts}) == len(texts)


def test_duplicates_and_conflicts_are_told_apart() -> None:
    edits = [
        EditRequest("What colour is it?", "red", "a.png"),
        EditRequest("what colour  is it", "Red", "a.png"),
        EditRequest("What colour is it?", "blue", "a.png"),
        EditRequest("What colour is it?", "blue", "b.png"),
        EditRequest("What shape is it?", "round", "a.png"),
        EditRequest("What colour is it?", "green"),
    ]
    found = report(edits)
    assert found.duplicates == (Duplicate("What colour is it?", "red", (0, 1)),)
    (conflict,) = found.conflicts
    assert conflict == Conflict("what colour is it", (0, 1, 2), ("red", "Red", "blue"), ("prompt",) * 3)
    assert conflict.literal
    assert found.shared_images == ((0, 1, 2, 4),)
    assert (found.n_edits, found.n_images) == (6, 2)


def test_a_rephrase_may_collide_too() -> None:
    edits = [
        EditRequest("What time is it?", "8:25", "a.png", "What does the clock say?"),
        EditRequest("What does the clock say?", "no clock", "a.png"),
        EditRequest("Which time?", "9:00", "a.png", '"What does the clock say?"'),
        EditRequest("When?", "x", "b.png", "What does the clock say?"),
    ]
    (conflict,) = report(edits).conflicts
    assert conflict.edits == (0, 1, 2)
    assert conflict.asked_as == ("rephrase", "prompt", "rephrase")
    assert not conflict.literal


def test_the_same_pair_is_one_conflict() -> None:
    edits = [EditRequest("A?", "x", "a.png", "B?"), EditRequest("A?", "y", "a.png", "B?")]
    (conflict,) = report(edits).conflicts
    assert conflict.literal


def test_text_only_edits_conflict_with_each_other() -> None:
    found = report([EditRequest("Who?", "x"), EditRequest("who", "y")])
    assert found.conflicts[0].edits == (0, 1)
    assert (found.n_images, found.shared_images) == (0, ())


def test_images_in_memory_are_compared_by_content() -> None:
    picture = Image.new("RGB", (3, 3))
    edits = [EditRequest("A?", "x", picture), EditRequest("A?", "y", picture.copy())]
    assert report(edits).conflicts[0].edits == (0, 1)
    assert leakage(edits[:1], edits[1:]).edits == (0,)


def test_oddities_are_listed() -> None:
    edits = [
        EditRequest("A?", "x", "a.png", "a", prediction="X "),
        EditRequest("B?", "y", "b.png", '"B?"\n\nRewritten as:\n"C?"', prediction="x"),
        EditRequest(
            "C?", "z", "c.png", image_locality_image="a.png", image_locality_prompt="D?", image_locality_answer="w"
        ),
    ]
    found = report(edits)
    assert (found.already_right, found.same_rephrase, found.odd_rephrase) == ((0,), (0,), (1,))
    assert found.locality_on_edit_image == (2,)
    assert str(found).splitlines() == [
        "3 edits on 3 images; 0 edits share an image with another",
        "0 duplicates (same image, question and target)",
        "0 conflicts (same image and question, different targets), 0 of them between edit prompts",
        "1 edits whose recorded prediction already is the target",
        "1 rephrases equal to the prompt, 1 of several lines",
        "1 image-locality questions on the image of an edit",
    ]


def test_an_empty_list_has_an_empty_report() -> None:
    assert report([]).n_edits == 0
    assert str(leakage([], [])).startswith("0 of 0 evaluation images (0%)")


def test_leakage_is_told_by_image_question_and_answer() -> None:
    train = [EditRequest("A?", "x", "a.png", "B?"), EditRequest("A?", "x", "b.png"), EditRequest("A?", "x")]
    held_out = [
        EditRequest("A?", "X", "a.png"),
        EditRequest("b", "z", "a.png"),
        EditRequest("C?", "x", "b.png"),
        EditRequest("A?", "x", "d.png"),
        EditRequest("A?", "x"),
    ]
    found = leakage(train, held_out)
    assert found.images == ("path:a.png", "path:b.png")
    assert (found.edits, found.n_images, found.n_edits) == ((0, 1, 2), 3, 5)
    assert (found.questions, found.conflicts) == ((0, 1), (1,))


def test_the_benchmarks_own_oddities_are_seen(shared: Path) -> None:
    evaluation = read_edits(shared / "mmedit" / "vqa_eval.json")
    train = read_edits(shared / "mmedit" / "vqa_train.json")
    found = report(evaluation)
    assert (found.n_images, len(found.already_right), len(found.odd_rephrase)) == (1390, 4, 13)
    assert [duplicate.edits for duplicate in found.duplicates] == [(852, 853)]
    assert [conflict.edits for conflict in found.conflicts] == [(1662, 1667)]
    assert [duplicate.edits for duplicate in report(train).duplicates] == [(1605, 1606), (5693, 5694)]
    assert len(report(train).conflicts) == 6
    leaked = leakage(train, evaluation)
    assert (len(leaked.images), leaked.n_images) == (845, 1390)
