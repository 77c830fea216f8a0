"""``mmd2``: squared maximum mean discrepancy of ragged groups and its derivative by a scale on the features."""

from typing import Any

import torch
from torch import Tensor

from fastedit.ops._library import call, compiled, define, differentiate, serve_with_triton
from fastedit.reference import mmd2 as reference
from fastedit.reference import mmd2_kept as kept
from fastedit.reference._checks import fail
from fastedit.reference._precision import accumulation_dtype
from fastedit.reference.arguments import check_mmd2, check_mmd2_kept, check_mmd2_pairs, check_mmd2_upstream

# Rows of one group whose pairs the forward keeps for the backward, where the compiled library serves the CPU: at most
# 64 MiB of float32. Few are faster without; more are computed again.
KEPT_LEAST, KEPT_MOST = 128, 4096


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


def _fake_kept(
    x: Tensor, y: Tensor, x_offsets: Tensor, y_offsets: Tensor, bandwidths: Tensor, unbiased: bool
) -> tuple[Tensor, Tensor, Tensor]:
    check_mmd2_kept(x, y, x_offsets, y_offsets, bandwidths)
    value, env_grad = _fake(x, y, x_offsets, y_offsets, bandwidths, unbiased)
    rows = x.shape[0] + y.shape[0]
    return value, env_grad, value.new_empty((rows, rows))


def _fake_kept_backward(
    grad_value: Tensor,
    grad_env: Tensor,
    x: Tensor,
    y: Tensor,
    x_offsets: Tensor,
    y_offsets: Tensor,
    bandwidths: Tensor,
    pairs: Tensor,
    unbiased: bool,
) -> tuple[Tensor, Tensor]:
    check_mmd2_kept(x, y, x_offsets, y_offsets, bandwidths)
    check_mmd2_upstream(grad_value, grad_env, x, x_offsets)
    check_mmd2_pairs(pairs, x, y)
    return x.new_empty(x.shape), y.new_empty(y.shape)


def _save_kept(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5], output[2])
    ctx.unbiased = inputs[5]
    ctx.mark_non_differentiable(output[2])


def _backward_kept(ctx: Any, grad_value: Tensor, grad_env: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    grad_x, grad_y = call("mmd2_kept_backward", grad_value, grad_env, *saved, ctx.unbiased)
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
define(
    "mmd2_kept",
    "(Tensor x, Tensor y, Tensor x_offsets, Tensor y_offsets, Tensor bandwidths, bool unbiased) "
    "-> (Tensor, Tensor, Tensor)",
    kept.mmd2_kept,
    _fake_kept,
    "widest",
)
define(
    "mmd2_kept_backward",
    "(Tensor grad_value, Tensor grad_env, Tensor x, Tensor y, Tensor x_offsets, Tensor y_offsets, Tensor bandwidths, "
    "Tensor pairs, bool unbiased) -> (Tensor, Tensor)",
    kept.mmd2_kept_backward,
    _fake_kept_backward,
)
differentiate("mmd2_kept", _save_kept, _backward_kept)
_COMPILED = compiled("mmd2_kept", "cpu")


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
    op = "mmd2_kept" if _keeps(x, y, x_offsets) else "mmd2"
    value, env_grad, *_ = call(op, x, y, x_offsets, y_offsets, bandwidths, unbiased)
    return value, env_grad


def _keeps(x: Tensor, y: Tensor, x_offsets: Tensor) -> bool:
    """Whether a backward is to come that is faster with the forward's pairs; wrong shapes are the op's to refuse."""
    if not _COMPILED or x.device.type != "cpu" or x_offsets.shape != (2,) or x.dim() != 2 or y.dim() != 2:
        return False
    needed = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)
    return needed and KEPT_LEAST <= x.shape[0] + y.shape[0] <= KEPT_MOST
