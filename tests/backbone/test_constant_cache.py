"""Held outputs of modules with a constant input: the same values, computed once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastedit import Query, load
from fastedit.backbone import held_inputs
from tests.backbone.padded import prefix, tail


@pytest.mark.parametrize("stage", ["attention", "ffn"])
@pytest.mark.parametrize("name", ["random:llava-tiny", "random:blip2-tiny", "random:qwen2vl-tiny"])
def test_tails_are_the_same_to_the_bit_and_first_readers_run_once(name: str, stage: str) -> None:
    model = load(name)
    layer = model.n_layers - 2
    state = prefix(
        model, model.encode([Query("What is it?"), Query("And this one here?")], answers=False), layer, stage
    )
    expected = tail(model, state)
    names = {"attention": ("q", "k", "v"), "ffn": ("up", "gate")}[stage]
    modules = [model.module(s) for s in model.sites([layer], [n for n in names if n in model.adapter.text.site_paths])]
    calls: list[int] = []
    hooked: list[int] = []

    def counting(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x: calls.append(1) or original(x)

    own = [module.__dict__.get("forward") for module in modules]
    for module in modules:
        module.forward = counting(module.forward)  # type: ignore[method-assign]
    handles = [module.register_forward_hook(lambda *_: hooked.append(1)) for module in modules]
    with held_inputs(model, layer, stage) as held:
        for _ in range(3):
            assert torch.equal(tail(model, state), expected)
        assert len(calls) == len(modules)
        assert len(hooked) == 3 * len(modules), "deltas act through hooks"
        held.clear()
        half = state.select([1])
        torch.testing.assert_close(tail(model, half)[0], expected[1, : half.hidden.shape[1]], atol=1e-6, rtol=1e-6)
        assert len(calls) == 2 * len(modules)
    for handle in handles:
        handle.remove()
    assert torch.equal(tail(model, state), expected)
    assert len(calls) == 3 * len(modules), "afterwards the modules run again"
    for module, before in zip(modules, own, strict=True):
        del module.forward
        assert before is None
    assert all("forward" not in module.__dict__ for module in modules)


def test_modules_are_restored_after_an_error() -> None:
    model = load("random:llava-tiny")
    with pytest.raises(RuntimeError), held_inputs(model, 0, "ffn"):
        raise RuntimeError
    assert not any("forward" in module.__dict__ for module in model.hf.modules())
