"""``mmd2``: squared maximum mean discrepancy of ragged groups and its derivative by a scale on the features."""

from typing import Any

import torch
from torch import Tensor

from fastedit.ops._library import check_floating, check_index, define, fail, serve_with_triton
from fastedit.reference import mmd2 as reference
from fastedit.reference._precision import accumulation_dtype


def _fake(
    x: Tensor, y: Tensor, x_offsets: Tensor, y_offsets: Tensor, bandwidths: Tensor, unbiased: bool
) -> tuple[Tensor, Tensor]:
    value = x.new_empty(x_offsets.shape[0] - 1, dtype=accumulation_dtype(x.dtype))
    return value, torch.empty_like(value)


def _fake_backward(
    grad_value: Tensor,
    grad_env: Tensor,
    x: Tensor,
    y: Tensor,
    x_offsets: Tensor,
    y_offsets: Tensor,
    bandwidths: Tensor,
    unbiased: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), y.new_empty(y.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.unbiased = inputs[5]


def _backward(ctx: Any, grad_value: Tensor, grad_env: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    grad_x, grad_y = torch.ops.fastedit.mmd2_backward.default(grad_value, grad_env, *saved, ctx.unbiased)
    return grad_x, grad_y, None, None, None, None


define(
    "mmd2",
    "(Tensor x, Tensor y, Tensor x_offsets, Tensor y_offsets, Tensor bandwidths, bool unbiased) -> (Tensor, Tensor)",
    reference.mmd2,
    _fake,
)
define(
    "mmd2_backward",
    "(Tensor grad_value, Tensor grad_env, Tensor x, Tensor y, Tensor x_offsets, Tensor y_offsets, Tensor bandwidths, "
    "bool unbiased) -> (Tensor, Tensor)",
    reference.mmd2_backward,
    _fake_backward,
)
serve_with_triton("mmd2", "mmd2")
serve_with_triton("mmd2_backward", "mmd2")
torch.library.register_autograd("fastedit::mmd2", _backward, setup_context=_save)


def mmd2(
    x: Tensor, y: Tensor, x_offsets: Tensor, y_offsets: Tensor, bandwidths: Tensor, unbiased: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the squared MMD of every group's x and y and its derivative by a scale w on the features at w = 1.

    ODEdit, equation (6), arXiv 2601.19700: M = E k(z, z') + E k(r, r') - 2 E k(z, r) with k(a, b) = sum_q
    exp(-||a - b||^2 / (2 sigma_q^2)). The paper prints expectations; ``unbiased=False`` takes all ordered pairs, those
    of a row with itself included, ``unbiased=True`` leaves these out. An unbiased sample of one row has no pairs: its
    within-term is dropped (the biased one would be the constant Q, so the gradients are those of the biased form). Both
    outputs are differentiable in x and y through closed forms; the backward is not differentiable again.

    Args:
        x: (N, d), float32 | bfloat16 | float16 | float64. Features, groups back to back. Sums are kept in float32
            (float64 for float64).
        y: (M, d), dtype of x.
        x_offsets: (G + 1,), int64. Group g is x[x_offsets[g]:x_offsets[g + 1]]; the last entry is N.
        y_offsets: (G + 1,), int64, the same for y.
        bandwidths: (Q,) or (G, Q), floating, positive: sigma_q, one set for all groups or one per group. A constant: a
            bandwidth computed from the features must be detached.
        unbiased: leave out the pairs of a row with itself.
    Returns:
        value (G,), env_grad (G,), float32 (float64 for float64). A group with no x or no y has 0 in both.
    Raises:
        ValueError: shapes, dtypes or devices disagree, bandwidths require a gradient, offsets do not cover the rows.
    """
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1]:
        fail("mmd2", "x is (N, d) and y is (M, d)", x=tuple(x.shape), y=tuple(y.shape))
    check_floating("mmd2", "x", x)
    if x.dtype != y.dtype or x.device != y.device:
        fail("mmd2", "x and y have the same dtype and device", x=f"{x.dtype} {x.device}", y=f"{y.dtype} {y.device}")
    if x_offsets.dim() != 1 or x_offsets.shape[0] < 1:
        fail("mmd2", "x_offsets is (G + 1,)", x_offsets=tuple(x_offsets.shape))
    check_index("mmd2", "x_offsets", x_offsets, x_offsets.shape[0], x.device)
    check_index("mmd2", "y_offsets", y_offsets, x_offsets.shape[0], x.device)
    check_floating("mmd2", "bandwidths", bandwidths)
    groups = x_offsets.shape[0] - 1
    if bandwidths.dim() not in (1, 2) or (bandwidths.dim() == 2 and bandwidths.shape[0] != groups):
        fail("mmd2", "bandwidths is (Q,) or (G, Q)", bandwidths=tuple(bandwidths.shape), G=groups)
    if bandwidths.device != x.device:
        fail("mmd2", "bandwidths is on the device of the features", bandwidths=bandwidths.device, features=x.device)
    if bandwidths.requires_grad:
        fail("mmd2", "bandwidths are constants: detach them", requires_grad=True)
    value, env_grad = torch.ops.fastedit.mmd2.default(x, y, x_offsets, y_offsets, bandwidths, unbiased)
    return value, env_grad
