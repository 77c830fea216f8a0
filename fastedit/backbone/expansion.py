"""Weights of 4-bit layers, written out for the length of a block: a fit reads the same ones at every step."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .products import frozen_product
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
    plain = library().nn.Linear4bit
    changed: list[Any] = []
    total = 0
    try:
        for layer in list(model.adapter.text.layers)[first_layer:]:
            module: Any
            for module in layer.modules():
                if type(module) is not plain:
                    continue
                weight = _dequantized(module, model.dtype)
                changed.append(module)
                module.expanded_weight, module.expanded_by = weight, model.linear
                module.__class__ = _expanded_class()
                total += weight.numel() * weight.element_size()
        yield total
    finally:
        for module in changed:
            module.__class__ = plain
            del module.expanded_weight, module.expanded_by


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
            weight: Tensor = self.expanded_weight
            bias = None if self.bias is None else self.bias.to(weight.dtype)
            return frozen_product(x.to(weight.dtype), weight, bias, self.expanded_by).to(x.dtype)

    return Expanded4bit
