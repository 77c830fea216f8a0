"""Keep the outputs of modules whose input is constant, so that repeated tails from one state do not recompute them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .context import overridden

if TYPE_CHECKING:
    from .model import EditableModel

#: The modules of a layer that read the state directly (after its norm), by the stage of the state.
#: At the stage "vision" they are not constant.
FIRST_READERS: dict[str, tuple[str, ...]] = {"vision": (), "attention": ("q", "k", "v"), "ffn": ("up", "gate")}


class Held:
    """Outputs kept so far; `clear` when the state's rows or values change."""

    def __init__(self) -> None:
        self._outputs: dict[str, Tensor] = {}
        self._paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside the block modules compute what they are given; what is kept stays."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def clear(self) -> None:
        """Forget everything; the next tail computes it again."""
        self._outputs.clear()

    def get(self, path: str, module_forward: Any, x: Tensor) -> Tensor:
        """Return the module's output for the constant input, computed at the first call."""
        if self._paused:
            result: Tensor = module_forward(x)
            return result
        known = self._outputs.get(path)
        if known is None:
            with torch.no_grad():
                known = module_forward(x.detach())
            self._outputs[path] = known
        return known


@contextmanager
def held_inputs(model: EditableModel, layer: int, stage: str) -> Iterator[Held]:
    """Inside the block, the first readers of a state at (layer, stage) run once per state instead of once per tail.

    Values are the same to the bit: the input of these modules is the frozen state. Forward hooks still fire, so deltas
    on these modules act as ever. Whoever runs the tail from another state calls `clear` first.

    Args:
        model: no parameter of it may change inside the block.
        layer, stage: of the states that the tails start from.
    Yields:
        Held.
    """
    held = Held()
    known = model.adapter.text.site_paths
    sites = model.sites([layer], [name for name in FIRST_READERS[stage] if name in known])
    with ExitStack() as entered:
        for site in sites:
            entered.enter_context(overridden(model.module(site), _held_forward(held, site.module_path)))
        yield held


def _held_forward(held: Held, path: str) -> Any:
    def make(original: Any) -> Any:
        def forward(x: Tensor) -> Tensor:
            return held.get(path, original, x)

        return forward

    return make
