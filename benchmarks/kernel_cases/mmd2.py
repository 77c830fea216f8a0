"""mmd2 with the penalty on env_grad, forward and backward: against eager double backward, and its matrix products.

Where pykeops is installed, the CPU's one large group is summed by KeOps too, autograd differentiating twice. Its first
call ever compiles for minutes; a call takes half a minute on two cores: pair by pair suits fewer features than 512.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_cases._grouped import assert_equal, rows
from benchmarks.kernel_cases._sized import Sized
from fastedit import ops
from fastedit.testing import mmd2_inputs


def _objective(value: Tensor, env_grad: Tensor) -> Tensor:
    # the discrepancies and the total-variation penalty of ODEdit, equation (9)
    return value.sum() + 0.1 * env_grad.square().sum()


def _kernel_means(a: Tensor, b: Tensor, sigma: Tensor) -> Tensor:
    """Means over pairs (...,) of the kernel, distances in matrix-product form."""
    product = a @ b.transpose(-1, -2)
    distance = a.square().sum(-1)[..., :, None] + b.square().sum(-1)[..., None, :] - 2.0 * product
    distance = distance.clamp(min=0.0)
    return torch.stack([torch.exp(distance / (-2.0 * s * s)) for s in sigma]).sum(0).mean((-1, -2))


def _keops_means(a: Tensor, b: Tensor, sigma: Tensor) -> Tensor:
    """Mean () over pairs of the kernel, summed by KeOps without a matrix; one distance for all bandwidths."""
    import pykeops
    from pykeops.torch import LazyTensor

    pykeops.set_verbose(False)
    distance = LazyTensor(a[:, None, :]).sqdist(LazyTensor(b[None, :, :]))
    kernel = (-distance * LazyTensor((0.5 / sigma.square())[None, None, :])).exp().sum(-1)
    return kernel.sum(1).sum() / (len(a) * len(b))


def _double_backward(
    x: Tensor, y: Tensor, sigma: Tensor, means: Callable[[Tensor, Tensor, Tensor], Tensor] = _kernel_means
) -> tuple[Tensor, Tensor]:
    """Value and env_grad of x (..., n, d) and y (..., m, d), a scale on the features."""
    scale = torch.ones(x.shape[:-2], device=x.device, requires_grad=True)
    x, y = scale[..., None, None] * x.float(), scale[..., None, None] * y.float()
    value = means(x, x, sigma) + means(y, y, sigma) - 2.0 * means(x, y, sigma)
    (env_grad,) = torch.autograd.grad(value.sum(), scale, create_graph=True)
    return value, env_grad


def _stacked_double_backward(x: Tensor, y: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """The same from one kernel matrix of all n + m rows, whose four blocks are averaged: the form most code has."""
    scale = torch.ones((), device=x.device, requires_grad=True)
    both = scale * torch.cat([x.float(), y.float()])
    norms = both.square().sum(-1)
    distance = (norms[:, None] + norms[None] - 2.0 * both @ both.T).clamp(min=0.0)
    kernel = torch.stack([torch.exp(distance / (-2.0 * s * s)) for s in sigma]).sum(0)
    n = len(x)
    value = kernel[:n, :n].mean() + kernel[n:, n:].mean() - kernel[:n, n:].mean() - kernel[n:, :n].mean()
    (env_grad,) = torch.autograd.grad(value, scale, create_graph=True)
    return value, env_grad


def make_case(
    name: str, groups: int, n: int, d: int, dtype: torch.dtype = torch.float32, device: str | None = None
) -> dict[str, Any]:
    """Return the case of groups of n + n rows, five bandwidths."""
    # over thousands of rows the baseline's own sums lose a digit
    tolerance = 2e-2 if dtype != torch.float32 else 1e-4 if device is None else 1e-3

    @cache
    def inputs() -> tuple[Tensor, ...]:
        x, y, x_offsets, y_offsets, sigma = mmd2_inputs((n,) * groups, (n,) * groups, d, dtype, device=device or "cpu")
        return x.requires_grad_(), y.requires_grad_(), x_offsets, y_offsets, sigma

    def finish(value: Tensor, env_grad: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(_objective(value, env_grad), inputs()[:2])

    def run() -> tuple[Tensor, ...]:
        return finish(*ops.mmd2(*inputs()))

    def loop() -> tuple[Tensor, ...]:
        x, y, x_offsets, y_offsets, sigma = inputs()
        pairs = zip(rows(x_offsets), rows(y_offsets), strict=True)
        parts = [_double_backward(x[a], y[b], sigma) for a, b in pairs]
        return finish(torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts]))

    def batched() -> tuple[Tensor, ...]:
        x, y, *_, sigma = inputs()
        return finish(*_double_backward(x.view(groups, n, d), y.view(groups, n, d), sigma))

    def stacked() -> tuple[Tensor, ...]:
        x, y, *_, sigma = inputs()
        return finish(*_stacked_double_backward(x, y, sigma))

    def keops() -> tuple[Tensor, ...]:
        x, y, *_, sigma = inputs()
        return finish(*_double_backward(x, y, sigma, _keops_means))

    def matrix_products(kind: torch.dtype = dtype) -> tuple[Tensor, ...]:
        # three Gram matrices for the forward, three for the backward, and all pairs' weights onto the features
        x, y = (t.detach().to(kind).view(groups, n, d) for t in inputs()[:2])
        stack = torch.cat([x, y], 1)
        grams = [a @ b.transpose(1, 2) for a, b in ((x, x), (y, y), (x, y)) * 2]
        weights = torch.cat([torch.cat([grams[0], grams[2]], 2), torch.cat([grams[2], grams[1]], 2)], 1)
        return (weights @ stack,)

    def check() -> None:
        assert_equal(run(), batched(), tolerance=tolerance)
        if groups == 1:
            assert_equal(stacked(), batched(), tolerance=tolerance)

    one: dict[str, Any] = {"double_backward": loop, "stacked_double_backward": stacked}
    if device is None and importlib.util.find_spec("pykeops") is not None:
        one["keops"] = keops
    if device is not None and dtype == torch.float32:
        one["matrix_products_bf16"] = partial(matrix_products, torch.bfloat16)
    many = {"loop": loop, "padded": batched}
    return {
        "name": name,
        "shapes": {"groups": groups, "n": n, "m": n, "d": d, "bandwidths": 5},
        "dtype": str(dtype).removeprefix("torch."),
        # Gram matrices once, those within a sample by half; then all pairs' weights onto the features
        # features and their gradients once
        "bytes": 4 * groups * n * d * dtype.itemsize,
        "flops": groups * 12 * n * n * d,
        "run": run,
        "baselines": {**(one if groups == 1 else many), "matrix_products": matrix_products},
        "check": check,
    }


CASES = [
    make_case("mmd2", 1, 1024, 512),
    make_case("mmd2_small_groups", 512, 8, 512),
]
CUDA_CASES = [
    Sized(make_case, "mmd2", {"n": 4096, "d": 4096}, {"groups": 1}),
    Sized(make_case, "mmd2_bf16", {"n": 4096, "d": 4096}, {"groups": 1, "dtype": torch.bfloat16}),
    Sized(make_case, "mmd2_small_groups", {"groups": 512, "d": 4096}, {"n": 8}),
]
