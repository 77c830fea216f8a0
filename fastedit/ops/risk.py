"""``risk``: token risks and their derivative by a dummy scale on the logits, averaged per segment."""

from typing import Any, Literal

import torch
from torch import Tensor

from fastedit.ops._library import call, define, differentiate, serve_with_triton
from fastedit.reference import risk as reference
from fastedit.reference._precision import accumulation_dtype
from fastedit.reference.arguments import STATS, check_risk, check_risk_upstream

Kind = Literal["ce", "forward_kl", "reverse_kl"]
KINDS: tuple[Kind, ...] = ("ce", "forward_kl", "reverse_kl")


def _fake(
    logits: Tensor, target: Tensor, segments: Tensor, n_segments: int, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    check_risk(logits, target, segments, n_segments, kind)
    dtype = accumulation_dtype(logits.dtype)
    value = logits.new_empty(n_segments, dtype=dtype)
    stats = logits.new_empty((logits.shape[0], STATS), dtype=dtype)
    return value, torch.empty_like(value), stats


def _fake_backward(
    grad_value: Tensor, grad_env: Tensor, logits: Tensor, target: Tensor, segments: Tensor, stats: Tensor, kind: str
) -> Tensor:
    check_risk(logits, target, segments, grad_value.shape[0] if grad_value.dim() else 0, kind)
    check_risk_upstream("risk", grad_value, grad_env, stats, logits)
    return logits.new_empty(logits.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, target, segments, _, ctx.kind = inputs
    ctx.save_for_backward(logits, target, segments, output[2])
    ctx.mark_non_differentiable(output[2])


def _backward(ctx: Any, grad_value: Tensor, grad_env: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
    logits, target, segments, stats = ctx.saved_tensors
    grad = call("risk_backward", grad_value, grad_env, logits, target, segments, stats, ctx.kind)
    return grad, None, None, None, None


define(
    "risk",
    "(Tensor logits, Tensor target, Tensor segments, SymInt n_segments, str kind) -> (Tensor, Tensor, Tensor)",
    reference.risk,
    _fake,
    "widest",
)
define(
    "risk_backward",
    "(Tensor grad_value, Tensor grad_env, Tensor logits, Tensor target, Tensor segments, Tensor stats, str kind) "
    "-> Tensor",
    reference.risk_backward,
    _fake_backward,
)
serve_with_triton("risk", "risk")
serve_with_triton("risk_backward", "risk")
differentiate("risk", _save, _backward)


def risk(logits: Tensor, target: Tensor, segments: Tensor, n_segments: int, kind: Kind = "ce") -> tuple[Tensor, Tensor]:
    """Return the mean risk of every segment and its derivative by a scale w on the logits at w = 1.

    ODEdit, equations (2), (3) and (9), arXiv 2601.19700. The paper differentiates twice; here both outputs are
    differentiable in the logits through closed forms, so a penalty on ``env_grad`` costs no second backward:

    * ``ce``: lse(z) - z_y; derivative E_p[z] - z_y. Both are infinite where z_y is -inf, as in cross_entropy.
    * ``forward_kl``: KL(reference || edited); derivative E_p[z] - E_q[z].
    * ``reverse_kl``: KL(edited || reference), the paper's locality risk; derivative Cov_p(z, z - r).

    The reference logits are constants: w does not multiply them and they get no gradient. The backward is not
    differentiable again. Logits of -inf have probability zero.

    Args:
        logits: (T, V), float32 | bfloat16 | float16 | float64. Sums are kept in float32 (float64 for float64).
        target: (T,) int64 labels for ``ce``, read only where ``segments >= 0``; (T, V) reference logits of the dtype of
            ``logits`` otherwise.
        segments: (T,), int64 below ``n_segments``. Tokens of a negative segment are ignored and get a zero gradient.
        n_segments: number S of segments, e.g. edits times environments.
        kind: ``ce``, ``forward_kl`` or ``reverse_kl``.
    Returns:
        value (S,), env_grad (S,), float32 (float64 for float64). A segment without tokens has 0 in both.
    Raises:
        ValueError: shapes, dtypes or devices disagree; on the CPU also where a label or a segment is out of range (a
            GPU is not asked, that would wait for it).
    """
    if kind != "ce":
        target = target.detach()
    value, env_grad, _ = call("risk", logits, target, segments, n_segments, kind)
    return value, env_grad
