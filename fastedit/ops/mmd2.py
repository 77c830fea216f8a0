"""``mmd2``: squared maximum mean discrepancy of ragged groups and its derivative by a scale on the features."""

from typing import Any

import torch
from torch import Tensor

from fastedit.ops._library import call, define, differentiate, serve_with_triton
from fastedit.reference import mmd2 as reference
from fastedit.reference._checks import fail
from fastedit.reference._precision import accumulation_dtype
from fastedit.reference.arguments import check_mmd2, check_mmd2_upstream


def _fake(
    x: Tensor, y: Tensor, x_offsets: Tensor, y_offsets: Tensor, bandwidths: Tensor, unbiased: bool
) -> tuple[Tensor, Tensor]:
    check_mmd2(x, y, x_offsets, y_offsets, bandwidths)
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
    check_mmd2(x, y, x_offsets, y_offsets, bandwidths)
    check_mmd2_upstream(grad_value, grad_env, x, x_offsets)
    return x.new_empty(x.shape), y.new_empty(y.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.unbiased = inputs[5]


def _backward(ctx: Any, grad_value: Tensor, grad_env: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    grad_x, grad_y = call("mmd2_backward", grad_value, grad_env, *saved, ctx.unbiased)
    return grad_x, grad_y, None, None, None, None


define(
    "mmd2",
    "(Tensor x, Tensor y, Tensor x_offsets, Tensor y_offsets, Tensor bandwidths, bool unbiased) -> (Tensor, Tensor)",
    reference.mmd2,
    _fake,
    "widest",
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
differentiate("mmd2", _save, _backward)


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
    if bandwidths.requires_grad:
        fail("mmd2", "bandwidths are constants: detach them", requires_grad=True)
    value, env_grad = call("mmd2", x, y, x_offsets, y_offsets, bandwidths, unbiased)
    return value, env_grad
