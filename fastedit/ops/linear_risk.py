"""``linear_risk``: ``risk`` of a linear head's logits, which are never held."""

from typing import Any

import torch
from torch import Tensor

from fastedit.ops._library import check_floating, check_index, define, fail, serve_with_triton
from fastedit.ops.risk import KINDS, Kind
from fastedit.reference import linear_risk as reference
from fastedit.reference._precision import accumulation_dtype
from fastedit.reference.risk import STATS

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
    grads = torch.ops.fastedit.linear_risk_backward.default(
        grad_value, grad_env, *ctx.saved_tensors, ctx.kind, ctx.budget, needs
    )
    wanted = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
    return *wanted, None, None, None, None, None, None, None


define(
    "linear_risk",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? target_weight, Tensor? target_bias, "
    "Tensor segments, SymInt n_segments, str kind, int budget) -> (Tensor, Tensor, Tensor)",
    reference.linear_risk,
    _fake,
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
torch.library.register_autograd("fastedit::linear_risk", _backward, setup_context=_save)


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
    if kind not in KINDS:
        fail("linear_risk", f"kind is one of {', '.join(KINDS)}", kind=kind)
    target, target_weight, target_bias = _split(target)
    if n_segments < 0 or budget <= 0:
        fail("linear_risk", "n_segments is not negative and budget positive", n_segments=n_segments, budget=budget)
    _check_head("hidden", hidden, "weight", weight, "bias", bias)
    check_floating("linear_risk", "hidden", hidden)
    check_index("linear_risk", "segments", segments, hidden.shape[0], hidden.device)
    if kind == "ce":
        if target_weight is not None:
            fail("linear_risk", "target of ce is labels (T,)", target=f"a reference of {tuple(target.shape)}")
        check_index("linear_risk", "target", target, hidden.shape[0], hidden.device)
    else:
        _check_reference(hidden, weight, target, target_weight, target_bias)
        target = target.detach()
        target_weight = None if target_weight is None else target_weight.detach()
        target_bias = None if target_bias is None else target_bias.detach()
    value, env_grad, _ = torch.ops.fastedit.linear_risk.default(
        hidden, weight, bias, target, target_weight, target_bias, segments, n_segments, kind, budget
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


def _check_head(
    name: str, hidden: Tensor, weight_name: str, weight: Tensor, bias_name: str, bias: Tensor | None
) -> None:
    given = {name: hidden, weight_name: weight} | ({} if bias is None else {bias_name: bias})
    fits = hidden.dim() == 2 and weight.dim() == 2 and weight.shape[0] > 0 and hidden.shape[1] == weight.shape[1]
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = {part: tuple(tensor.shape) for part, tensor in given.items()}
        fail("linear_risk", f"{name} is (T, d), {weight_name} is (V, d) with V > 0, {bias_name} is (V,)", **shapes)
    if len({tensor.dtype for tensor in given.values()}) > 1:
        dtypes = {part: tensor.dtype for part, tensor in given.items()}
        fail("linear_risk", "hidden states, head and bias have one dtype", **dtypes)
    if len({tensor.device for tensor in given.values()}) > 1:
        devices = {part: tensor.device for part, tensor in given.items()}
        fail("linear_risk", "hidden states, head and bias are on one device", **devices)


def _check_reference(
    hidden: Tensor, weight: Tensor, target: Tensor, target_weight: Tensor | None, target_bias: Tensor | None
) -> None:
    if target_weight is not None:
        _check_head("target", target, "target_weight", target_weight, "target_bias", target_bias)
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    columns = vocabulary if target_weight is None else target.shape[1]
    head = vocabulary if target_weight is None else target_weight.shape[0]
    if target.shape != (tokens, columns) or head != vocabulary or target.dtype != hidden.dtype:
        got = {"target": f"{target.dtype} {tuple(target.shape)}", "hidden": f"{hidden.dtype} {tuple(hidden.shape)}"}
        if target_weight is not None:
            got["target_weight"] = f"{tuple(target_weight.shape)}"
        fail("linear_risk", f"a reference gives logits (T, {vocabulary}) and has the dtype of hidden", **got)
    if target.device != hidden.device:
        fail("linear_risk", "target is on the device of hidden", target=target.device, hidden=hidden.device)
