"""Images are looked at once: what the stock model makes of one is kept and handed to its next forward."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..caches import SpillCache
from ..context import overridden
from ..states import ImageInputs
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
        #: Whether images of a list come out as they do alone; None until the first list has been looked at both ways.
        self.apart: bool | None = None
        owners = [module for module in hf.modules() if callable(getattr(type(module), _METHOD, None))]
        # The innermost: a model with a head hands the call on
        self._owner: Any = owners[-1] if owners else _tower(hf)
        self._method = _METHOD if owners else "forward"

    @contextmanager
    def looking_at(self, image: ImageInputs | None) -> Iterator[None]:
        """Inside the block, in this context, the model looks at this only; None is anything.

        Where images of a list come out as they do alone, those that were looked at in another list are not again.
        """
        if self._owner is None or image is None:
            yield
            return
        # A video may be looked at in several calls
        looks = itertools.count()

        def make(stock: Callable[..., Any]) -> Callable[..., Any]:
            def looked(*args: Any, **kwargs: Any) -> Any:
                look = (image.key, next(looks))
                known = self.kept.get(look)
                if known is None:
                    known = self._of_parts(stock, image, args, kwargs)
                    if known is not None:
                        return known
                    known = self._stripped(stock(*args, **kwargs))
                    self.kept.put(look, known)
                return known

            return looked

        with overridden(self._owner, make, self._method):
            yield

    def _of_parts(
        self, stock: Callable[..., Any], image: ImageInputs, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What the model makes of a list, put together of what it makes of each image; None where that is another."""
        if self.apart is False or not self.strips or not image.parts:
            return None
        named: dict[str, Any] = {}
        signature = inspect.signature(stock)
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            others = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
            named |= value if others else {name: value}
        tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
        if not tensors or any(
            value.shape != image.tensors[name].shape if name in image.parts[0].tensors else True
            for name, value in tensors.items()
        ):
            return None
        features = []
        for part in image.parts:
            known = self.kept.get((part.key, 0))
            if known is None:
                alone = {name: part.tensors[name].to(value.device, value.dtype) for name, value in tensors.items()}
                known = self._stripped(stock(**named | alone))
                self.kept.put((part.key, 0), known)
            features.append(known)
        whole = joined_outputs(features)
        if self.apart is None:
            self.apart = _alike(whole, self._stripped(stock(*args, **kwargs)))
        return whole if self.apart else None

    def _stripped(self, output: Any) -> Any:
        if self.strips and getattr(output, "pooler_output", None) is not None:
            for name in _UNREAD:
                if name in output:
                    output[name] = None
        return output


def joined_outputs(outputs: Sequence[Any], name: str = "pooler_output") -> Any:
    """Return what a model makes of several images by what it makes of each: by image, or by layer all images' tokens.

    Args:
        outputs: one an image. name: of the entry; the features themselves may be listed by image, others by layer.
    """
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.cat(list(outputs))
    if isinstance(first, Mapping):
        return type(first)(**{entry: joined_outputs([each[entry] for each in outputs], entry) for entry in first})
    if not isinstance(first, (list, tuple)):
        return first
    if name == "pooler_output":
        return type(first)(part for each in outputs for part in each)
    # By layer, and in a layer all tokens, or images again
    return type(first)(joined_outputs(layer) for layer in zip(*outputs, strict=True))


def _alike(found: Any, expected: Any) -> bool:
    """Whether outputs are the same but for rounding."""
    if isinstance(expected, Tensor):
        if not isinstance(found, Tensor) or found.shape != expected.shape:
            return False
        room = torch.finfo(expected.dtype).eps ** 0.5 if expected.is_floating_point() else 0
        return bool((found - expected).abs().max() <= room * expected.abs().max())
    if isinstance(expected, Mapping):
        known = {name: value for name, value in expected.items() if value is not None}
        return all(name in found and _alike(found[name], value) for name, value in known.items())
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(_alike(a, b) for a, b in zip(found, expected, strict=True))
    return True


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
