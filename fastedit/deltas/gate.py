"""How the gradient of a delta's part reaches the stack that holds it."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Receiver(Protocol):
    """A stack of deltas."""

    def receive(self, name: str, grad: Tensor) -> None:
        """Store or add a part's gradient; "" is the whole row."""


def gate(anchor: Tensor, values: Tensor, stack: Receiver, name: str) -> Tensor:
    """The values as an input of the graph, whose gradient the stack receives; ``anchor`` requires one and gets none."""
    gated: Tensor = _Gate.apply(anchor, values, stack, name)  # type: ignore[no-untyped-call]
    return gated


class _Gate(torch.autograd.Function):
    """The identity on a part's values; hands the part's gradient to its stack."""

    @staticmethod
    def forward(ctx: Any, _anchor: Tensor, values: Tensor, stack: Receiver, name: str) -> Tensor:
        """The values as they are."""
        ctx.stack, ctx.name = stack, name
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, None]:
        """Nothing goes back through the graph: the stack has it."""
        ctx.stack.receive(ctx.name, grad)
        return None, None, None, None
