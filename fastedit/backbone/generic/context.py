"""What belongs to one walk of a decoder: its layers, mixers and attention functions ask here what to do.

While a model is walked its layers and mixers have a ``forward`` that looks into a context variable first. In threads
that walk nothing it does what the stock one does, and when the last walk has ended the stock one is back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from torch import Tensor, nn

Forward = Callable[..., Any]


class Walk(Protocol):
    """What a decoder's parts do now.

    Args:
        makes_masks: whether the stock forward shall make the masks of its layers.
    """

    makes_masks: bool

    def layer(self, index: int, stock: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Stand for a decoder layer."""

    def part(self, role: str, index: int, stock: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Stand for a part of a layer.

        Args:
            role: "mixer"; "entry", the module that reads the residual stream after it; or "token", a linear map inside
                of the mixer whose output at a token is for that token alone.
        """

    def root(self, stock: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Stand for the decoder."""

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, options: dict[str, Any]
    ) -> tuple[Tensor, None] | None:
        """Stand for the attention function; None is the stock one."""


CURRENT: ContextVar[Walk | None] = ContextVar("fastedit_walk", default=None)


@contextmanager
def walking(walk: Walk | None) -> Iterator[None]:
    """Inside the block, in this context, the decoder's parts ask this walk."""
    before = CURRENT.set(walk)
    try:
        yield
    finally:
        CURRENT.reset(before)


def is_walking() -> bool:
    """Whether the running context walks a decoder by its own forward."""
    return CURRENT.get() is not None


class Instruments:
    """Lets modules ask the walk of the running context; `remove` takes that back."""

    def __init__(self) -> None:
        self.users = 0
        self._changed: dict[tuple[nn.Module, str], tuple[Any, Any]] = {}

    def root(self, module: nn.Module) -> None:
        """Let the decoder ask."""
        self._put(module, "root", lambda walk, stock, args, kwargs: walk.root(stock, args, kwargs))

    def layer(self, module: nn.Module, index: int) -> None:
        """Let a layer ask."""
        self._put(module, "layer", lambda walk, stock, args, kwargs: walk.layer(index, stock, args, kwargs))

    def part(self, module: nn.Module, role: str, index: int) -> None:
        """Let a part of a layer ask."""
        self._put(module, role, lambda walk, stock, args, kwargs: walk.part(role, index, stock, args, kwargs))

    def remove(self) -> None:
        """Put back what was there."""
        for (module, _), (before, forward) in reversed(self._changed.items()):
            # An instance attribute of before goes back; else the class's method shows again
            if module.__dict__.get("forward") is forward:
                del module.forward
                if before is not None:
                    module.forward = before
        self._changed.clear()

    def _put(
        self, module: nn.Module, role: str, ask: Callable[[Walk, Forward, tuple[Any, ...], dict[str, Any]], Any]
    ) -> None:
        if (module, role) in self._changed:
            return
        before = module.__dict__.get("forward")

        def stock(*args: Any, **kwargs: Any) -> Any:
            # Looked up anew: the class of a quantized map changes while its weight is written out
            return type(module).forward(module, *args, **kwargs) if before is None else before(*args, **kwargs)

        def forward(*args: Any, **kwargs: Any) -> Any:
            walk = CURRENT.get()
            return stock(*args, **kwargs) if walk is None else ask(walk, stock, args, kwargs)

        self._changed[module, role] = before, forward
        module.forward = forward
