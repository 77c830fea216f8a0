"""Training of SERAC: many records, the mixture of both models, the scope beside it, and a run that goes on."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fastedit
from fastedit.backbone import EditableModel, weights_hash
from fastedit.methods.serac.config import SERACConfig
from fastedit.methods.serac.editor import SERAC
from fastedit.methods.serac.task import SeracTask
from fastedit.objectives import InvariantConfig, InvariantObjective, Objective, Role
from fastedit.requests import Query
from fastedit.training import TrainerConfig, train_task
from tests.backbone.padded import prefix, tail
from tests.engine.conftest import make_edits

CONFIG = SERACConfig(layers=2, valid_records=2, scope_batch=4, scope_size=4, scope_hidden=16, scope_dropout=0.0)
TRAINER = TrainerConfig(steps=4, batch_size=4, lr=3e-3, warmup=0, valid_every=2, checkpoint_every=2, patience=None)


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return fastedit.load("random:llava-tiny", dtype="float32")


def task_of(
    model: EditableModel, objective: Objective | None = None, trainer: TrainerConfig = TRAINER, **changes: Any
) -> SeracTask:
    return SERAC.task(model, replace(CONFIG, **changes), objective, make_edits(8), trainer)


def test_training_learns_scope_and_copies_and_writes_no_weight(model: EditableModel) -> None:
    before = weights_hash(model.hf)
    task = task_of(model, trainer=replace(TRAINER, steps=60, valid_every=None), swap=0.0)
    first = [task.loss(step)[1]["scope"] for step in range(3)]
    nll = [float(task.loss(step)[0].detach()) - task.loss(step)[1]["scope"] for step in range(3)]
    train_task(task, task.trainer)
    assert sum(task.loss(step)[1]["scope"] for step in range(3)) < 0.3 * sum(first)
    last = [float(task.loss(step)[0].detach()) - task.loss(step)[1]["scope"] for step in range(3)]
    assert sum(last) < 0.7 * sum(nll)
    assert weights_hash(model.hf) == before


def test_a_new_change_changes_nothing(model: EditableModel) -> None:
    """By hand: with nothing trained, the counterfactual model is the frozen one, asked behind the cached edit."""
    task = task_of(model, swap=0.0)
    chosen = [0, 1]
    tokens = task._mixture(chosen, 0, random.Random(0))
    rng = random.Random(0)
    views, counts, contexts = task._asked(chosen, 0, rng)
    (changed,) = [n for n in range(counts[0]) if views[n].view.role < Role.TEXT_LOCALITY]
    query = views[changed].view.query
    asked = Query(contexts[changed] + query.prompt, query.image, query.answer)
    assert asked.prompt == f"What is number 0 here? blue\n{query.prompt}"
    encoded = model.encode([asked], answers=True)
    positions = encoded.label_mask[0].nonzero()[:, 0]
    expected = model.head(tail(model, prefix(model, encoded, 0))[0, positions])
    rows = (tokens.edit == 0) & (tokens.role == int(views[changed].view.role))
    torch.testing.assert_close(tokens.logits[rows], expected, rtol=1e-4, atol=1e-4)
    assert tokens.labels[rows].tolist() == encoded.labels[encoded.label_mask].tolist()


def test_kept_views_are_a_mixture_by_similarity(model: EditableModel) -> None:
    task = task_of(model, swap=0.0)
    task.heads.eval()
    seen: dict[float, torch.Tensor] = {}
    for share in (1e-6, 0.3, 1 - 1e-6):
        task._similarity = lambda *args, share=share: torch.where(args[-1], 1.0, share)  # type: ignore[method-assign]
        tokens = task._mixture([0, 1], 0, random.Random(0))
        kept = tokens.role >= int(Role.TEXT_LOCALITY)
        assert tokens.reference is not None
        seen[share] = tokens.logits[kept].log_softmax(-1).detach()
        if share == 1e-6:
            # Nobody asks the counterfactual model, so this is the frozen one to the bit
            assert torch.equal(tokens.logits[kept], tokens.reference)
    before, mixed, after = seen.values()
    expected = torch.logaddexp(before + torch.log(torch.tensor(0.7)), after + torch.log(torch.tensor(0.3)))
    torch.testing.assert_close(mixed, expected, rtol=1e-3, atol=1e-3)


def test_targets_are_swapped_for_the_view_and_its_context_alike(model: EditableModel) -> None:
    task = task_of(model, swap=1.0, invented=0.0)
    views, counts, contexts = task._asked([0, 1, 2, 3], 1, random.Random(3))
    targets = {record.target for record in task.records}
    changed = 0
    for each, context in zip(views, contexts, strict=True):
        if each.view.role < Role.TEXT_LOCALITY:
            assert context.endswith(f" {each.view.query.answer}\n")
            assert each.view.query.answer in targets
            changed += 1
        else:
            assert each.view.query.answer not in targets
    assert changed == 4
    # Of four records one has views that must stay
    assert sorted(counts) == [1, 1, 1, 3]


def test_an_objective_that_compares_views_gets_two_of_each_record(model: EditableModel) -> None:
    task = task_of(model, InvariantObjective(InvariantConfig(), 4))
    views, counts, _ = task._asked([0, 1], 0, random.Random(0))
    roles = [int(each.view.role) for each in views]
    start = 0
    for count in counts:
        own = roles[start : start + count]
        assert own[0] == int(Role.EDIT)
        assert sum(role < int(Role.TEXT_LOCALITY) for role in own) == 2
        assert len({each.view.query.answer for each in views[start : start + 2]}) == 1
        start += count
    loss, _ = task.loss(0)
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad for p in task.parameters().values() if p.grad is not None]
    assert any(bool(g.any()) for g in gradients)
    assert all(bool(torch.isfinite(g).all()) for g in gradients)


def test_published_loss_trains_the_scope_through_the_mixture(model: EditableModel) -> None:
    task = task_of(model, faithful=True)
    views, _, _ = task._asked([0, 1, 2, 3], 0, random.Random(0))
    assert all(each.view.role is not Role.IMAGE_LOCALITY for each in views)
    for step in range(4):
        loss, told = task.loss(step)
        assert "scope" not in told
        loss.backward()  # type: ignore[no-untyped-call]
    heads = [p.grad for name, p in task.parameters().items() if name.startswith("scope/")]
    assert any(g is not None and bool(g.any()) for g in heads)


def test_a_broken_off_run_ends_with_the_same_bits(model: EditableModel, tmp_path: Path) -> None:
    whole = train_task(task_of(model, scope_dropout=0.2), TRAINER)
    path = tmp_path / "half.training"
    task = task_of(model, scope_dropout=0.2)
    broken = task.loss

    def loss(step: int) -> Any:
        if step == 3:
            raise KeyboardInterrupt
        return broken(step)

    task.loss = loss  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        train_task(task, TRAINER, checkpoint=path)
    assert train_task(task_of(model, scope_dropout=0.2), TRAINER, checkpoint=path).id == whole.id


def test_the_scope_learns_from_rewordings_of_what_must_change_and_of_what_must_stay(model: EditableModel) -> None:
    task = task_of(model, scope_wordings=3)
    asked = task.features.questions(0)
    plain = [(each.kind, each.view.query) for each in task.views.of(0)]
    assert asked[: len(plain)] == plain
    own, kept = ([query for kind, query in asked if kind == name] for name in ("reworded", "reworded_kept"))
    assert len(own) == len(kept) == 3
    changed = {query.prompt for kind, query in plain if kind in ("reliability", "text_generality")}
    assert all(query.image is task.records[0].image for query in own)
    assert {query.prompt for query in own}.isdisjoint(changed)
    assert asked == task.features.questions(0)
    (features,) = task.features.get([0])
    assert len(features) == len(asked)
    # Heads that tell nothing apart: every question in scope costs what must stay, rewordings as much as the rest
    losses = {}
    for wordings in (0, 3):
        task.features.wordings = wordings
        task.features._kept.clear()
        losses[wordings] = float(task.features.loss(task.heads.eval(), range(4), 4.0).detach())
    assert losses[3] > losses[0]
    assert task_of(model, faithful=True).features.wordings == 0


def test_the_scope_learns_to_refuse_siblings(model: EditableModel) -> None:
    task = task_of(model)
    siblings = [query for kind, query in task.features.questions(0) if kind == "sibling"]
    assert len(siblings) == 2
    own = task.records[0]
    assert all(query.image is own.image and query.answer is None for query in siblings)
    others = {text for record in task.records[1:] for text in (record.prompt, record.rephrase)}
    assert {query.prompt for query in siblings} <= others
    assert "sibling" not in {kind for kind, _ in task_of(model, scope_wordings=0).features.questions(0)}
    # Heads that tell nothing apart: siblings in scope cost
    losses = []
    for number in (2, 0):
        task.features.siblings = [["Number 3 is what?"] * number] * len(task.records)
        task.features._kept.clear()
        losses.append(float(task.features.loss(task.heads.eval(), range(4), 4.0).detach()))
    assert losses[0] > losses[1]


def test_copying_is_learned_in_other_words(model: EditableModel) -> None:
    known = {text for record in make_edits(8) for text in (record.prompt, record.rephrase)}

    def asked(**changes: Any) -> list[str]:
        task = task_of(model, **changes)
        views = [each.view for step in range(8) for each in task._asked([0, 1, 2, 3], step, random.Random(step))[0]]
        return [view.query.prompt for view in views if view.role < Role.TEXT_LOCALITY]

    assert set(asked(answer_wordings=0.0)) <= known
    reworded = sum(prompt not in known for prompt in asked(answer_wordings=0.5))
    assert 8 <= reworded <= 24
    assert set(asked(faithful=True)) <= known


def test_validation_scores_what_acts_and_what_is_copied(model: EditableModel) -> None:
    task = task_of(model)
    found = task.validate()
    # Fresh heads: all with an image lie in every scope, and nothing is copied
    assert found["reliability_scope"] == 1.0
    assert found["reliability"] == 0.0
    assert found["near"] == 0.0
    assert found["blind"] == 1.0
    assert found["text_locality"] == 1.0


def test_few_records_are_refused(model: EditableModel) -> None:
    with pytest.raises(ValueError, match=r"serac: .*records=8, valid_records=6, batch_size=4"):
        task_of(model, valid_records=6)


@pytest.mark.parametrize("faithful", [False, True])
def test_what_must_stay_trains_the_scope_alone(model: EditableModel, faithful: bool) -> None:
    """Through the mixture it would teach the counterfactual model not to copy; the port has it so."""
    task = task_of(model, swap=0.0, faithful=faithful)
    # Fresh low-rank or full changes answer as the frozen model: let this one differ
    with torch.no_grad():
        for name, weight in task.stack.weights.items():
            weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    tokens = task._mixture([0, 1], 0, random.Random(0))
    kept = tokens.role >= int(Role.TEXT_LOCALITY)
    tokens.logits[kept].log_softmax(-1)[:, 0].sum().backward()  # type: ignore[no-untyped-call]
    reached = [p.grad is not None and bool(p.grad.any()) for name, p in task.parameters().items() if "model/" in name]
    assert any(reached) == faithful
    heads = [p.grad is not None and bool(p.grad.any()) for name, p in task.parameters().items() if "scope/" in name]
    assert any(heads)
    assert task.groups().keys() == {name for name in task.parameters() if "scope/" in name}
