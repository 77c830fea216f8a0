"""``low_rank``: the low-rank deltas of many edits, applied to tokens sorted by edit."""

from typing import Any

from torch import Tensor

from fastedit.ops._library import call, define, differentiate, serve_with_triton
from fastedit.reference import low_rank as reference
from fastedit.reference._checks import check_tensor
from fastedit.reference.arguments import check_low_rank


def _fake(x: Tensor, down: Tensor, up: Tensor, offsets: Tensor) -> Tensor:
    check_low_rank(x, down, up, offsets)
    return x.new_empty((x.shape[0], up.shape[2]))


def _fake_backward(
    grad: Tensor, x: Tensor, down: Tensor, up: Tensor, offsets: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    check_low_rank(x, down, up, offsets)
    check_tensor("low_rank", "grad", grad, x.dtype, (x.shape[0], up.shape[2]), x.device)
    grads = [t.new_empty(t.shape if need else (0,)) for t, need in zip((x, down, up), needs, strict=True)]
    return grads[0], grads[1], grads[2]


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    grads = call("low_rank_backward", grad, *ctx.saved_tensors, needs)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), None


define("low_rank", "(Tensor x, Tensor down, Tensor up, Tensor offsets) -> Tensor", reference.low_rank, _fake, "lower")
define(
    "low_rank_backward",
    "(Tensor grad, Tensor x, Tensor down, Tensor up, Tensor offsets, bool[3] needs) -> (Tensor, Tensor, Tensor)",
    reference.low_rank_backward,
    _fake_backward,
)
serve_with_triton("low_rank", "low_rank")
serve_with_triton("low_rank_backward", "low_rank")
differentiate("low_rank", _save, _backward)


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
    out: Tensor = call("low_rank", x, down, up, offsets)
    return out
