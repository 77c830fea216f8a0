"""Training of the classifier: the loss is what it says, it learns, the threshold is the best one, runs repeat."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastedit
from fastedit.backbone import EditableModel
from fastedit.methods.ldke import task as ldke_task
from fastedit.methods.ldke.task import ClassifierTask
from fastedit.methods.ldke.views import Pairs, Questions
from fastedit.methods.meta.siblings import siblings_of
from fastedit.routers.classifier import ClassifierShape, Disentangler
from fastedit.training import TrainerConfig, train_task
from tests.engine.conftest import make_edits

POINT = (1, "attention")


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return fastedit.load("random:llava-tiny")


def made(model: EditableModel, count: int = 8, **given: Any) -> ClassifierTask:
    trainer = TrainerConfig(steps=30, batch_size=4, lr=5e-3, warmup=2, valid_every=10)
    settings: dict[str, Any] = {
        "held": 2, "stored": 5, "false_rate": None, "contrast": 0.1, "decorrelation": 0.01, "wordings": 0,
        "room": 1 << 26, "config": {"a": 1}, "finish": lambda: {"b": 2}, **given,
    }  # fmt: skip
    classifier = Disentangler(ClassifierShape(model.hidden_size, size=16, queries=2, key=8))
    return ClassifierTask(model, POINT, classifier, make_edits(count), trainer, **settings)


def test_the_loss_is_the_cross_entropy_of_pairs(model: EditableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ldke_task, "HARDEST", 3)
    task = made(model, contrast=0.0, decorrelation=0.0)
    found, told = task.loss(5)
    records = task._records(5)
    keys = [(record, number) for record in records for number in range(len(task.questions.of[record]))]
    kinds = [task.questions.of[record][number].kind for record, number in keys]
    anchors = task._anchors(keys, kinds, 5)
    assert len(anchors) == 3 * len(records)
    entity, relation = task.classifier(task.store.get(keys))
    pairs = Pairs.of(task.questions, keys, anchors)
    positive: list[Tensor] = []
    negative: list[Tensor] = []
    worst: list[Tensor] = []
    for number, anchor in enumerate(anchors):
        others: list[Tensor] = []
        for row in range(len(keys)):
            cosines = entity[anchor] @ entity[row], relation[anchor] @ relation[row]
            both = (torch.sigmoid(10 * cosines[0] - 5) * torch.sigmoid(10 * cosines[1] - 5)).double()
            if not pairs.counts[number, row]:
                others.append(torch.zeros((), dtype=torch.float64))
            elif pairs.related[number, row]:
                positive.append(-both.log())
            elif keys[row][0] == keys[anchor][0]:
                negative.append(-(1 - both).log())
            else:
                others.append(-(1 - both).log())
        worst += sorted(others, key=lambda loss: loss.item())[-3:]
    parts = [torch.stack(part).mean() for part in (positive, negative, worst)]
    torch.testing.assert_close(found.double(), sum(parts), rtol=1e-4, atol=1e-5)
    assert told["same"] == pytest.approx(parts[1].item(), rel=1e-3)


def test_the_other_terms_are_added(model: EditableModel) -> None:
    plain = float(made(model, contrast=0.0, decorrelation=0.0).loss(0)[0].detach())
    for name in ("contrast", "decorrelation"):
        given = {"contrast": 0.0, "decorrelation": 0.0, name: 1.0}
        more = float(made(model, **given).loss(0)[0].detach()) - plain
        assert more > 1e-3
        assert float(made(model, **{**given, name: 2.0}).loss(0)[0].detach()) - plain == pytest.approx(
            2 * more, rel=1e-3
        )


def test_other_records_with_the_same_question_are_no_counterexamples(model: EditableModel) -> None:
    task = made(model)
    edits = make_edits(4)
    edits[1] = replace(edits[1], prompt=edits[0].prompt)
    task.questions = Questions(edits)
    keys = [(record, number) for record in range(4) for number in range(len(task.questions.of[record]))]
    kinds = [task.questions.of[record][number].kind for record, number in keys]
    make = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(len(keys), 6, generator=make), dim=1)
    found = task._contrast(vectors, keys, kinds, "text_generality", task.questions.relation)
    edit = [row for row, kind in enumerate(kinds) if kind == "reliability"]
    text = [row for row, kind in enumerate(kinds) if kind == "text_generality"]
    expected = []
    for record in range(4):
        others = [n for n in range(4) if n == record or {n, record} != {0, 1}]
        scores = torch.stack([vectors[edit[record]] @ vectors[text[n]] for n in others]) / 0.07
        expected.append(torch.logsumexp(scores, 0) - scores[others.index(record)])
    torch.testing.assert_close(found, torch.stack(expected).mean())
    assert float(task._contrast(vectors, keys[:5], kinds[:5], "text_generality", task.questions.relation)) == 0


def test_an_edit_is_right_where_it_is_its_own_that_acts(model: EditableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    task = made(model)
    # Whatever is asked, the first of the stored edits acts, which is of none of the held-out records
    first = torch.tensor([0.0, -9.0, -9.0, -9.0, -9.0])
    monkeypatch.setattr(ldke_task, "settled", lambda scores, *_: first.expand(len(scores), -1))
    rates = task.validate()
    assert rates["reliability@5"] == 0
    assert rates["near@5"] == 1


def test_heads_are_decorrelated_by_their_squared_correlation() -> None:
    make = torch.Generator().manual_seed(0)
    a = torch.randn(4000, 3, generator=make)
    assert float(ldke_task._correlation(a, torch.randn(4000, 3, generator=make))) < 0.01
    assert float(ldke_task._correlation(a, 2 * a + 1)) == pytest.approx(1, abs=0.02)


def test_it_learns_what_belongs_together_and_comes_back_the_same(
    model: EditableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ldke_task, "THRESHOLDS", (0.3,))
    task = made(model)
    before = float(task.loss(0)[0].detach())
    artifact = train_task(task, task.trainer)
    assert float(task.loss(0)[0].detach()) < 0.5 * before
    assert artifact.kind == "ldke"
    assert artifact.config["a"] == 1
    assert artifact.config["b"] == 2
    other = train_task(made(model), task.trainer)
    assert other.id == artifact.id
    loaded = Disentangler.of(artifact, model.device)
    assert float(loaded.threshold.exp()) == pytest.approx(artifact.metrics["threshold"])
    assert artifact.metrics["threshold"] == 0.3


def test_rates_are_of_single_edits_and_of_a_sequence(model: EditableModel) -> None:
    task = made(model, stored=5)
    rates = task.validate()
    alone = {name for name in rates if "@" not in name and name != "score"}
    # Three records before the held-out ones are stored besides these
    assert {name for name in rates if "@" in name} == {f"{name}@5" for name in alone}
    assert "portability" in alone
    assert all(0 <= value <= 1 for value in rates.values())


def test_rates_by_hand() -> None:
    kinds = ["reliability", "reliability", "near", "same"]
    alone = torch.tensor([True, True, False, False])
    acts = torch.tensor([True, True, True, False])
    right = torch.tensor([True, False, False, False])
    found = ldke_task._rates(kinds, alone, acts, right, 7)
    assert found == {
        "reliability": 1.0, "near": 0.0, "same": 0.0, "reliability@7": 0.5, "near@7": 1.0, "same@7": 0.0,
        "score": pytest.approx((1 + 1 + 0.5 + 0.5) / 4),
    }  # fmt: skip


def test_the_threshold_has_most_room(model: EditableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    task = made(model)
    scores = iter([0.5, 0.9, 0.9, 0.9, 0.7])
    monkeypatch.setattr(ldke_task, "THRESHOLDS", (0.1, 0.2, 0.3, 0.4, 0.5))
    monkeypatch.setattr(ldke_task, "_rates", lambda *_: {"score": next(scores)})
    assert task.calibrated()[0] == 0.3


def test_too_few_records_are_refused(model: EditableModel) -> None:
    with pytest.raises(ValueError, match=r"ldke: training needs at least a batch .*records=5, valid_records=2"):
        made(model, count=5)


def test_the_fingerprint_is_of_what_is_learnt_and_from_what(model: EditableModel) -> None:
    own = made(model).fingerprint
    assert own == made(model).fingerprint
    assert own != made(model, contrast=0.2).fingerprint
    assert own != made(model, count=7).fingerprint
    assert own != made(model, wordings=2).fingerprint


def test_rewordings_and_siblings_are_learned_from_where_they_are_wanted(model: EditableModel) -> None:
    plain, task = made(model), made(model, wordings=2)
    siblings = siblings_of(model, make_edits(8), seed=0)
    assert any(siblings)
    for few, more, texts in zip(plain.questions.of, task.questions.of, siblings, strict=True):
        added = more[len(few) :]
        assert [one.prompt for one in added if not one.means] == texts
        assert sum(bool(one.means) for one in added) == 2 * 2
    assert float(task.loss(0)[0].detach()) != float(plain.loss(0)[0].detach())


def test_how_alike_images_must_be_is_measured_on_held_out_questions(model: EditableModel) -> None:
    task = made(model)
    # Every relation is right: all unrelated pairs ask the same
    with torch.no_grad():
        task.classifier.threshold.fill_(-100.0)
    found = task.agreement(0.02)
    assert found is not None
    held = [(r, n) for r in (6, 7) for n, one in enumerate(task.questions.of[r]) if one.kind == "reliability"]
    other = [(r, n) for r in (6, 7) for n, one in enumerate(task.questions.of[r]) if one.kind == "image_generality"]
    edits = [(record, task._edit(record)) for record in range(8)]
    with torch.no_grad():
        asked, stored = task._vectors([*held, *other]), task._vectors(edits)
    agreement = asked[0] @ stored[0].T - 0.5 * torch.cdist(asked[2], stored[2])
    own = torch.tensor([r for r, _ in [*held, *other]])[:, None] == torch.arange(8)
    assert found.rate <= 1
    assert float(agreement[~own].min()) <= found.level <= float(agreement[~own].max())
    assert found.most == pytest.approx(float(torch.quantile(agreement[len(held) :][own[len(held) :]], 0.05)), abs=1e-4)
    assert found.false_rate == 0.02
    assert made(model).result().config.keys() >= {"a", "b", "classifier"}
    assert "agreement" not in made(model).result().config
    assert made(model, false_rate=0.02).result().config["agreement"]["false_rate"] == 0.02
