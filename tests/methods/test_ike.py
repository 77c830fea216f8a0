"""In-context editing: what stands before a question, and how much of it there is room for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import fastedit
from fastedit import EditRequest, Query
from fastedit.backbone import EditableModel
from fastedit.backbone.encoding import row_size
from fastedit.evaluation import evaluation_views
from fastedit.methods import ike
from fastedit.methods.base import Resources
from fastedit.methods.ike import IKE, IKEConfig, demonstrations
from tests.engine.conftest import make_edits

SHORT = {"demonstration": "{question} {answer} : {asked} {told} ;", "fact": "{question} {answer} : "}


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return fastedit.load("random:llava-tiny", dtype="float32")


@pytest.fixture(autouse=True)
def _room(model: EditableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions enough for what is not about positions."""
    monkeypatch.setattr(model.adapter.text.config, "max_position_embeddings", 4096)


@pytest.fixture(scope="module")
def edits() -> list[EditRequest]:
    return make_edits(5)


def template(model: EditableModel, config: IKEConfig, edit: EditRequest, pool: list[EditRequest]) -> str:
    shared = IKE.setup(model, config, Resources(pool))
    (made,) = IKE.compute(model, config, shared, [edit], [])
    assert set(made.texts) == {"template"}
    assert not made.tensors
    return made.texts["template"]


def test_demonstrations_copy_update_and_retain(edits: list[EditRequest]) -> None:
    config = IKEConfig()
    fact = "New Fact: What is number 0 here? blue\nPrompt: "
    assert demonstrations(edits[0], config) == [
        fact + "What is number 0 here? blue\n\n",
        fact + "Number 0 is what? blue\n\n",
        fact + "What is the capital of country 0? Paris\n\n",
    ]
    bare = replace(edits[0], rephrase=None, locality_prompt=None, locality_answer=None)
    assert len(demonstrations(bare, config)) == 1


def test_the_edit_comes_last_behind_its_nearest(model: EditableModel, edits: list[EditRequest]) -> None:
    found = template(model, IKEConfig(k=2), edits[0], edits[1:])
    parts = found.split("\n\n")
    assert len(parts) == 4
    known = [text for edit in edits[1:] for text in demonstrations(edit, IKEConfig())]
    assert all(f"{part}\n\n" in known for part in parts[:2])
    assert f"{parts[2]}\n\n" == demonstrations(edits[0], IKEConfig())[0]
    assert parts[3] == "New Fact: What is number 0 here? blue\nPrompt: {prompt}"


def test_an_edit_is_no_demonstration_of_itself(model: EditableModel, edits: list[EditRequest]) -> None:
    found = template(model, IKEConfig(k=64, own=False, **SHORT), edits[0], edits[:2])
    assert "Number 0 is what?" not in found
    assert "Number 1 is what?" in found


def test_without_demonstrations_no_pool_is_needed(model: EditableModel, edits: list[EditRequest]) -> None:
    config = IKEConfig(k=0, own=False)
    assert template(model, config, edits[1], []) == "New Fact: What is number 1 here? seven red\nPrompt: {prompt}"
    with pytest.raises(ValueError, match=r"ike: .*give pool=.*got k=32, pool of 0 records"):
        IKE.setup(model, IKEConfig(), Resources([]))


def test_demonstrations_are_dropped_until_the_longest_question_fits(
    model: EditableModel, edits: list[EditRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    edit = replace(edits[0], portability=(Query("why " * 20, edits[0].image, "so"),))
    config = IKEConfig(answer_room=7, **SHORT)
    most = template(model, config, edit, edits[1:])
    text = model.adapter.text.config

    def size(found: str) -> int:
        queries = [view.query for view in evaluation_views(edit)]
        return max(row_size(model, Query(found.replace("{prompt}", q.prompt), q.image))[0] for q in queries)

    whole, whole_question = size(most), size("{prompt}")
    counts = []
    for less in (0, 1, 40, 120):
        with monkeypatch.context() as patch:
            patch.setattr(text, "max_position_embeddings", whole + 7 - less)
            found = template(model, config, edit, edits[1:])
        assert size(found) + 7 <= whole + 7 - less
        # No room is wasted: one more would be too much
        assert size(found) + 7 > whole + 7 - less - 50
        assert most.startswith(found.split(demonstrations(edit, config)[0])[0])
        counts.append(found.count(";"))
    assert counts[0] > counts[1] > counts[2] > counts[3] >= 1
    monkeypatch.setattr(text, "max_position_embeddings", whole_question + 20)
    with pytest.raises(ValueError, match=r"ike: the edit, a question and 7 tokens of an answer fit"):
        template(model, replace(config, k=0), edit, [])


def test_there_is_room_for_answers_longer_than_is_asked_for(
    model: EditableModel, edits: list[EditRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    edit = replace(edits[0], locality_answer="so " * 40)
    monkeypatch.setattr(model.adapter.text.config, "max_position_embeddings", 300)
    found = template(model, IKEConfig(answer_room=7, **SHORT), edit, edits[1:])
    sizes = []
    for view in evaluation_views(edit):
        query = view.query
        tokens, labels = row_size(model, Query(found.replace("{prompt}", query.prompt), query.image, query.answer))
        sizes.append(tokens + 1 if labels else tokens + 7)
    assert 240 < max(sizes) <= 300


def test_texts_that_grow_where_they_are_joined_still_fit(
    model: EditableModel, edits: list[EditRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = IKEConfig(**SHORT)
    length = ike._length
    # As if demonstrations had no tokens when they stand alone
    monkeypatch.setattr(ike, "_length", lambda m, prompt, seen: length(m, prompt, seen) if seen else 1)
    monkeypatch.setattr(model.adapter.text.config, "max_position_embeddings", 300)
    found = template(model, config, edits[0], edits[1:])
    asked = Query(found.replace("{prompt}", edits[0].prompt), edits[0].image)
    assert 200 < row_size(model, asked)[0] <= 300 - config.answer_room


def test_fields_are_filled_once(model: EditableModel, edits: list[EditRequest]) -> None:
    config = IKEConfig(k=0, own=False)
    assert config.stated("{answer}?", " {question} ") == "New Fact: {answer}? {question}\nPrompt: "
    with pytest.raises(ValueError, match=r"does not hold '\{prompt\}'"):
        template(model, config, replace(edits[0], target="{prompt}"), [])


def test_every_question_is_asked_behind_the_edit(
    model: EditableModel, edits: list[EditRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fastedit.edit(model, edits[:2], "ike", pool=edits[2:], k=1, **SHORT)
    assert {outcome.status for outcome in run.outcomes} == {"computed"}
    assert set(run.scores["strict"]) >= {"reliability", "text_locality", "near"}
    before = run.deltas[1].texts["template"]
    plain = model.generate([Query(before.replace("{prompt}", "Is it red?"), edits[0].image)], max_new_tokens=4)
    with fastedit.applied(model, run.deltas[1]):
        assert model.generate([Query("Is it red?", edits[0].image)], max_new_tokens=4) == plain


@pytest.mark.parametrize("name", ["odedit+ike", "kl+ike"])
def test_there_is_nothing_for_another_objective(model: EditableModel, edits: list[EditRequest], name: str) -> None:
    with pytest.raises(ValueError, match="'ike' is spelled ike"):
        fastedit.edit(model, edits, name, pool=edits)


def test_it_keeps_no_sequence(model: EditableModel, edits: list[EditRequest]) -> None:
    with pytest.raises(ValueError, match=r"ike .*mode='sequential'"):
        fastedit.edit(model, edits, "ike", pool=edits, mode="sequential")


@pytest.mark.parametrize(
    "wrong",
    [
        {"k": -1},
        {"k": 65},
        {"encoder": "bert"},
        {"answer_room": 0},
        {"fact": "{question}"},
        {"demonstration": "{asked}"},
    ],
)
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"ike: {next(iter(wrong))}"):
        IKEConfig(**wrong)
