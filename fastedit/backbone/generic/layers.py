"""What a decoder layer is made of: its mixer, what reads the residual stream behind it, its linear maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .context import Forward, walking
from .decoder import Decoder, Enough, LayerTrace, hooked
from .sites import LayerProbe, find_sites

#: Largest difference, relative to the largest number, where one computation is done in two ways.
EXACT = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class Alone:
    """A walk of one row through some layers in the stock way, which sees what they are given."""

    makes_masks = True

    def __init__(self, decoder: Decoder, layers: Sequence[int]) -> None:
        self.decoder, self.layers = decoder, frozenset(layers)
        self.calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.outputs: dict[int, Any] = {}
        #: What the attention function was given last, and by whom.
        self.given: list[Tensor] = []
        self.callers: list[nn.Module] = []
        #: The decoder's final hidden states.
        self.final: Tensor | None = None

    def root(self, stock: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the decoder; keep what it puts out."""
        output = stock(*args, **kwargs)
        self.final = output[0] if isinstance(output, tuple) else output.last_hidden_state
        return output

    def layer(self, index: int, stock: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a layer, or skip it."""
        if index not in self.layers:
            return self.decoder.returned(index, args[0] if args else kwargs["hidden_states"])
        self.calls[index] = (args, dict(kwargs))
        self.outputs[index] = output = stock(*args, **kwargs)
        return output

    def part(self, _role: str, _index: int, stock: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a part."""
        return stock(*args, **kwargs)

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> None:
        """Keep what attention is given; the stock function follows."""
        self.callers.append(module)
        if not self.decoder.encoded or module is self.callers[0]:
            # Not what a layer reads of an encoder, which follows
            self.given[:] = [query, key, value]
        return


def look(decoder: Decoder, alone: Alone, index: int) -> LayerTrace:
    """What one layer is made of."""
    layer: Any = decoder.layers[index]
    args, kwargs = alone.calls[index]
    hidden = args[0] if args else kwargs["hidden_states"]
    trace = LayerTrace(length=tuple_length(alone.outputs[index]))
    stock = layer.forward

    def call(state: Tensor = hidden) -> Tensor:
        given, named = ((state, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": state})
        output = stock(*given, **named)
        first: Tensor = output[0] if isinstance(output, tuple) else output
        return first

    spy = Alone(decoder, [index])
    with walking(spy):
        output = call()
        callers = list(dict.fromkeys(spy.callers))
        if len(callers) > 1 + decoder.encoded:
            names = ", ".join(type(module).__name__ for module in callers)
            raise ValueError(f"load: a decoder layer must have one attention module (got {names} in layer {index})")
        paths = {id(part): path for path, part in layer.named_modules()}
        if callers:
            trace.mixer, trace.reader = (*[paths[id(each)] for each in callers], "")[:2]
            # Of a layer that reads images, none for a token
            query, key, value = spy.given
            if key.shape[2] == query.shape[2]:
                trace.stored = sum(part.shape[1] * part.shape[3] for part in (key, value))
        else:
            trace.mixer, trace.padded = _mixing_child(layer, call, hidden), True
        trace.mixer_length = _length(layer, trace.mixer, call)
        trace.entry = _entry(layer, trace, call, output)
        probe = LayerProbe(layer, trace.mixer, call, hidden.shape[-2], spy.given)
        trace.sites = find_sites(probe, trace, int(decoder.config.hidden_size))
        trace.parallel = _is_parallel(layer, trace, call)
    return trace


def _mixing_child(layer: nn.Module, call: Any, hidden: Tensor) -> str:
    """The first child of a layer whose outputs at later tokens depend on the first one."""
    changed = hidden.clone()
    changed[..., 0, :] += 1
    seen: list[dict[str, tuple[Tensor, Tensor]]] = []
    for state in (hidden, changed):
        parts: dict[str, tuple[Tensor, Tensor]] = {}

        def hook(path: str, parts: dict[str, tuple[Tensor, Tensor]] = parts) -> Any:
            def keep(_m: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                given = args[0] if args else next(iter(kwargs.values()))
                parts.setdefault(path, (given, output[0] if isinstance(output, tuple) else output))

            return keep

        with hooked(
            [part.register_forward_hook(hook(path), with_kwargs=True) for path, part in layer.named_children()]
        ):
            call(state)
        seen.append(parts)
    for path, (_, before) in seen[0].items():
        after = seen[1][path][1]
        if not torch.equal(before[..., 1:, :], after[..., 1:, :]):
            return path
    raise ValueError(f"load: a decoder layer must mix tokens (got {type(layer).__name__})")


def _length(layer: nn.Module, path: str, call: Any) -> int:
    """Entries of the tuple that a mixer returns, 0 for a tensor."""
    lengths: list[int] = []

    def keep(_m: nn.Module, _a: Any, output: Any) -> None:
        lengths.append(tuple_length(output))
        raise Enough

    with hooked([layer.get_submodule(path).register_forward_hook(keep)]):
        call()
    return lengths[0]


def _zeroed(layer: nn.Module, trace: LayerTrace) -> Any:
    """Hooks that let the mixer, and what reads an encoder's states, put out zeros."""

    def zero(_m: nn.Module, _a: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (torch.zeros_like(output[0]), *output[1:])
        return torch.zeros_like(output)

    parts = [layer.get_submodule(path) for path in (trace.mixer, trace.reader) if path]
    return [part.register_forward_hook(zero) for part in parts]


def _entry(layer: nn.Module, trace: LayerTrace, call: Any, output: Tensor) -> str:
    """The child whose input, given to the layer with a mixer that puts out nothing, leads to the same output."""
    seen: dict[str, Tensor] = {}
    mixed: list[bool] = []

    def keep(path: str) -> Any:
        def hook(_m: nn.Module, args: Any, kwargs: Any) -> None:
            given = args[0] if args else next(iter(kwargs.values()), None)
            # Some layers flatten rows (OPT)
            if mixed and isinstance(given, Tensor) and given.numel() == output.numel():
                seen.setdefault(path, given.view(output.shape))

        return hook

    children = [(path, part) for path, part in _children(layer) if path != trace.mixer]
    handles = [part.register_forward_pre_hook(keep(path), with_kwargs=True) for path, part in children]
    handles.append(layer.get_submodule(trace.mixer).register_forward_hook(lambda *_: mixed.append(True)))
    with hooked(handles):
        call()
    for path, given in seen.items():
        with hooked(_zeroed(layer, trace)):
            again = call(given)
        scale = output.abs().max().clamp(min=1e-6)
        if bool((again - output).abs().max() <= EXACT.get(output.dtype, 1e-6) * scale):
            return path
    return ""


def _children(layer: nn.Module) -> list[tuple[str, nn.Module]]:
    """Children of a layer by path; where they are all in one list, those in it."""
    children = list(layer.named_children())
    if len(children) == 1 and isinstance(children[0][1], nn.ModuleList):
        path, inner = children[0]
        return [(f"{path}.{name}", part) for name, part in inner.named_children()]
    return children


def tuple_length(output: Any) -> int:
    """Entries of what a module returns, 0 of a tensor."""
    return len(output) if isinstance(output, tuple) else 0


def _is_parallel(layer: nn.Module, trace: LayerTrace, call: Any) -> bool:
    """Whether what the feed-forward block reads does not depend on the mixer."""
    sites = trace.sites or {}
    reader = next((sites[name] for name in ("up", "gate_up", "block") if name in sites), None)
    if reader is None:
        return False
    read: list[Tensor] = []

    def keep(_m: nn.Module, args: tuple[Tensor, ...]) -> None:
        read.append(args[0].clone())
        raise Enough

    with hooked([layer.get_submodule(reader).register_forward_pre_hook(keep)]):
        call()
    with hooked([layer.get_submodule(reader).register_forward_pre_hook(keep), *_zeroed(layer, trace)]):
        call()
    return torch.equal(read[0], read[1])
