"""Hooks, replaced methods and active deltas belong to a context: other threads pass them by."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastedit.backbone.context import autocast_key, outside_inference_mode, overridden, scoped_hooks, with_gradients


def elsewhere(work: Callable[[], Any], context: contextvars.Context | None = None) -> Any:
    results: list[Any] = []
    run = work if context is None else lambda: context.run(work)
    thread = threading.Thread(target=lambda: results.append(run()))
    thread.start()
    thread.join()
    return results[0]


def test_hooks_fire_in_their_context_alone() -> None:
    module, x = nn.Linear(2, 2), torch.ones(1, 2)
    plain = module(x)
    with scoped_hooks({module: lambda _m, _a, output: output + 1}):
        assert torch.equal(module(x), plain + 1)
        assert torch.equal(elsewhere(lambda: module(x)), plain)
        assert torch.equal(elsewhere(lambda: module(x), contextvars.copy_context()), plain + 1)
        with scoped_hooks({module: lambda _m, args: (args[0] * 0,)}, before=True):
            assert torch.equal(module(x), module.bias.expand(1, 2) + 1)
    assert torch.equal(module(x), plain)
    assert not module._forward_hooks
    assert not module._forward_pre_hooks


def test_a_replaced_method_is_replaced_in_its_context_alone_and_comes_back() -> None:
    module, x = nn.Linear(2, 2), torch.ones(1, 2)
    plain = module(x)

    def plus(number: float) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
        return lambda original: lambda x: original(x) + number

    with overridden(module, plus(1)):
        with overridden(module, plus(2)):
            torch.testing.assert_close(module(x), plain + 1 + 2)
        assert torch.equal(module(x), plain + 1)
        assert torch.equal(elsewhere(lambda: module(x)), plain)
    assert torch.equal(module(x), plain)
    assert "forward" not in module.__dict__


def test_blocks_of_threads_that_overlap_leave_no_method_behind() -> None:
    module, x = nn.Linear(2, 2), torch.ones(1, 2)
    plain = module(x)
    inside, leave = threading.Event(), threading.Event()
    results: list[Tensor] = []

    def other() -> None:
        with overridden(module, lambda original: lambda x: original(x) + 5):
            inside.set()
            leave.wait(10)
            results.append(module(x))

    thread = threading.Thread(target=other)
    with overridden(module, lambda original: lambda x: original(x) + 1):
        thread.start()
        assert inside.wait(10)
        assert torch.equal(module(x), plain + 1)
    assert torch.equal(module(x), plain)
    assert "forward" in module.__dict__
    leave.set()
    thread.join()
    assert torch.equal(results[0], plain + 5)
    assert "forward" not in module.__dict__


def test_a_method_that_an_object_had_of_its_own_comes_back() -> None:
    module = nn.Linear(2, 2)
    module.forward = lambda x: x * 7  # type: ignore[method-assign,assignment]
    with overridden(module, lambda original: lambda x: original(x) + 1):
        assert torch.equal(module(torch.ones(2)), torch.full((2,), 8.0))
    assert torch.equal(module(torch.ones(2)), torch.full((2,), 7.0))


def test_modes_of_the_caller_do_not_reach_what_is_kept() -> None:
    with torch.inference_mode():
        made = outside_inference_mode(lambda: torch.ones(2))()
        assert not made.is_inference()
        assert torch.ones(2).is_inference()
        grown = with_gradients(lambda: torch.ones(2, requires_grad=True) * 2)()
    assert grown.requires_grad


def test_autocast_is_told_by_its_type() -> None:
    device = torch.device("cpu")
    assert autocast_key(device) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert autocast_key(device) == "torch.bfloat16"
    with torch.autocast("cpu", enabled=False):
        assert autocast_key(device) is None
