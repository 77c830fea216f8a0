"""The stock text decoder inside of a multimodal model, and what tracing it once tells about its layers."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..placement import device_of
from .attention import put_back, use_packed
from .context import Forward, Instruments
from .cross import cross_layers, reads_encoder

#: What a decoder has beside its layers.
_PARTS = ("embed_tokens", "config")
#: Decoders that are walked now, by id: several who walk one share what its modules ask.
_WALKED: dict[int, Instruments] = {}
_LOCK = threading.RLock()


@dataclass
class LayerTrace:
    """What was seen of one decoder layer.

    Args:
        length: of the tuple that it returns, hidden states first; 0 where it returns a tensor.
        mixer: path of the module that mixes tokens, inside of the layer. mixer_length: of the tuple that it returns;
            0 where it returns a tensor.
        reader: path of the module that reads what an encoder puts out, or "".
        entry: path of the module that reads the residual stream after both, or "" where there is none such that
            nothing else is read.
        padded: whether the mixer is called on padded rows: it mixes tokens by other means than attention.
        parallel: whether the feed-forward block does not read what the mixer puts out.
        sites: paths of linear maps by name.
        stored: numbers that attention keeps of a token.
    """

    length: int = 0
    mixer: str = ""
    mixer_length: int = 0
    reader: str = ""
    entry: str = ""
    padded: bool = False
    parallel: bool = False
    sites: dict[str, str] | None = None
    stored: int = 0


class Decoder:
    """The decoder of a loaded model.

    Args:
        hf: the model, frozen.
    Raises:
        ValueError: no decoder that can be walked.
    """

    def __init__(self, hf: Any) -> None:
        self.hf = hf
        root: Any = find_decoder(hf)
        self.root = root
        self.config: Any = root.config
        layers: Any = layers_of(root)
        self.layers = layers
        #: Whether each layer reads what an encoder makes of the prompt, and the first makes a position bias for all.
        self.encoded = reads_encoder(self.config)
        #: Layers that read images by cross-attention.
        self.cross = cross_layers(self.config)
        self.traces = [LayerTrace() for _ in self.layers]
        self.signature = inspect.signature(self.root.forward)
        self.layer_signatures = [inspect.signature(layer.forward) for layer in self.layers]

    @functools.cached_property
    def windows(self) -> tuple[int | None, ...]:
        """By layer, how far back it sees, where its configuration says so."""
        return tuple(self._window(index) for index in range(self.n_layers))

    def _window(self, index: int) -> int | None:
        kinds = getattr(self.config, "layer_types", None)
        window = getattr(self.config, "sliding_window", None)
        if kinds is not None and kinds[index] in ("full_attention", "sliding_attention"):
            return window if kinds[index] == "sliding_attention" and isinstance(window, int) else None
        for module in self.layers[index].modules():
            if hasattr(module, "sliding_window"):
                return module.sliding_window if isinstance(module.sliding_window, int) else None
        return window if isinstance(window, int) else None

    @contextmanager
    def instrumented(self) -> Iterator[None]:
        """Inside the block the decoder's parts ask the walk of their context; the last to leave takes that back."""
        with _LOCK:
            instruments = _WALKED.setdefault(id(self.root), Instruments())
            instruments.users += 1
            if instruments.users == 1:
                use_packed(self.root)
                instruments.root(self.root)
                for index, layer in enumerate(self.layers):
                    instruments.layer(layer, index)
            self.instrument_parts()
        try:
            yield
        finally:
            with _LOCK:
                instruments.users -= 1
                if not instruments.users:
                    instruments.remove()
                    put_back(self.root)
                    del _WALKED[id(self.root)]

    def instrument_parts(self) -> None:
        """Let the mixers and entries that were traced ask the walk, inside of `instrumented`."""
        instruments = _WALKED[id(self.root)]
        for index, trace in enumerate(self.traces):
            sites = trace.sites or {}
            token = [] if trace.padded else [("token", sites.get(name, "")) for name in ("q", "o")]
            parts = ("mixer", trace.mixer), ("reader", trace.reader), ("entry", trace.entry)
            for role, path in (*parts, *token):
                if path:
                    instruments.part(self.layers[index].get_submodule(path), role, index)

    def arguments(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a layer's call by name."""
        return bound(self.layer_signatures[index], args, kwargs)

    def returned(self, index: int, hidden: Tensor) -> Any:
        """Hidden states in the form that a layer returns them in."""
        length = self.traces[index].length
        return (hidden, *[None] * (length - 1)) if length else hidden

    @property
    def device(self) -> torch.device:
        """Where the last layer is: states of rows are handed around there."""
        return device_of(self.layers[-1])

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)


def bound(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, those of a keyword dictionary among them."""
    arguments = dict(signature.bind_partial(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD and name in arguments:
            arguments |= arguments.pop(name)
    return arguments


def find_decoder(hf: Any) -> nn.Module:
    """The module that owns the longest list of decoder layers beside an embedding table.

    Raises:
        ValueError: there is none.
    """
    best: Any = None
    for module in hf.modules():
        layers = layers_of(module)
        if layers is None or not all(hasattr(module, name) for name in _PARTS):
            continue
        if best is None or len(layers) > len(layers_of(best) or ()):
            best = module
    if best is None:
        kind = getattr(hf.config, "model_type", type(hf).__name__)
        raise ValueError(
            "load: a model's decoder must have its layers in 'layers' beside its word embeddings in 'embed_tokens' "
            f"(got model_type={kind!r}, {type(hf).__name__})"
        )
    found: nn.Module = best
    return found


def layers_of(module: nn.Module) -> nn.ModuleList | None:
    """The list of layers of a decoder, which T5's has in 'block'; None of a module that is no decoder."""
    layers = getattr(module, "layers", None)
    if layers is None and getattr(module, "is_decoder", False):
        layers = getattr(module, "block", None)
    return layers if isinstance(layers, nn.ModuleList) else None


class Enough(Exception):
    """Raised by a hook that has seen what it was there for: the rest of a layer need not run."""


@contextmanager
def hooked(handles: list[Any]) -> Iterator[None]:
    """Inside the block some hooks are there; the block ends where one of them has seen `Enough`."""
    try:
        yield
    except Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()


__all__ = ["Decoder", "Enough", "Forward", "LayerTrace", "bound", "find_decoder", "hooked", "layers_of"]
