"""Several devices on a machine that has one: tensors claim to be elsewhere, and an operation over two places fails.

Values are computed on the CPU. What a GPU would refuse is refused: tensors of two devices in one operation. Numbers
that autograd makes, and results of operations that cannot be watched, claim nothing and go anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
#: A kind of device for which no code of its own runs.
FIRST, SECOND = torch.device("xpu:0"), torch.device("xpu:1")


def claim(tensor: Tensor, device: torch.device) -> Tensor:
    tensor._claimed = device  # type: ignore[attr-defined]
    return tensor


def claimed(tensor: Tensor) -> torch.device | None:
    return getattr(tensor, "_claimed", None)


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_in(part)


class ClaimedDevices(TorchFunctionMode):
    """Inside the block devices are what tensors claim."""

    def __init__(self) -> None:
        super().__init__()
        self.moves = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if getattr(func, "__self__", None) is Tensor.device:
            return claimed(args[0]) or CPU
        if name in ("to", "cpu"):
            return self._moved(args[0], CPU if name == "cpu" else None, args[1:], kwargs)
        device = kwargs.pop("device", None)
        parts = list(tensors_in([args, kwargs]))
        places = {claimed(part) for part in parts if part.dim()} - {None}
        # A number goes along with tensors of any device; where there are numbers alone the result is with them
        numbers = {claimed(part) for part in parts} - {None}
        if name == "copy_":
            # The one operation that goes from device to device
            return func(*args, **kwargs)
        if len(places) > 1 and name != "backward":
            raise RuntimeError(f"{name}: all tensors must be on the same device (got {sorted(map(str, places))})")
        place = torch.device(device) if device is not None else next(iter(places or numbers), None)
        output = func(*args, **kwargs)
        for part in tensors_in(output):
            if place is not None:
                claim(part, place)
            elif not parts:
                # Made here, and not of what autograd made
                claim(part, CPU)
        return output

    def _moved(self, tensor: Tensor, device: Any, args: Any, kwargs: Any) -> Tensor:
        if args and isinstance(args[0], Tensor):
            device, dtype = claimed(args[0]) or CPU, args[0].dtype
        elif device is None:
            device, dtype, _, _ = torch._C._nn._parse_to(*args, **{n: v for n, v in kwargs.items() if n != "copy"})
        else:
            dtype = None
        before = claimed(tensor)
        place = before if device is None else device
        output = tensor.to(dtype) if dtype is not None else tensor
        if output is tensor and (place != before or kwargs.get("copy")):
            output = tensor.clone()
        self.moves += place != before
        return output if place is None else claim(output, place)


def place(root: nn.Module, places: Mapping[str, torch.device]) -> None:
    """Put a hook behind every module with weights, as accelerate does; a path holds for what is below it."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    class Placing(AlignDevicesHook):  # type: ignore[misc]
        """The hook for weights that claim to be where they belong."""

        def init_hook(self, module: nn.Module) -> nn.Module:
            for _, part in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                claim(part, self.execution_device)
            return module

    for path, module in root.named_modules():
        known = path
        while known not in places:
            known = known.rpartition(".")[0]
        if module.state_dict() or any(True for _ in module.buffers()):
            add_hook_to_module(module, Placing(places[known], io_same_device=path == ""))
