"""Weights of 4-bit layers, written out for the length of a block: a fit reads the same ones at every step."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .cpu_linear import frozen_product
from .placement import calls_its_class
from .quantization import library

if TYPE_CHECKING:
    from .model import EditableModel


@contextmanager
def expanded_layers(model: EditableModel, first_layer: int) -> Iterator[int]:
    """Inside the block, 4-bit maps of the decoder layers from one on multiply by weights that are dequantized once.

    bitsandbytes dequantizes a weight at every forward and again at every backward. Values and gradients are those of
    the dequantized weights in the type that the maps multiply in; the stored weights are not touched. Modules, their
    hooks and an overridden ``forward`` stay as they are. 8-bit maps, which round their inputs too, are left alone, and
    so are maps that an outer block has expanded.

    Args:
        model: frozen; unquantized models pass through.
        first_layer: 0 to n_layers - 1.
    Yields:
        Bytes of the weights written out here.
    Raises:
        ValueError: no such layer.
    """
    if not 0 <= first_layer < model.n_layers:
        raise ValueError(f"expanded_layers: first_layer is 0 to {model.n_layers - 1} (got first_layer={first_layer})")
    if model.quantize != "nf4":
        yield 0
        return
    used: list[Any] = []
    total = 0
    try:
        for layer in list(model.adapter.text.layers)[first_layer:]:
            for module in layer.modules():
                if isinstance(module, library().nn.Linear4bit) and calls_its_class(module):
                    total += _expand(module, model)
                    used.append(module)
        yield total
    finally:
        for module in used:
            _contract(module)


#: Blocks, also of several threads, that use a map's expanded weight; the last one takes it away.
_LOCK = threading.Lock()


def _expand(module: Any, model: EditableModel) -> int:
    """One more block uses the expanded weight of a map; return the bytes that were written out for it."""
    with _LOCK:
        if type(module) is not library().nn.Linear4bit:
            module.expanded_users += 1
            return 0
        weight = _dequantized(module, model.dtype)
        module.expanded_weight, module.expanded_by, module.expanded_users = weight, model.linear, 1
        module.__class__ = _expanded_class()
        return weight.numel() * weight.element_size()


def _contract(module: Any) -> None:
    """One block less uses the expanded weight of a map."""
    with _LOCK:
        module.expanded_users -= 1
        if not module.expanded_users:
            module.__class__ = library().nn.Linear4bit
            del module.expanded_weight, module.expanded_by, module.expanded_users


@torch.no_grad()
def _dequantized(module: Any, dtype: torch.dtype) -> Tensor:
    """The weight (d_out, d_in) in the type that the module multiplies in."""
    state = module.weight.quant_state
    weight: Tensor = library().functional.dequantize_4bit(module.weight.data, state)
    return weight.to(module.compute_dtype or dtype)


@functools.cache
def _expanded_class() -> type[nn.Module]:
    """A 4-bit map that multiplies by its expanded weight. Made at use: its base comes from an optional package."""

    class Expanded4bit(library().nn.Linear4bit):  # type: ignore[misc]
        """`expanded_weight` (d_out, d_in); `expanded_by`, "torch" or "onednn", multiplies."""

        def forward(self, x: Tensor) -> Tensor:
            """Return x (..., d_in) times the weight: (..., d_out), in the type of x."""
            weight: Tensor | None = self.__dict__.get("expanded_weight")
            if weight is None:
                # Taken away by another thread since the call began
                result: Tensor = library().nn.Linear4bit.forward(self, x)
                return result
            bias = None if self.bias is None else self.bias.to(weight.dtype)
            return frozen_product(x.to(weight.dtype), weight, bias, self.expanded_by).to(x.dtype)

    return Expanded4bit
