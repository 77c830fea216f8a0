"""Where the parts of a model are: on one device, over several, or elsewhere until they run, in accelerate's keeping.

accelerate puts a hook behind the ``forward`` of every module that it places: it brings inputs to the module's device
and, where weights are in host memory or on disk, reads them for that one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn


def device_of(*modules: nn.Module) -> torch.device:
    """Return where a module computes: the device that its hook names, else that of its first weight.

    Args:
        modules: the one that is asked for, then others that are asked where it has neither hook nor weights.
    """
    for module in modules:
        hooks = _hooks(module)
        if hooks and hooks[-1].execution_device is not None:
            return torch.device(hooks[-1].execution_device)
        for name, part in module.named_parameters():
            if not part.is_meta:
                return part.device
            owner = module.get_submodule(name.rpartition(".")[0])
            inner = _hooks(owner)
            return torch.device(inner[-1].execution_device) if inner else part.device
    return torch.device("cpu")


def is_offloaded(hf: nn.Module) -> bool:
    """Whether weights of a model are in host memory or on disk and read for each call of their module."""
    return any(hook.offload for module in hf.modules() for hook in _hooks(module))


def layer_devices(layers: nn.ModuleList) -> tuple[torch.device, ...] | None:
    """Return the device of every decoder layer; None where all are on one, so that nothing is moved between them."""
    devices = tuple(device_of(layer) for layer in layers)
    return devices if len(set(devices)) > 1 else None


def places_of(hf: nn.Module) -> list[str]:
    """Return the names of where weights of a model are: devices, "cpu" and "disk"."""
    places = {str(part.device) for part in hf.parameters() if not part.is_meta}
    if any(part.is_meta for part in hf.parameters()):
        hosted = bool(host_weights(hf))
        maps = [each for module in hf.modules() for hook in _hooks(module) for each in _maps(hook)]
        places |= {"cpu"} if hosted else set()
        places |= {"disk"} if any(getattr(each, "index", None) for each in maps) else set()
    return sorted(places, key=lambda place: (place == "disk", place == "cpu", place))


def stored_weights(hf: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the entries of a state dict in the order of their names, offloaded ones read one at a time."""
    state = hf.state_dict()
    for name in sorted(state):
        value = state[name]
        yield name, kept_weight(hf, name) if isinstance(value, Tensor) and value.is_meta else value


def kept_weight(hf: nn.Module, name: str) -> Tensor:
    """Return a weight that is offloaded, by its name in the model.

    Raises:
        ValueError: nobody keeps it.
    """
    path, _, leaf = name.rpartition(".")
    for hook in _hooks(hf.get_submodule(path)):
        if hook.offload and hook.weights_map is not None:
            # Not asked whether it is there, which reads it too
            with suppress(KeyError):
                value: Tensor = hook.weights_map[leaf]
                return value
    raise ValueError(f"a model must have all its weights (got {name} on the meta device, which nothing reads)")


def is_kept(hf: nn.Module, name: str) -> bool:
    """Whether a weight on the meta device is read when its module runs."""
    return any(hook.offload for hook in _hooks(hf.get_submodule(name.rpartition(".")[0])))


def host_weights(hf: nn.Module) -> list[Tensor]:
    """Return the weights that are kept in host memory until their modules run."""
    found: dict[int, Tensor] = {}
    maps = {id(each): each for module in hf.modules() for hook in _hooks(module) for each in _maps(hook)}
    for each in maps.values():
        held: Mapping[str, Tensor] = getattr(each, "state_dict", each if isinstance(each, dict) else {})
        found |= {id(value): value for value in held.values()}
    return list(found.values())


def bare(module: nn.Module, x: Tensor) -> Tensor:
    """Return a linear map of x (T, d_in), (T, d_out), without what is hooked to it or held of it."""
    kind: Any = type(module)
    if not _hooks(module):
        output: Tensor = kind.forward(module, x)
        return output
    hook: Any = module._hf_hook
    (moved,), _ = hook.pre_forward(module, x)
    there: Tensor = hook.post_forward(module, kind.forward(module, moved))
    return there.to(x.device)


def returning(module: Any) -> Callable[[Tensor], Tensor]:
    """Return a module as a function whose output is where its input was."""

    def called(x: Tensor) -> Tensor:
        output: Tensor = module(x)
        return output.to(x.device)

    return called


def look_up_late(hf: nn.Module) -> None:
    """Let hooks call the ``forward`` of a module's class as it is then, which who multiplies may have changed."""
    for module in hf.modules():
        if "_old_forward" in module.__dict__ and getattr(module._old_forward, "__self__", None) is module:
            module._old_forward = _Late(module)


def calls_its_class(module: nn.Module) -> bool:
    """Whether a module runs what its class says now, and its weights are there."""
    stock = module.__dict__.get("_old_forward")
    weights_there = not any(part.is_meta for part in module.parameters(recurse=False))
    return weights_there and (stock is None or isinstance(stock, _Late))


class _Late:
    """The forward of a module's class."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        return type(self.module).forward(self.module, *args, **kwargs)


def _maps(hook: Any) -> list[Any]:
    """What a hook reads weights from, without the view of one module."""
    known = getattr(hook, "weights_map", None)
    return [] if known is None else [getattr(known, "dataset", known)]


def _hooks(module: nn.Module) -> list[Any]:
    """The hooks of a module that know devices; several where accelerate has put them one behind the other."""
    hook = module.__dict__.get("_hf_hook")
    every = getattr(hook, "hooks", (hook,))
    return [each for each in every if hasattr(each, "execution_device")]
