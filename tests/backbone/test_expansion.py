"""Expanded 4-bit layers: the same values and gradients, dequantized once, and nothing left behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastedit.backbone import EditableModel, expanded_layers, held_inputs, load
from fastedit.deltas import DeltaSpec, Rows, installed
from fastedit.deltas.kinds import new_stack
from tests.backbone.padded import prefix, tail

from .conftest import mixed_queries

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
NAMES = ["random:llava-tiny", "random:blip2-tiny", "random:qwen2vl-tiny"]


def outcome(model: EditableModel, kind: str, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits at the labels, and the gradient of a delta on the maps of a layer."""
    names = [name for name in ("up", "gate", "down") if name in model.adapter.text.site_paths]
    options = {"rank": 2, "scale": 2.0} if kind == "low_rank" else {}
    stacked = new_stack(DeltaSpec(kind, tuple(model.sites([layer], names)), options), 1)
    stacked.flat.copy_(torch.linspace(-0.02, 0.02, stacked.flat.shape[1]))
    encoded = model.encode(mixed_queries(), answers=True)
    state = prefix(model, encoded, layer, "ffn")
    with installed(model, stacked, Rows()):
        stacked.begin_step()
        hidden = tail(model, state, positions=encoded.label_positions())
        logits = model.head(hidden)[encoded.label_positions() >= 0]
        nn.functional.cross_entropy(logits, encoded.labels[encoded.label_mask]).backward()
        stacked.end_step()
    return logits.detach(), stacked.grad


def close(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert other.abs().max() > 1e-4
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def kinds_of_modules(model: EditableModel) -> list[type]:
    return [type(module) for module in model.hf.modules()]


@pytest.mark.parametrize("linear", ["torch", "auto"])
@pytest.mark.parametrize("kind", ["full", "low_rank"])
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_are_the_same(name: str, kind: str, linear: str) -> None:
    model = load(name, quantize="nf4", linear=linear)
    types = kinds_of_modules(model)
    stored = {path: copy.deepcopy(tensor) for path, tensor in model.hf.state_dict().items()}
    expected = outcome(model, kind, 1)
    with expanded_layers(model, 1) as written:
        close(outcome(model, kind, 1), expected)
    maps = model.sites(range(1, model.n_layers), list(model.adapter.text.site_paths))
    assert written == sum(4 * site.d_in * site.d_out for site in maps)
    assert kinds_of_modules(model) == types
    after = model.hf.state_dict()
    assert all(torch.equal(after[path], tensor) for path, tensor in stored.items())
    assert not any("expanded_weight" in vars(module) for module in model.hf.modules())
    assert all(torch.equal(one, two) for one, two in zip(outcome(model, kind, 1), expected, strict=True))


def test_weights_are_dequantized_once_and_only_from_the_first_layer_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("random:llava-tiny", quantize="nf4")
    site = model.sites([0, 2], ["up"])
    x = torch.randn(20, model.hidden_size, requires_grad=True)
    calls: list[int] = []
    original = bitsandbytes.functional.dequantize_4bit
    monkeypatch.setattr(
        bitsandbytes.functional, "dequantize_4bit", lambda *args, **kw: calls.append(1) or original(*args, **kw)
    )
    per_layer = len(model.adapter.text.site_paths)
    with expanded_layers(model, 2):
        assert len(calls) == (model.n_layers - 2) * per_layer
        for _ in range(3):
            model.module(site[1])(x).sum().backward()
        assert len(calls) == (model.n_layers - 2) * per_layer
        assert type(model.module(site[0])) is bitsandbytes.nn.Linear4bit
        assert isinstance(model.module(site[1]), bitsandbytes.nn.Linear4bit)


def test_blocks_nest_with_each_other_and_with_held_inputs() -> None:
    model = load("random:llava-tiny", quantize="nf4")
    types = kinds_of_modules(model)
    encoded = model.encode(mixed_queries(), answers=False)
    state = prefix(model, encoded, 1, "ffn")
    expected = tail(model, state)
    with expanded_layers(model, 2) as outer:
        with expanded_layers(model, 1) as inner, held_inputs(model, 1, "ffn"):
            assert inner > 0
            torch.testing.assert_close(tail(model, state), expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(tail(model, state), expected, atol=1e-5, rtol=1e-5)
        assert outer == inner * (model.n_layers - 2)
        assert "expanded_weight" in vars(model.module(model.sites([2], ["up"])[0])), "the outer block goes on"
        assert "expanded_weight" not in vars(model.module(model.sites([1], ["up"])[0]))
    with held_inputs(model, 1, "ffn"), expanded_layers(model, 1):
        torch.testing.assert_close(tail(model, state), expected, atol=1e-5, rtol=1e-5)
    assert kinds_of_modules(model) == types


def test_nothing_remains_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("random:llava-tiny", quantize="nf4")
    types = kinds_of_modules(model)
    with pytest.raises(RuntimeError, match="inside"), expanded_layers(model, 0):
        raise RuntimeError("inside")
    assert kinds_of_modules(model) == types
    calls: list[int] = []
    original = bitsandbytes.functional.dequantize_4bit

    def failing(*args: object, **kw: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 5:
            raise RuntimeError("no memory")
        return original(*args, **kw)

    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", failing)
    with pytest.raises(RuntimeError, match="no memory"), expanded_layers(model, 0):
        raise AssertionError("unreachable")
    assert kinds_of_modules(model) == types
    assert not any("expanded_weight" in vars(module) for module in model.hf.modules())


def test_half_precision_multiplies_in_its_own_type() -> None:
    model = load("random:llava-tiny", quantize="nf4", dtype="bfloat16")
    module = model.module(model.sites([1], ["up"])[0])
    x = torch.randn(9, model.hidden_size, dtype=torch.bfloat16)
    expected = module(x)
    with expanded_layers(model, 1):
        assert module.expanded_weight.dtype == torch.bfloat16
        torch.testing.assert_close(module(x), expected)
        # as a 4-bit map does, the output has the type of the input
        assert module(x.float()).dtype == torch.float32


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_other_models_are_left_alone(quantize: str) -> None:
    model = load("random:llava-tiny", quantize=quantize)
    types = kinds_of_modules(model)
    with expanded_layers(model, 0) as written:
        assert written == 0
        assert kinds_of_modules(model) == types


def test_layers_that_do_not_exist_are_refused() -> None:
    model = load("random:llava-tiny")
    with pytest.raises(ValueError, match=r"first_layer is 0 to 3 \(got first_layer=4\)"), expanded_layers(model, 4):
        pass
