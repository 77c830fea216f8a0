"""A traced decoder as the rest of the backbone asks for it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..stacks import layer_kinds
from .context import Forward, walking
from .decoder import Decoder


class TracedStack:
    """What editing asks of a decoder: its layers, its linear maps by name, one feed-forward block alone.

    Args:
        decoder: traced.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.root, self.config, self.layers = decoder.root, decoder.config, decoder.layers
        self.kinds = layer_kinds(self.config, len(self.layers))
        named = [trace.sites or {} for trace in decoder.traces]
        #: Names that every layer has, with their paths in the first.
        self.site_paths = {name: path for name, path in named[0].items() if all(name in each for each in named)}

    def paths_of(self, index: int) -> dict[str, str]:
        """Paths of the linear maps of one layer by name."""
        return dict(self.decoder.traces[index].sites or {})

    @property
    def stored(self) -> int:
        """Numbers that attention keeps of a token in all layers."""
        return sum(trace.stored for trace in self.decoder.traces)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return word embeddings."""
        embeddings: Tensor = self.root.embed_tokens(input_ids)
        return embeddings.to(input_ids.device)

    def feed_forward_entry(self, index: int) -> nn.Module:
        """Return the module that reads the residual stream where the feed-forward block begins.

        Raises:
            ValueError: there is none that reads it alone.
        """
        trace = self.decoder.traces[index]
        if not trace.entry:
            raise ValueError(
                f"feed_forward: a block must read the residual stream alone (got layer={index} of the text model "
                f"{self.config.model_type!r})"
            )
        module: nn.Module = self.layers[index].get_submodule(trace.entry)
        return module

    def feed_forward(self, index: int, hidden: Tensor) -> Tensor:
        """Return the residual stream (1, T, d) after a feed-forward block.

        Raises:
            ValueError: the block cannot be run apart from the rest of its layer.
        """
        trace = self.decoder.traces[index]
        if not trace.entry and not trace.parallel:
            raise ValueError(
                f"feed_forward: a block must read the residual stream alone (got layer={index} of the text model "
                f"{self.config.model_type!r})"
            )
        layer: Any = self.layers[index]
        needed = [
            name
            for name, parameter in self.decoder.layer_signatures[index].parameters.items()
            if parameter.default is inspect.Parameter.empty
            and parameter.kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        ]
        with self.decoder.instrumented(), walking(_WithoutMixer(index, trace.mixer_length)):
            output = layer(hidden, **dict.fromkeys(needed[1:]))
        first: Tensor = output[0] if isinstance(output, tuple) else output
        return first.to(hidden.device)


class _WithoutMixer:
    """A walk through one layer whose mixer puts out nothing."""

    makes_masks = False

    def __init__(self, index: int, length: int) -> None:
        self.index, self.length = index, length

    def root(self, stock: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Not called."""
        return stock(*args, **kwargs)

    def layer(self, _index: int, stock: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the layer."""
        return stock(*args, **kwargs)

    def part(self, role: str, index: int, stock: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Put out zeros where the mixer would run."""
        if role not in ("mixer", "reader") or index != self.index:
            return stock(*args, **kwargs)
        zeros = torch.zeros_like(args[0] if args else kwargs["hidden_states"])
        return (zeros, *[None] * (self.length - 1)) if self.length else zeros

    def attend(self, _module: nn.Module, *_: Any) -> None:
        """Not called."""
        return
