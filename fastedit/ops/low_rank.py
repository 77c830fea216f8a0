"""``low_rank``: the low-rank deltas of many edits, applied to tokens sorted by edit."""

from typing import Any

import torch
from torch import Tensor

from fastedit.ops._library import check_floating, check_index, define, fail, serve_with_triton
from fastedit.reference import low_rank as reference
from fastedit.reference._precision import accumulation_dtype


def _fake(x: Tensor, down: Tensor, up: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], up.shape[2]))


def _fake_backward(
    grad: Tensor, x: Tensor, down: Tensor, up: Tensor, offsets: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    grads = [t.new_empty(t.shape if need else (0,)) for t, need in zip((x, down, up), needs, strict=True)]
    return grads[0], grads[1], grads[2]


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    grads = torch.ops.fastedit.low_rank_backward.default(grad, *ctx.saved_tensors, needs)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), None


define("low_rank", "(Tensor x, Tensor down, Tensor up, Tensor offsets) -> Tensor", reference.low_rank, _fake)
define(
    "low_rank_backward",
    "(Tensor grad, Tensor x, Tensor down, Tensor up, Tensor offsets, bool[3] needs) -> (Tensor, Tensor, Tensor)",
    reference.low_rank_backward,
    _fake_backward,
)
serve_with_triton("low_rank", "low_rank")
serve_with_triton("low_rank_backward", "low_rank")
torch.library.register_autograd("fastedit::low_rank", _backward, setup_context=_save)


def low_rank(x: Tensor, down: Tensor, up: Tensor, offsets: Tensor) -> Tensor:
    """Return x[t] @ down[b] @ up[b] for every token t of edit b: what low-rank deltas add to a linear layer's output.

    LoRA, arXiv 2106.09685, equation (3), stacked over B edits and applied from the input's side: ``down[b]`` is the
    transpose of the paper's A, ``up[b]`` that of its B, without a scale. Nothing couples two edits.

    Args:
        x: (T, d), float32 | bfloat16 | float16 | float64. Tokens, those of one edit back to back.
        down: (B, d, r), dtype of x, or float32.
        up: (B, r, o), dtype of down.
        offsets: (B + 1,), int64. Edit b has x[offsets[b]:offsets[b + 1]]; the first entry is 0 and the last is T.
    Returns:
        y (T, o), dtype of x. Sums are kept in float32 (float64 for float64). Differentiable in x, down and up, once.
    Raises:
        ValueError: shapes, dtypes or devices disagree; on the CPU also where offsets do not cover the tokens (a GPU is
            not asked, that would wait for it).
    """
    ranked = x.dim() == 2 and down.dim() == 3 and up.dim() == 3
    if not ranked or down.shape != (up.shape[0], x.shape[1], up.shape[1]):
        shapes = {"x": tuple(x.shape), "down": tuple(down.shape), "up": tuple(up.shape)}
        fail("low_rank", "x is (T, d), down is (B, d, r), up is (B, r, o)", **shapes)
    check_floating("low_rank", "x", x)
    if down.dtype != up.dtype or down.dtype not in (x.dtype, accumulation_dtype(x.dtype)):
        fail("low_rank", "down and up have the dtype of x or are float32", x=x.dtype, down=down.dtype, up=up.dtype)
    if down.device != x.device or up.device != x.device:
        fail("low_rank", "x, down and up are on one device", x=x.device, down=down.device, up=up.device)
    check_index("low_rank", "offsets", offsets, down.shape[0] + 1, x.device)
    out: Tensor = torch.ops.fastedit.low_rank.default(x, down, up, offsets)
    return out
