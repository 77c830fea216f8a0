"""A model that is in memory is edited and stays what it is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fastedit
from fastedit.backbone import EditableModel, weights_hash
from tests.backbone.architectures import LayoutProcessor, make_stock
from tests.engine.conftest import make_edits


@pytest.fixture
def trained() -> tuple[Any, Any]:
    """A model as a trainer holds it: in train mode, some parts with gradients."""
    model = fastedit.load("random:llava-tiny", dtype="float64")
    hf = model.hf.train()
    for name, part in hf.named_parameters():
        part.requires_grad_("layers.1" in name)
    hf.model.language_model.layers[0].self_attn.attention_dropout = 0.5
    return hf, model.processor


def condition(hf: nn.Module) -> list[Any]:
    """Everything that a call may not leave changed."""
    modules = [(name, m.training, hooks(m), "forward" in m.__dict__) for name, m in hf.named_modules()]
    parts = [(name, part.requires_grad, part.grad is None) for name, part in hf.named_parameters()]
    return [modules, parts, weights_hash(hf), hf.config.to_dict()]  # type: ignore[operator]


def hooks(module: nn.Module) -> int:
    """Hooks on a module, without those that transformers leaves on a vision tower at its first call."""
    every = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return sum(not getattr(hook, "__module__", "").startswith("transformers.") for hook in every)


def edit(model: EditableModel, **settings: Any) -> fastedit.Run:
    options = {"steps": 4, "show_progress": False, "evaluate": False, **settings}
    return fastedit.edit(model, make_edits(2), "odedit+lora", pool=make_edits(4)[2:], **options)


def test_a_trainers_model_is_edited_as_if_loaded_and_stays_what_it_is(trained: tuple[Any, Any]) -> None:
    hf, processor = trained
    before = condition(hf)
    model = fastedit.wrap(hf, processor)
    run = edit(model, evaluate=True)
    answer = model.answer(make_edits(1)[0].image, "what is it ?")
    assert condition(hf) == before
    loaded = fastedit.load("random:llava-tiny", dtype="float64")
    expected = edit(loaded, evaluate=True)
    assert [o.loss for o in run.outcomes] == [o.loss for o in expected.outcomes]
    assert [s.strict for s in run.edit_scores] == [s.strict for s in expected.edit_scores]
    assert answer == loaded.answer(make_edits(1)[0].image, "what is it ?")


def test_a_failed_call_leaves_the_model_as_it_was(trained: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    hf, processor = trained
    before = condition(hf)
    model = fastedit.wrap(hf, processor)
    monkeypatch.setattr(model, "head", lambda _hidden: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        edit(model)
    assert condition(hf) == before


def test_what_is_kept_of_a_model_is_dropped_once_it_was_trained_on(trained: tuple[Any, Any]) -> None:
    hf, processor = trained
    model = fastedit.wrap(hf, processor)
    first, fingerprint = edit(model), model.fingerprint
    optimizer = torch.optim.AdamW([part for part in hf.parameters() if part.requires_grad], lr=1e-2)
    for part in hf.parameters():
        if part.requires_grad:
            part.grad = torch.ones_like(part)
    optimizer.step()
    again, fresh = edit(model), edit(fastedit.wrap(hf, processor))
    assert [o.loss for o in again.outcomes] == [o.loss for o in fresh.outcomes]
    assert [o.loss for o in again.outcomes] != [o.loss for o in first.outcomes]
    assert model.fingerprint != fingerprint
    with (
        pytest.raises(ValueError, match="belongs to the model it was fitted on"),
        fastedit.applied(model, first.deltas[0]),
    ):
        pass


def test_a_delta_bound_by_architecture_acts_on_other_weights_of_the_same_shapes() -> None:
    full, half = (
        fastedit.load("random:llava-tiny", dtype="float64"),
        fastedit.load("random:llava-tiny", dtype="bfloat16"),
    )
    assert full.architecture == half.architecture != full.fingerprint
    run = edit(full, bind="architecture")
    assert run.deltas[0].model_fingerprint == full.architecture
    with pytest.warns(RuntimeWarning, match="fitted in float64"), fastedit.applied(half, run.deltas[0]):
        half.answer(make_edits(1)[0].image, "what is it ?")
    other = fastedit.load("random:qwen2vl-tiny", dtype="float64")
    with pytest.raises(ValueError, match="other names or shapes"), fastedit.applied(other, run.deltas[0]):
        pass


def test_what_is_no_model_or_no_processor_is_refused(trained: tuple[Any, Any]) -> None:
    hf, processor = trained
    with pytest.raises(TypeError, match="must be a model of transformers"):
        fastedit.wrap(nn.Linear(2, 2), processor)
    with pytest.raises(TypeError, match="must have an image_processor"):
        fastedit.wrap(hf, None)


#: Values of modules that their own forward renews.
RENEWED = {"rope_deltas"}


def everything(hf: nn.Module) -> dict[str, Any]:
    """What modules, parameters and configurations are, told by their identity."""
    told: dict[str, Any] = {}
    for name, module in hf.named_modules():
        for key, value in module.__dict__.items():
            if key in RENEWED:
                continue
            tables = isinstance(value, dict) and key.startswith("_")
            told[f"{name}:{key}"] = {k: id(v) for k, v in value.items()} if tables else value
        told[f"{name}:class"] = type(module)
        config = getattr(module, "config", None)
        if config is not None:
            told[f"{name}:config"] = (id(config), config._attn_implementation, config.to_dict())
    for name, part in hf.named_parameters():
        told[f"{name}!"] = (id(part), part.requires_grad, part.grad is None, part._version)
    return told


@pytest.mark.parametrize("key", ["gemma3", "qwen3_5", "qwen3_vl_moe"])
def test_a_model_that_is_walked_by_its_own_forward_is_the_same_objects_afterwards(key: str) -> None:
    hf = make_stock(key).train()
    for name, part in hf.named_parameters():
        part.requires_grad_("layers.1" in name)
    processor, request = LayoutProcessor(key, hf), make_edits(1)
    # Towers that the attention registry serves set up things of their own at their first call
    with torch.no_grad():
        hf(input_ids=torch.tensor([[20, 30, 40]]))
    before = everything(hf)
    model = fastedit.wrap(hf, processor, template="question: {} answer:")
    assert everything(hf) == before
    names = {"names": ("q", "v")} if "moe" in key else {}
    layers = {"layers": (1, 3)} if key == "qwen3_5" else {}
    delta = fastedit.edit(
        model, request, "lora", steps=3, evaluate=False, show_progress=False, **names, **layers
    ).deltas[0]
    answer = model.answer(request[0].image, request[0].prompt)
    again = fastedit.wrap(hf, processor, template="question: {} answer:")
    with fastedit.attached(hf, delta, processor), fastedit.applied(again, delta):
        again.answer(request[0].image, request[0].prompt)
    assert everything(hf) == before
    assert again.answer(request[0].image, request[0].prompt) == answer
    with fastedit.attached(hf, delta, processor):
        pass
    assert everything(hf) == before


def test_a_copy_of_a_walked_model_has_weights_of_its_own() -> None:
    model = fastedit.wrap(hf := make_stock("gemma3"), LayoutProcessor("gemma3", hf), template="question: {}")
    image = make_edits(1)[0].image
    expected = model.answer(image, "what is it ?")
    copied = copy.deepcopy(model)
    for part in model.hf.parameters():
        part.data.zero_()
    assert copied.answer(image, "what is it ?") == expected
