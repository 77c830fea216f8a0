from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fastedit import pocket
from fastedit.evaluation import UNSEEN
from fastedit.pocket.edits import FURTHER, SIZE
from fastedit.pocket.factory.release import load
from fastedit.pocket.requests import SKIPPED, records, requests
from fastedit.requests import EditRequest


@pytest.fixture(scope="module", params=pocket.SETS)
def evaluation(request: pytest.FixtureRequest) -> list[EditRequest]:
    return pocket.edit_set(request.param)


def test_an_eval_set_is_whole(evaluation: list[EditRequest]) -> None:
    assert len(evaluation) == SIZE["eval"] == 1000
    assert sum("hard" in edit.tags for edit in evaluation) == 200
    assert len({edit.id for edit in evaluation}) == 1000
    for edit in evaluation:
        assert edit.image is not None
        assert edit.image_rephrase is not None
        assert edit.portability
        assert {probe.kind for probe in edit.probes} >= {"near", "blind", "same"}
        assert len(edit.probes) + len(edit.paraphrases) <= 2 + 1 + 2 + FURTHER
        assert edit.prediction not in (None, edit.target)
        assert edit.locality_answer
        assert edit.image_locality_answer


def test_unseen_wordings_and_probes_are_asked_of_most_records(evaluation: list[EditRequest]) -> None:
    asked = Counter(probe.score for edit in evaluation for probe in edit.probes)
    asked.update(one.kind for edit in evaluation for one in edit.paraphrases)
    for score in (*UNSEEN.values(), "polite"):
        assert asked[score] > 800, (score, asked[score])
    for score in ("negated", "contrary"):
        assert asked[score] > 600, (score, asked[score])
    assert (asked["sibling"] > 200) == (evaluation[0].id or "").startswith("pocket-vqa")


def test_further_questions_are_asked_only_of_a_model_that_was_checked_on_them(tmp_path: Path) -> None:
    left_out = {"skipped": [0], "unasked": None}
    for unasked, expected in ((None, 0), ({}, 9), ({"1": [0, 1]}, 7)):
        (tmp_path / SKIPPED).write_text(json.dumps({"pocket-caption": {"eval": left_out | {"unasked": unasked}}}))
        (edit,) = requests("pocket-caption", "eval", 1, tmp_path)
        assert edit.id == "pocket-caption/eval#0"
        further = len(edit.paraphrases) + sum(probe.score not in ("near", "blind", "same") for probe in edit.probes)
        assert further == expected


def test_a_limit_gives_the_beginning_of_the_set() -> None:
    few, more = pocket.edit_set("pocket-vqa", limit=3), pocket.edit_set("pocket-vqa", limit=6)
    for a, b in zip(few, more, strict=False):
        assert (a.id, a.prompt, a.target, a.portability[0].answer) == (
            b.id,
            b.prompt,
            b.target,
            b.portability[0].answer,
        )
        assert (np.asarray(a.image) == np.asarray(b.image)).all()
    assert pocket.edit_set("pocket-vqa", limit=0) == []


def test_train_sets_have_their_size() -> None:
    for name in pocket.SETS:
        assert sum(1 for _ in records(name, "train")) == SIZE["train"] == 2000


def test_the_model_answers_everything_rightly_before_the_edit(evaluation: list[EditRequest]) -> None:
    from fastedit.pocket.factory.release import generate

    model, processor = load(pocket.model_path("pocket-llava"))
    some = evaluation[::50]
    asked = [(edit.prompt, edit.image, edit.prediction) for edit in some]
    asked += [(edit.rephrase, edit.image, edit.prediction) for edit in some]
    asked += [(edit.prompt, edit.image_rephrase, edit.prediction) for edit in some]
    asked += [(e.image_locality_prompt, e.image_locality_image, e.image_locality_answer) for e in some]
    probes = [(p.prompt, p.image, p.answer) for e in some for p in e.probes if p.answer is not None]
    asked += [one for one in probes if one[1] is not None]
    asked += [(q.prompt, q.image, e.prediction) for e in some for q in e.paraphrases]
    answers = generate(model, processor, [(prompt, image) for prompt, image, _ in asked])  # type: ignore[misc]
    assert answers == [answer for _, _, answer in asked]
    facts = [(edit.locality_prompt, None, edit.locality_answer) for edit in some]
    facts += [one for one in probes if one[1] is None]
    answers = generate(model, processor, [(prompt, None) for prompt, _, _ in facts])  # type: ignore[misc]
    assert answers == [answer for _, _, answer in facts]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "pocket-vq"}, "name must be one of pocket-vqa, pocket-caption"),
        ({"name": "pocket-vqa", "split": "test"}, "split must be one of train, eval"),
        ({"name": "pocket-vqa", "limit": -1}, "limit must not be negative"),
        ({"name": "pocket-vqa", "model": "x"}, "model must be one of"),
    ],
)
def test_wrong_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pocket.edit_set(**arguments)  # type: ignore[arg-type]


def test_an_exported_set_is_read_back(tmp_path: Path) -> None:
    from fastedit.data import read_edits

    path = pocket.export("pocket-vqa", "eval", tmp_path, limit=5)
    back = read_edits(path, format="mmedit", images=tmp_path / "images")
    for edit, read in zip(pocket.edit_set("pocket-vqa", limit=5), back, strict=True):
        for name in ("prompt", "target", "rephrase", "prediction", "locality_prompt", "locality_answer", "tags"):
            assert getattr(edit, name) == getattr(read, name), name
        assert [(p.kind, p.prompt, p.answer) for p in edit.probes] == [
            (p.kind, p.prompt, p.answer) for p in read.probes
        ]
        assert [(q.prompt, q.answer, q.kind) for q in edit.portability] == [
            (q.prompt, q.answer, q.kind) for q in read.portability
        ]
        from PIL import Image

        assert (np.asarray(Image.open(str(read.image))) == np.asarray(edit.image)).all()
