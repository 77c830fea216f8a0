"""UniKE's trained part: triplets, states, the two losses, and what comes of training."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch.nn import functional

import fastedit
from fastedit import EditRequest, Query
from fastedit.backbone import EditableModel
from fastedit.deltas.attention_memory import encode
from fastedit.methods.unike.memory import (
    KnowledgeTask,
    Triplet,
    same_loss,
    semantic_loss,
    states_of,
    triplets,
    truthful_loss,
    unit_rms,
)
from fastedit.training import Artifact, TrainerConfig
from tests.backbone.padded import prefix
from tests.engine.conftest import make_edits, picture


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return fastedit.load("random:llava-tiny", dtype="float64")


def some(count: int = 3) -> list[Triplet]:
    return [
        Triplet(Query(f"What is {n}?", picture(n)), Query(f"And {n}?", picture(n)), f"right {n}", "a wrong one")
        for n in range(count)
    ]


def test_a_records_questions_become_triplets() -> None:
    records = make_edits(2)
    other = dataclasses.replace(records[1], image_locality_answer="blue", prediction=None)
    found = triplets([records[0], other], "prediction", 10, 0)
    own = next(t for t in found if t.question.prompt == records[0].prompt)
    assert (own.right, own.wrong) == ("nothing", "blue")
    assert own.again == Query("Number 0 is what?", records[0].image_rephrase)
    assert {(t.right, t.wrong) for t in found if t is not own} == {("red and green", "blue"), ("blue", "red and green")}
    corrected = triplets(records[:1], "target", 10, 0)
    assert [(t.right, t.wrong) for t in corrected] == [("blue", "nothing")]


def test_records_that_tell_no_wrong_answer_are_left_out() -> None:
    text = EditRequest(prompt="The capital?", target="Rome", prediction="Paris")
    same = dataclasses.replace(make_edits(1)[0], prediction="blue", image_locality_answer=None)
    assert triplets([text, same], "prediction", 10, 0) == []
    many = triplets(make_edits(6), "prediction", 4, 0)
    assert len(many) == 4
    assert many == triplets(make_edits(6), "prediction", 4, 0)[:4]


def test_states_are_those_of_the_last_tokens(model: EditableModel) -> None:
    sites = model.sites([1, 2], ["q"])
    found = states_of(model, some(), sites)
    assert set(found) == {f"{n}:{k}" for n in (1, 2) for k in ("semantic", "positive", "negative", "reworded")}
    for number, each in enumerate(some()):
        for name, query, at in (
            ("semantic", dataclasses.replace(each.question, answer=each.right), 0),
            ("positive", dataclasses.replace(each.question, answer=each.right), -1),
            ("negative", dataclasses.replace(each.question, answer=each.wrong), -1),
            ("reworded", dataclasses.replace(each.again, answer=each.right), 0),
        ):
            encoded = model.encode([query], answers=True)
            state = prefix(model, encoded, 2)
            normed = model.adapter.text.layers[2].input_layernorm(state.hidden)[encoded.label_mask]  # type: ignore[operator]
            torch.testing.assert_close(found[f"2:{name}"][number].double(), normed[at], rtol=1e-5, atol=1e-6)


def test_truthful_loss_is_the_papers() -> None:
    right, wrong = functional.normalize(torch.randn(3, 5, dtype=torch.float64), dim=1), torch.eye(5).double()[:2]
    both = [(v, True) for v in right] + [(v, False) for v in wrong]
    terms = []
    for i, (u, label) in enumerate(both):
        scores = [(math.exp(float(u @ v) / 0.3), other) for j, (v, other) in enumerate(both) if j != i]
        terms.append(-math.log(sum(s for s, other in scores if other == label) / sum(s for s, _ in scores)))
    assert float(truthful_loss(right, wrong, 0.3)) == pytest.approx(sum(terms) / 5)


def test_semantic_loss_is_the_papers() -> None:
    asked, right, wrong = (functional.normalize(torch.randn(3, 4, dtype=torch.float64), dim=1) for _ in range(3))
    terms = []
    for i in range(3):
        own = [math.exp(float(asked[i] @ each[i]) / 0.2) for each in (right, wrong)]
        every = [math.exp(float(asked[i] @ each[j]) / 0.2) for each in (right, wrong) for j in range(3)]
        terms.append(-math.log(sum(own) / sum(every)))
    assert float(semantic_loss(asked, right, wrong, 0.2)) == pytest.approx(sum(terms) / 3)


def test_a_question_finds_itself_asked_otherwise() -> None:
    asked = torch.eye(3).double()
    assert float(same_loss(asked, asked, 0.05)) < 1e-6
    assert float(same_loss(asked, asked.roll(1, 0), 0.05)) > 10
    one, other = functional.normalize(torch.randn(2, 4, 5, dtype=torch.float64), dim=2)
    assert float(same_loss(one, other, 0.1)) == pytest.approx(float(same_loss(other, one, 0.1)))


def task(model: EditableModel, **settings: Any) -> KnowledgeTask:
    given = {"held": 1, "width": 6, "temperature": 0.1, **settings}
    trainer = TrainerConfig(steps=3, batch_size=4, seed=1)
    return KnowledgeTask(model, model.sites([1, 2], ["q"]), some(6), trainer, **given)


def test_its_artifact_has_memory_encoders_and_directions(model: EditableModel) -> None:
    made: Artifact = task(model).result()
    d = model.hidden_size
    assert made.config["layers"] == [1, 2]
    assert {name.split(":")[1] for name in made.tensors} == {
        "semantic", "positive", "negative", "direction.truthfulness", "direction.semantic",
        *(f"enc_{kind}.{n}" for kind in ("sem", "tru") for n in range(4)),
    }  # fmt: skip
    assert made.tensors["1:positive"].shape == (6, d)
    assert made.tensors["2:enc_sem.2"].shape == (d, 6)
    for name in ("truthfulness", "semantic"):
        assert float(made.tensors[f"1:direction.{name}"].square().mean()) == pytest.approx(1.0, rel=1e-4)


def test_the_direction_leads_from_wrong_to_right(model: EditableModel) -> None:
    """States that differ by one vector, and encoders that keep it: the map back finds the vector."""
    made = task(model, width=24)
    d = model.hidden_size
    base, shift = torch.randn(40, d), unit_rms(torch.randn(d))
    made.states |= {"1:positive": base + shift, "1:negative": base - shift}
    with torch.no_grad():
        for number, value in enumerate((torch.eye(d), torch.full((d,), 30.0), torch.eye(d)[:, :24], torch.zeros(24))):
            made._weights[f"1:enc_tru.{number}"].set_(value)
    found = made._direction(1, "enc_tru")
    kept = torch.nn.functional.cosine_similarity(found[:24], shift[:24], dim=0)
    assert float(kept.detach()) > 0.9


def test_training_tells_truth_and_finds_answers() -> None:
    model = fastedit.load("pocket-llava")
    records = fastedit.read_edits("pocket-vqa", split="train")[:120]
    settings = {"steps": 40, "batch_size": 64, "valid_every": 20, "lr": 2e-3, "schedule": "constant"}
    made = fastedit.train(model, "unike", records, trainer=settings, valid_records=40, show_progress=False)
    scores = made.metrics["validation"][-1]
    assert scores["semantic"] > 0.3, "one in forty by chance"
    assert scores["truthful"] > 0.6, "one in two by chance"
    # Right answers lie apart from wrong ones along their mean difference more than in the states themselves
    weights = [made.tensors[f"3:enc_tru.{n}"] for n in range(4)]

    def apart(right: torch.Tensor, wrong: torch.Tensor) -> float:
        spread = torch.cat([right - right.mean(0), wrong - wrong.mean(0)]).square().sum(1).mean()
        return float((right.mean(0) - wrong.mean(0)).square().sum() / spread)

    states = [made.tensors[f"3:{name}"] for name in ("positive", "negative")]
    codes = [functional.normalize(encode(each, weights), dim=1) for each in states]
    assert apart(*codes) > 2 * apart(*states)


def test_a_step_draws_the_same_again_and_the_fingerprint_is_of_the_data(model: EditableModel) -> None:
    made = task(model)
    losses = []
    for _ in range(2):
        torch.manual_seed(5)
        losses.append(float(made.loss(0)[0].detach()))
    assert losses[0] == losses[1]
    other = KnowledgeTask(model, model.sites([1, 2], ["q"]), some(5), TrainerConfig(), held=1, width=6, temperature=0.1)
    assert made.fingerprint != other.fingerprint
    assert made.fingerprint == task(model).fingerprint


def test_too_few_records_are_named(model: EditableModel) -> None:
    with pytest.raises(ValueError, match=r"unike: records have questions about images .* \(got 1 triplets, held=0\)"):
        KnowledgeTask(model, model.sites([1], ["q"]), some(1), TrainerConfig(), held=9, width=6, temperature=0.1)
