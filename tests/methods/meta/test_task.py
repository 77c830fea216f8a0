"""Meta-training: the loss is the edited model's, records take turns, a broken-off run ends with the same bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fastedit
from fastedit.backbone import EditableModel, weights_hash
from fastedit.methods.mend import MEND, MENDConfig
from fastedit.methods.meta.task import MetaObjective, MetaTask, MetaWeights
from fastedit.objectives import InvariantConfig, InvariantObjective, NLLObjective, Objective, Role, TokenBatch
from fastedit.training import TrainerConfig, train_task
from tests.engine.conftest import make_edits

CONFIG = MENDConfig(layers=1, rank=4, valid_records=2, edit_lr=0.3)
TRAINER = TrainerConfig(steps=8, batch_size=2, lr=1e-2, warmup=0, valid_every=4, checkpoint_every=2, patience=None)


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return fastedit.load("random:llava-tiny", dtype="float32")


def task_of(
    model: EditableModel, objective: Objective | None = None, trainer: TrainerConfig = TRAINER, **changes: Any
) -> MetaTask:
    return MEND.task(model, replace(CONFIG, **changes), objective, make_edits(7), trainer)


def test_training_lowers_the_loss_and_writes_no_weight(model: EditableModel) -> None:
    before = weights_hash(model.hf)
    task = task_of(model, trainer=replace(TRAINER, steps=40, valid_every=None))
    first = sum(float(task.loss(step)[0].detach()) for step in range(4))
    train_task(task, task.trainer)
    last = sum(float(task.loss(step)[0].detach()) for step in range(4))
    assert last < 0.95 * first
    assert weights_hash(model.hf) == before


def test_every_record_has_its_turn_in_every_epoch(model: EditableModel) -> None:
    task = task_of(model)
    # Five records, two a step: five steps are two epochs
    seen = [entry for step in range(5) for entry in task._records(step)]
    assert sorted(seen) == sorted((record, epoch) for record in range(5) for epoch in range(2))
    assert seen == [entry for step in range(5) for entry in task_of(model)._records(step)]
    orders = {tuple(record for record, epoch in seen if epoch == e) for e in range(2)}
    other = task_of(model, trainer=replace(TRAINER, seed=1))
    assert len(orders) == 2 or [e for step in range(5) for e in other._records(step)] != seen


def test_the_loss_is_that_of_the_edited_model(model: EditableModel) -> None:
    """By hand: the deltas that ``edit`` makes of the same network, and the model's answers with them installed."""
    from fastedit.backbone.packed_forward import packed_start, packed_tail
    from fastedit.deltas import Rows, installed, stack

    weights = MetaWeights(0.5, 0.25, 0.125, 2.0)
    task = task_of(model, MetaObjective(weights), locality_views=0)
    artifact = task.result()
    chosen = task._records(0)
    loss, told = task.loss(0)
    total = 0.0
    for index, _ in chosen:
        request = task.records[index]
        run = fastedit.edit(
            model, [request], "mend", artifact=replace(artifact, kind="mend"), evaluate=False,
            layers=1, rank=4, edit_lr=0.3,
        )  # fmt: skip
        for each, weight in zip(task.views.of(index)[:4], (0.5, 0.25, 0.125, 2.0), strict=True):
            encoded = model.encode([each.view.query], answers=True)
            labels = encoded.labels[encoded.label_mask]
            with torch.no_grad():
                plain = model.head(packed_tail(model, packed_start(model, encoded)))
                with installed(model, stack(list(run.deltas)), Rows((1,))):
                    edited = model.head(packed_tail(model, packed_start(model, encoded)))
            if each.view.role < Role.TEXT_LOCALITY:
                total += weight * float(torch.nn.functional.cross_entropy(edited, labels))
            else:
                kl = torch.nn.functional.kl_div(edited.log_softmax(-1), plain.softmax(-1), reduction="none").sum(-1)
                total += weight * float(kl.mean())
    assert float(loss.detach()) == pytest.approx(total / len(chosen), rel=1e-3)
    assert 0 <= told["correct"] <= 1


def test_a_broken_off_training_ends_with_the_same_bits(model: EditableModel, tmp_path: Path) -> None:
    class Broken(MetaTask):
        def loss(self, step: int) -> Any:
            if step == 5:
                raise KeyboardInterrupt
            return super().loss(step)

    for objective in (None, InvariantObjective(InvariantConfig(), TRAINER.steps)):
        path = tmp_path / f"{type(objective).__name__}"
        whole = train_task(task_of(model, objective), TRAINER)
        broken = task_of(model, objective)
        broken.__class__ = Broken
        with pytest.raises(KeyboardInterrupt):
            train_task(broken, TRAINER, checkpoint=path)
        again = InvariantObjective(InvariantConfig(), TRAINER.steps) if objective is not None else None
        assert train_task(task_of(model, again), TRAINER, checkpoint=path).id == whole.id


def test_another_objective_trains_another_network(model: EditableModel) -> None:
    objective = InvariantObjective(InvariantConfig(warmup=0.5), TRAINER.steps)
    seen: list[Any] = []

    class Watched:
        roles, start = objective.roles, objective.start

        def __call__(self, tokens: TokenBatch, steps: Any) -> Any:
            assert tokens.flat is not None
            assert tokens.flat.requires_grad
            losses = objective(tokens, steps)
            seen.append((steps, "tv" in losses.parts))
            return losses

    made = train_task(task_of(model, Watched()), replace(TRAINER, valid_every=None))
    # On from half of the steps; there every edit is taken as one that has just got there
    assert seen == [(0, False), (1, False), (2, False), (3, False), *[(4, True)] * 4]
    plain = train_task(task_of(model), replace(TRAINER, valid_every=None))
    assert made.id != plain.id


def test_objectives_that_know_no_start_are_told_the_step(model: EditableModel) -> None:
    task = task_of(model, NLLObjective())
    loss, _ = task.loss(3)
    assert bool(loss.isfinite())


def test_validation_counts_views_that_are_as_they_should_be(model: EditableModel) -> None:
    task = task_of(model)
    with torch.no_grad():
        task.network.log_lr.fill_(-60.0)  # type: ignore[union-attr, operator]
    found = task.validate()
    # A change of nothing: nothing is learned and everything stays
    assert {
        name: found[name] for name in ("text_locality", "image_locality", "near", "same", "blind")
    } == dict.fromkeys(("text_locality", "image_locality", "near", "same", "blind"), 1.0)
    assert found["reliability"] == 0
    assert found["score"] == pytest.approx(4 / 7)


def test_the_fingerprint_is_of_model_records_and_settings(model: EditableModel) -> None:
    first = task_of(model).fingerprint
    assert task_of(model).fingerprint == first
    assert task_of(model, edit_lr=2e-2).fingerprint != first
    assert task_of(model, InvariantObjective(InvariantConfig(), 8)).fingerprint != first
    changed = InvariantObjective(InvariantConfig(scale=0.2), 8)
    assert task_of(model, changed).fingerprint != task_of(model, InvariantObjective(InvariantConfig(), 8)).fingerprint
    other = MEND.task(model, CONFIG, None, make_edits(6), TRAINER)
    assert other.fingerprint != first


def test_too_few_records_are_refused(model: EditableModel) -> None:
    with pytest.raises(ValueError, match=r"mend: training needs at least a batch.*records=3, valid_records=2"):
        MEND.task(model, CONFIG, None, make_edits(3), TRAINER)


def test_the_outer_loss_weighs_roles() -> None:
    logits = torch.tensor([[2.0, 0, 0], [0, 1, 0], [0, 0, 3], [1, 1, 0]], requires_grad=True)
    reference = torch.tensor([[0.0, 2, 0]])
    tokens = TokenBatch(
        hidden=torch.zeros(4, 2), logits=logits, labels=torch.tensor([0, 0, 2, 1]), edit=torch.tensor([0, 0, 1, 1]),
        role=torch.tensor([0, 1, 2, 4]), n_edits=2, reference=reference,
    )  # fmt: skip
    losses = MetaObjective(MetaWeights(1.0, 10.0, 100.0, 1000.0))(tokens, 0)
    nll = torch.nn.functional.cross_entropy(logits, tokens.labels, reduction="none")
    kl = torch.nn.functional.kl_div(logits[3].log_softmax(-1), reference[0].softmax(-1), reduction="sum")
    expected = torch.stack([nll[0] + 10 * nll[1], 100 * nll[2] + 1000 * kl])
    torch.testing.assert_close(losses.total, expected)
    assert losses.correct.tolist() == [True, True]
    without = MetaObjective(MetaWeights())(replace(tokens, reference=None, role=torch.tensor([0, 1, 2, 2])), 0)
    assert bool(without.total.isfinite().all())
