"""Matrix products of frozen weights on the CPU, by the faster of torch's two libraries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastedit import _native

from .patches import PatchProduct

LINEAR: tuple[str, ...] = ("auto", "torch", "onednn")

# Below so many rows the weights are read once either way, and oneDNN's set-up shows.
_FEW_ROWS = 8
# Numbers of a weight that are multiplied at once: 128 MiB
_LARGEST = 1 << 25


def choose_linear(wanted: str, dtype: torch.dtype, device: torch.device) -> str:
    """Return "torch" or "onednn", whose products serve a model's frozen linear maps.

    torch multiplies float32 matrices by MKL, which runs AVX2 code on processors that are not Intel's, AVX-512 or not;
    oneDNN, which torch carries as well, takes the full width: 2.3 times the rate on an AMD EPYC of 2024. The sums are
    rounded in another order. Everywhere else torch's own choice is kept.

    Args:
        wanted: "auto", "torch" or "onednn".
        dtype, device: of the model.
    Raises:
        ValueError: "onednn" where it cannot serve.
    """
    can = (
        device.type == "cpu"
        and dtype == torch.float32
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
    if wanted == "onednn" and not can:
        raise ValueError(
            "load: linear='onednn' needs float32 on a CPU and a torch built with oneDNN "
            f"(got dtype={str(dtype).removeprefix('torch.')}, device={device})"
        )
    slow = torch.backends.cpu.get_cpu_capability() == "AVX512" and _native.processor_vendor() not in ("intel", "")
    return "onednn" if wanted == "onednn" or (wanted == "auto" and can and slow) else "torch"


class OneDnnLinear(nn.Linear):
    """A linear map multiplied by oneDNN while its weights are frozen."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x (..., d_in) times the weights: (..., d_out)."""
        if self.weight.requires_grad:
            return super().forward(x)
        return frozen_product(x, self.weight, self.bias, "onednn")


def frozen_product(x: Tensor, weight: Tensor, bias: Tensor | None, by: str) -> Tensor:
    """Return x (..., i) times a constant weight (o, i), plus a constant bias: by "torch", or "onednn" where it can.

    Under ``torch.autocast`` torch multiplies, which casts both, however many rows there are.
    """
    few = x.numel() < _FEW_ROWS * weight.shape[1]
    cast = torch.is_autocast_enabled(x.device.type)
    if by == "torch" or few or cast or x.dtype != torch.float32 or weight.dtype != torch.float32:
        return nn.functional.linear(x, weight, bias)
    return onednn_product(x, weight, bias)


def onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x (..., i) times weight (o, i), of any strides, plus bias (o,): float32 on the CPU.

    Weight and bias are constants: a gradient goes to x alone.
    """
    product: Tensor
    if torch.is_grad_enabled() and x.requires_grad:
        product = _Product.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    else:
        product = _in_parts(x, weight, bias)
    return product


def _multiply(*arguments: Any) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(*arguments)
    return product


def _in_parts(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product without gradient. oneDNN lays weights out anew at every call: of a large one a part at a time."""
    if weight.numel() <= _LARGEST:
        product: Tensor = _multiply(x, weight, bias, "none", [], "")
        return product
    outward, inward = weight.shape
    if outward >= inward:
        size = max(1, _LARGEST // inward)
        biases = [None] * len(range(0, outward, size)) if bias is None else torch.split(bias, size)
        parts = zip(torch.split(weight, size), biases, strict=True)
        return torch.cat([_multiply(x, part, part_bias, "none", [], "") for part, part_bias in parts], dim=-1)
    size = max(1, _LARGEST // outward)
    product = _multiply(x[..., :size].contiguous(), weight[:, :size], bias, "none", [], "")
    for start in range(size, inward, size):
        inner = x[..., start : start + size].contiguous()
        product += _multiply(inner, weight[:, start : start + size], None, "none", [], "")
    return product


class _Product(torch.autograd.Function):
    """The product; torch's op has no derivative of its own and would pass for a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return onednn_product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return onednn_product(grad.contiguous(), weight.T), None, None


def use_onednn(root: nn.Module) -> int:
    """Let oneDNN multiply all plain linear maps under a module; return how many."""
    plain = [module for module in root.modules() if type(module) is nn.Linear]
    for module in plain:
        module.__class__ = OneDnnLinear
    return len(plain)


@contextmanager
def torch_products(root: nn.Module) -> Iterator[None]:
    """Inside the block torch multiplies and convolves under a module, as in the stock model."""
    stock: dict[type[nn.Module], type[nn.Module]] = {OneDnnLinear: nn.Linear, PatchProduct: nn.Conv3d}
    changed = [(module, type(module)) for module in root.modules() if type(module) in stock]
    for module, kind in changed:
        module.__class__ = stock[kind]
    try:
        yield
    finally:
        for module, kind in changed:
            module.__class__ = kind
