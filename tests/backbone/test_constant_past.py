"""Constant keys in buffers that serve every step: never copied, and never written under a graph that needs them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastedit.backbone import constant_past as module
from fastedit.backbone.attention import attend, plan_attention
from fastedit.backbone.constant_past import ConstantPast

from .test_attention import D_HEAD, GROUPS, LAYER, SCALE, constants, draw, packed

STARTS, COUNTS = (3, 0, 2), (2, 4, 1)


def setting() -> tuple[ConstantPast, Any, list[Tensor]]:
    state = packed(COUNTS, STARTS, {LAYER: constants(STARTS, seed=3)[0]})
    plan = plan_attention(state, None, COUNTS, window=None)
    tensors = [draw(sum(COUNTS), GROUPS, D_HEAD, seed=seed).requires_grad_() for seed in (1, 2, 3)]
    return ConstantPast(state), plan, tensors


def step(past: ConstantPast, plan: Any, tensors: list[Tensor]) -> Tensor:
    return attend(LAYER, tensors[0], tensors[1], tensors[2], plan, scale=SCALE, past=past).square().sum()


def copies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    made: list[int] = []
    copy = Tensor.index_copy
    monkeypatch.setattr(Tensor, "index_copy", lambda self, *rest: made.append(len(self)) or copy(self, *rest))
    return made


def test_no_step_copies_the_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    past, plan, tensors = setting()
    torch.autograd.grad(step(past, plan, tensors), tensors)
    places = plan.rows * plan.capacity
    made = copies(monkeypatch)
    for _ in range(3):
        torch.autograd.grad(step(past, plan, tensors), tensors)
        with torch.no_grad():
            step(past, plan, tensors)
    # Of queries, which are padded apart, at most
    assert places not in made


def test_a_step_before_the_gradient_of_another_leaves_that_alone() -> None:
    past, plan, tensors = setting()
    alone = torch.autograd.grad(step(past, plan, tensors), tensors)
    first = step(past, plan, tensors)
    others = [(2 * tensor).detach().requires_grad_() for tensor in tensors]
    second = step(past, plan, others)
    with torch.no_grad():
        step(past, plan, [3 * tensor for tensor in tensors])
    for found, wanted in zip(torch.autograd.grad(first, tensors), alone, strict=True):
        torch.testing.assert_close(found, wanted)
    fresh, plan, _ = setting()
    wanted_second = torch.autograd.grad(step(fresh, plan, others), others)
    for found, wanted in zip(torch.autograd.grad(second, others), wanted_second, strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_graph_that_is_dropped_gives_the_buffers_back() -> None:
    past, plan, tensors = setting()
    with torch.no_grad():
        step(past, plan, tensors)
    (buffers,) = past._laid_out.values()
    assert isinstance(buffers, module._Buffers)
    kept = step(past, plan, tensors)
    assert buffers.is_kept
    del kept
    assert not buffers.is_kept
