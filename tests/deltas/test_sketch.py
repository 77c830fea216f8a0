"""The sketch of parameters against its definition, and what it allocates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastedit.backbone import Site
from fastedit.deltas import DeltaSpec, sketch
from fastedit.deltas.base import FlatStack
from fastedit.deltas.kinds import new_stack
from fastedit.deltas.sketch import sketched
from fastedit.objectives import InvariantConfig
from fastedit.objectives.multiplier import DualNetwork


def filled(edits: int = 3, d_in: int = 40, d_out: int = 25) -> FlatStack:
    stack: Any = new_stack(DeltaSpec("full", (Site(0, "up", "up", d_in, d_out),)), edits, dtype=torch.float64)
    stack.flat.copy_(torch.randn(stack.flat.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    return stack  # type: ignore[no-any-return]


@pytest.mark.parametrize("length", [1, 7, 64, 999])
@pytest.mark.parametrize("columns", [1, 100, 1 << 18])
def test_value_and_gradient_are_those_of_the_definition(
    length: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sketch, "COLUMNS", columns)
    stack = filled()
    network = DualNetwork(stack.flat, InvariantConfig(sketch=length, seed=2))
    assert network.signs is not None
    flat = stack.flat.clone().requires_grad_(True)
    expected = network.summary(flat)
    summary = network.summary(stack.flat, lambda signs, length: sketched(stack, signs, length))
    torch.testing.assert_close(summary, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    (goal,) = torch.autograd.grad((expected * weights).sum(), flat)
    stack.begin_step()
    (summary * weights).sum().backward()  # type: ignore[no-untyped-call]
    assert not stack.grad.any(), "it is added when the step ends"
    stack.end_step()
    torch.testing.assert_close(stack.grad, goal, rtol=1e-12, atol=1e-12)


def test_an_edit_comes_out_the_same_in_any_company() -> None:
    stack, alone = filled(), filled(1)
    alone.flat.copy_(stack.flat[1:2])
    signs = torch.ones(stack.flat.shape[1], dtype=torch.int8)
    assert torch.equal(sketched(stack, signs, 64)[1], sketched(alone, signs, 64)[0])


class Largest(TorchDispatchMode):
    """The most numbers that an op has made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        views = func._schema.returns and func._schema.returns[0].alias_info is not None
        if isinstance(out, Tensor) and not views:
            self.numel = max(self.numel, out.numel())
        return out


def test_nothing_as_large_as_the_rows_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sketch, "COLUMNS", 128)
    stack = filled()
    signs = torch.ones(stack.flat.shape[1], dtype=torch.int8)
    with Largest() as largest:  # type: ignore[no-untyped-call]
        stack.begin_step()
        summary = sketched(stack, signs, 64)
        summary.sum().backward()  # type: ignore[no-untyped-call]
        for add in stack._pending:
            add()
    assert 0 < largest.numel <= 3 * 128
