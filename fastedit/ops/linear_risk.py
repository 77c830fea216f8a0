"""``linear_risk``: ``risk`` of a linear head's logits, which are never held."""

from typing import Any

import torch
from torch import Tensor

from fastedit.ops._library import call, define, differentiate, serve_with_triton
from fastedit.ops.risk import Kind
from fastedit.reference import linear_risk as reference
from fastedit.reference._checks import fail
from fastedit.reference._precision import accumulation_dtype
from fastedit.reference.arguments import STATS, check_linear_risk, check_risk_upstream

# Extra memory that a call may take, in bytes, unless told otherwise.
BUDGET = 32 * 2**20


def _fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    target_weight: Tensor | None,
    target_bias: Tensor | None,
    segments: Tensor,
    n_segments: int,
    kind: str,
    budget: int,
) -> tuple[Tensor, Tensor, Tensor]:
    check_linear_risk(hidden, weight, bias, target, target_weight, target_bias, segments, n_segments, kind, budget)
    dtype = accumulation_dtype(hidden.dtype)
    value = hidden.new_empty(n_segments, dtype=dtype)
    return value, torch.empty_like(value), hidden.new_empty((hidden.shape[0], STATS), dtype=dtype)


def _fake_backward(
    grad_value: Tensor,
    grad_env: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    target_weight: Tensor | None,
    target_bias: Tensor | None,
    segments: Tensor,
    stats: Tensor,
    kind: str,
    budget: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    n_segments = grad_value.shape[0] if grad_value.dim() else 0
    check_linear_risk(hidden, weight, bias, target, target_weight, target_bias, segments, n_segments, kind, budget)
    check_risk_upstream("linear_risk", grad_value, grad_env, stats, hidden)
    return (
        hidden.new_empty(hidden.shape if needs[0] else (0,)),
        weight.new_empty(weight.shape if needs[1] else (0,)),
        weight.new_empty(weight.shape[:1] if needs[2] else (0,)),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, segments, _, ctx.kind, ctx.budget = inputs
    ctx.save_for_backward(*tensors, segments, output[2])
    ctx.mark_non_differentiable(output[2])


def _backward(ctx: Any, grad_value: Tensor, grad_env: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    grads = call("linear_risk_backward", grad_value, grad_env, *ctx.saved_tensors, ctx.kind, ctx.budget, needs)
    wanted = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
    return *wanted, None, None, None, None, None, None, None


define(
    "linear_risk",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? target_weight, Tensor? target_bias, "
    "Tensor segments, SymInt n_segments, str kind, int budget) -> (Tensor, Tensor, Tensor)",
    reference.linear_risk,
    _fake,
    "lower",
)
define(
    "linear_risk_backward",
    "(Tensor grad_value, Tensor grad_env, Tensor hidden, Tensor weight, Tensor? bias, Tensor target, "
    "Tensor? target_weight, Tensor? target_bias, Tensor segments, Tensor stats, str kind, int budget, bool[3] needs) "
    "-> (Tensor, Tensor, Tensor)",
    reference.linear_risk_backward,
    _fake_backward,
)
serve_with_triton("linear_risk", "linear_risk")
serve_with_triton("linear_risk_backward", "linear_risk")
differentiate("linear_risk", _save, _backward)


def linear_risk(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor | None],
    segments: Tensor,
    n_segments: int,
    kind: Kind = "ce",
    *,
    bias: Tensor | None = None,
    budget: int = BUDGET,
) -> tuple[Tensor, Tensor]:
    """Return ``risk(hidden @ weight.T + bias, ...)`` without ever holding the (T, V) logits.

    ODEdit, equations (2), (3) and (9), arXiv 2601.19700, as ``risk``; the logits come and go in chunks of the
    vocabulary. The gradients cost one more product than those of a head whose logits are kept: chunks are computed
    anew. Logits are not rounded to the dtype of ``hidden``.

    Args:
        hidden: (T, d), float32 | bfloat16 | float16 | float64. Final hidden states, after the last norm.
        weight: (V, d), dtype of hidden. The head; it gets a gradient where it requires one.
        target: (T,) int64 labels for ``ce``, read only where ``segments >= 0``. Otherwise the reference, a constant:
            logits (T, V), or the hidden states (T, d') that give them with their head (V, d') and its bias (V,), all of
            the dtype of ``hidden``.
        segments: (T,), int64 below ``n_segments``. Tokens of a negative segment are ignored and get a zero gradient.
        n_segments: number S of segments.
        kind: ``ce``, ``forward_kl`` or ``reverse_kl``.
        bias: (V,), dtype of weight, or None.
        budget: bytes that forward and backward may each take for chunks, on top of what they return; a row of a few
            hundred logits is always taken. The references do not keep to it.
    Returns:
        value (S,), env_grad (S,), float32 (float64 for float64). A segment without tokens has 0 in both.
    Raises:
        ValueError: shapes, dtypes or devices disagree, a label or a segment is out of range.
    """
    target, target_weight, target_bias = _split(target)
    if kind != "ce":
        target = target.detach()
        target_weight = None if target_weight is None else target_weight.detach()
        target_bias = None if target_bias is None else target_bias.detach()
    value, env_grad, _ = call(
        "linear_risk", hidden, weight, bias, target, target_weight, target_bias, segments, n_segments, kind, budget
    )
    return value, env_grad


def _split(
    target: Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor | None],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if isinstance(target, Tensor):
        return target, None, None
    if len(target) not in (2, 3):
        fail("linear_risk", "target is a tensor, or hidden states, head and bias", target=f"{len(target)} parts")
    return target[0], target[1], target[2] if len(target) == 3 else None
