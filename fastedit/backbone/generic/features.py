"""Images are looked at once: what the stock model makes of one is kept and handed to its next forward."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..caches import SpillCache
from ..context import overridden
from .door import map_tensors

#: Entries of a vision tower's output that no decoder reads.
_UNREAD = ("hidden_states", "attentions", "last_hidden_state", "vision_outputs", "qformer_outputs")
_METHOD = "get_image_features"


class FeatureMemory:
    """A memory behind the method of a model that looks at images, while it looks at one that is named.

    Args:
        hf: the model. budget: bytes on the device, and as much in host memory.
    """

    def __init__(self, hf: nn.Module, budget: int) -> None:
        self.kept: SpillCache[Any] = SpillCache(budget, budget, _n_bytes, lambda value, to: _moved(value, to))
        #: Whether what only some families read of the output is dropped.
        self.strips = True
        owners = [module for module in hf.modules() if callable(getattr(type(module), _METHOD, None))]
        # The innermost: a model with a head hands the call on
        self._owner: Any = owners[-1] if owners else _tower(hf)
        self._method = _METHOD if owners else "forward"

    @contextmanager
    def looking_at(self, key: str | None) -> Iterator[None]:
        """Inside the block, in this context, the model looks at what has this key only; None is any."""
        if self._owner is None or key is None:
            yield
            return
        # A video may be looked at in several calls
        looks = itertools.count()

        def make(stock: Callable[..., Any]) -> Callable[..., Any]:
            def looked(*args: Any, **kwargs: Any) -> Any:
                look = (key, next(looks))
                known = self.kept.get(look)
                if known is None:
                    known = self._stripped(stock(*args, **kwargs))
                    self.kept.put(look, known)
                return known

            return looked

        with overridden(self._owner, make, self._method):
            yield

    def _stripped(self, output: Any) -> Any:
        if self.strips and getattr(output, "pooler_output", None) is not None:
            for name in _UNREAD:
                if name in output:
                    output[name] = None
        return output


def _tower(hf: nn.Module) -> nn.Module | None:
    """The vision tower of a model that has no method for looking at images."""
    vision = getattr(hf.config, "vision_config", None)
    found = (module for module in hf.modules() if vision is not None and getattr(module, "config", None) is vision)
    return next(found, None)


def _n_bytes(value: Any) -> int:
    sizes: list[int] = []

    def count(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    map_tensors(value, count)
    return sum(sizes)


def _moved(value: Any, to: Any) -> Any:
    moved = map_tensors(value, lambda tensor: tensor.to(to))
    return type(value)(**moved) if isinstance(moved, dict) and type(value) is not dict else moved
