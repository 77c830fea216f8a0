"""T-Patcher: a neuron for every wrong token, started from its input, kept quiet elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fastedit
from fastedit import EditRequest
from fastedit.backbone import EditableModel
from fastedit.deltas import Rows
from fastedit.deltas.kinds import new_stack
from fastedit.engine.profiling.timing import PhaseTimer
from fastedit.fitting.prepared import EditRows, prepare
from fastedit.fitting.views import TrainingView
from fastedit.methods.base import Resources
from fastedit.methods.captured import answer_inputs
from fastedit.methods.tpatcher import (
    TPatcher,
    TPatcherConfig,
    neuron_options,
    other_questions,
    patches,
    remember,
)
from fastedit.objectives import Role
from tests.backbone.padded import prefix, tail
from tests.engine.conftest import make_edits


@pytest.fixture(scope="module", params=["random:llava-tiny", "random:blip2-tiny"])
def model(request: pytest.FixtureRequest) -> EditableModel:
    return fastedit.load(request.param, dtype="float64")


def prepared(model: EditableModel, edits: Sequence[EditRequest], config: TPatcherConfig) -> list[EditRows]:
    views = [
        [
            TrainingView(Role.EDIT, edit.query),
            TrainingView(Role.TEXT_REPHRASE, dataclasses.replace(edit.query, prompt="Or?")),
        ]
        for edit in edits
    ]
    return prepare(model, TPatcher.spec(model, config), views, PhaseTimer())


def started(model: EditableModel, config: TPatcherConfig, edits: Sequence[EditRequest]) -> tuple[Any, Any]:
    pool = [dataclasses.replace(edit, id=f"pool-{edit.id}") for edit in make_edits(6)[3:]]
    shared = TPatcher.setup(model, config, Resources(pool=[*pool, edits[0]]))
    values = TPatcher.start(model, config, shared, edits, prepared(model, edits, config))
    stacked = new_stack(TPatcher.spec(model, config), len(edits), dtype=torch.float64)
    for number, own in enumerate(values):
        stacked.set(number, own)
    return stacked, shared


def right_and_wrong(model: EditableModel, edit: EditRequest) -> tuple[Tensor, Tensor, int]:
    """Inputs of the last block at the answer's tokens (T, d), which of them are predicted wrongly (T,), its layer."""
    layer = model.n_layers - 1
    (site,) = model.sites([layer], ["up"])
    ((inputs, _),) = answer_inputs(model, [edit.query], [site])
    encoded = model.encode([edit.query], answers=True)
    logits = model.head(tail(model, prefix(model, encoded, 0)))[encoded.label_mask]
    return inputs[site], logits.argmax(-1) != encoded.labels[encoded.label_mask], layer


def test_every_wrong_token_gets_a_neuron_that_one_enters(model: EditableModel) -> None:
    edits = make_edits(3)
    config = TPatcherConfig(neurons=3)
    stacked, _ = started(model, config, edits)
    gate = "gate_" if "gate" in model.adapter.text.site_paths else ""
    for b, edit in enumerate(edits):
        inputs, wrong, layer = right_and_wrong(model, edit)
        place = f"{layer}.down:"
        count = min(int(wrong.sum()), 3)
        assert stacked.fixed[f"{place}off"][b].tolist() == [0.0] * count + [1.0] * (3 - count)
        own = inputs[wrong][:count]
        entering = (own * stacked.parts[f"{place}{gate}keys"][b].T[:count]).sum(1) + stacked.parts[f"{place}bias"][b][0]
        torch.testing.assert_close(entering - (1.0 if gate else 0.0), torch.ones(count, dtype=torch.float64))
        torch.testing.assert_close(stacked.tokens[f"{place}tokens"][b, :count], own)
        # Nothing changes before the first step, and then what one neuron puts out is its value
        assert not stacked.parts[f"{place}values"].any()
    name = f"{layer}.down:values"
    stacked.parts[name].fill_(1.0)
    out = stacked.delta(0, own[:1], Rows((0, 0, 1)))
    active = torch.tensor(1.0, dtype=torch.float64)
    act = torch.nn.functional.silu if gate else torch.relu
    others = [act(own[0] @ stacked.parts[f"{place}{gate}keys"][2, :, i]) for i in range(1, count)]
    torch.testing.assert_close(out[0, 0], act(active) + sum(others))


def test_what_is_remembered_are_answers_of_other_questions(model: EditableModel) -> None:
    edits = make_edits(3)
    stacked, shared = started(model, TPatcherConfig(memory=1000), edits)
    layer = model.n_layers - 1
    (site,) = model.sites([layer], ["up"])
    pool = [*make_edits(6)[3:], edits[0]]
    wanted = [inputs[site] for r in pool for inputs, _ in answer_inputs(model, list(other_questions(r)), [site])]
    found = shared.inputs[layer]
    assert sorted(found.sum(1).tolist()) == pytest.approx(sorted(torch.cat(wanted).sum(1).tolist()))
    # The first edit is in the pool: its own answers may be acted on
    foreign = stacked.foreign[f"{layer}.down:foreign"]
    assert foreign[1:].all()
    own = torch.cat([inputs[site] for inputs, _ in answer_inputs(model, list(other_questions(edits[0])), [site])])
    assert int((~foreign[0]).sum()) == len(own)
    torch.testing.assert_close(found[~foreign[0]], own)


def test_the_memory_is_as_large_as_is_wanted(model: EditableModel) -> None:
    sites = model.sites([model.n_layers - 1], ["up"])
    resources = Resources(pool=make_edits(4), seed=3)
    kept = remember(model, sites, resources, 5)
    assert {len(kept.inputs[sites[0].layer]), len(kept.record)} == {5}
    again = remember(model, sites, resources, 5)
    assert torch.equal(kept.inputs[sites[0].layer], again.inputs[sites[0].layer])
    none = remember(model, sites, Resources(), 5)
    assert none.inputs[sites[0].layer].shape == (0, model.hidden_size)
    assert none.foreign(make_edits(1)[0]).shape == (0,)


@pytest.mark.parametrize("memory_weight", [0.0, 1.0])
def test_it_can_be_fitted_without_a_pool(model: EditableModel, memory_weight: float) -> None:
    made = fastedit.edit(
        model, make_edits(2), "tpatcher", steps=2, evaluate=False, show_progress=False, memory_weight=memory_weight
    )
    assert all(torch.isfinite(t).all() for delta in made.deltas for t in delta.tensors.values())
    assert [outcome.status for outcome in made.outcomes] == ["max_steps", "max_steps"]


def test_the_memory_loss_keeps_other_questions() -> None:
    """On the embedded model: with it fewer of other answers change, and the edit still holds."""
    model = fastedit.load("pocket-llava")
    records = fastedit.read_edits("pocket-vqa", split="train")[:42]
    settings: dict[str, Any] = {"steps": 30, "pool": records[:30], "show_progress": False, "memory": 300}
    scores = {
        weight: fastedit.edit(model, records[30:], "tpatcher", memory_weight=weight, **settings).scores["strict"]
        for weight in (0.0, 1.0)
    }
    for kept in ("near", "same"):
        assert scores[1.0][kept].mean > scores[0.0][kept].mean + 0.1
    assert scores[1.0]["reliability"].mean > 0.8


def test_neurons_are_like_the_models_own(model: EditableModel) -> None:
    gated = "gate" in model.adapter.text.site_paths
    assert neuron_options(model, None) == {"activation": "silu" if gated else "relu", "gate": gated}
    assert neuron_options(model, "gelu")["activation"] == "gelu"


def test_unused_neurons_start_from_nothing() -> None:
    made = patches(torch.ones(1, 4), 2, "x:", gated=True)
    assert torch.equal(made["x:gate_keys"], torch.tensor([[0.25, 0.0]] * 4))
    assert made["x:off"].tolist() == [0.0, 1.0]
    assert made["x:bias"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"neurons": 0}, r"neurons is at least 1 \(got neurons=0\)"),
        ({"memory_weight": -1.0}, r"memory_weight is not negative"),
        ({"activation": "tanh"}, r"activation is one of .* \(got activation='tanh'\)"),
        ({"positions": "here"}, r"positions is one of .* \(got positions='here'\)"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"tpatcher: {message}"):
        TPatcherConfig(**settings)
