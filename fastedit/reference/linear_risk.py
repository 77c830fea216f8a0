"""Definition of ``linear_risk``: ``risk`` of the logits that a linear head gives, written out in full."""

import torch
from torch import Tensor

from fastedit.reference import risk as token_risk
from fastedit.reference._checks import check_labels, check_segments
from fastedit.reference._precision import widen
from fastedit.reference.arguments import check_linear_risk, check_risk_upstream


def linear_risk(
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
    """Return value (S,), env_grad (S,) and stats (T, 5), all in the accumulation dtype."""
    check_linear_risk(hidden, weight, bias, target, target_weight, target_bias, segments, n_segments, kind, budget)
    _check_values(target, segments, n_segments, weight.shape[0])
    logits = _logits(hidden, weight, bias)
    return token_risk.risk(logits, _target(target, target_weight, target_bias), segments, n_segments, kind)


def linear_risk_backward(
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
    """Return the gradients by hidden, weight and bias; one that is not needed is an empty tensor."""
    n_segments = grad_value.shape[0] if grad_value.dim() else 0
    check_linear_risk(hidden, weight, bias, target, target_weight, target_bias, segments, n_segments, kind, budget)
    check_risk_upstream("linear_risk", grad_value, grad_env, stats, hidden)
    _check_values(target, segments, n_segments, weight.shape[0])
    logits = _logits(hidden, weight, bias)
    reference = _target(target, target_weight, target_bias)
    # (T, V), in the accumulation dtype
    on_logits = token_risk.risk_backward(grad_value, grad_env, logits, reference, segments, stats, kind)
    # an ignored token gives nothing, whatever its hidden state holds
    used = torch.where((segments >= 0)[:, None], widen(hidden), 0.0)
    grads = [
        (on_logits @ widen(weight)).to(hidden.dtype) if needs[0] else hidden.new_empty(0),
        (on_logits.T @ used).to(weight.dtype) if needs[1] else weight.new_empty(0),
        on_logits.sum(0).to(weight.dtype) if needs[2] else weight.new_empty(0),
    ]
    return grads[0], grads[1], grads[2]


def _check_values(target: Tensor, segments: Tensor, n_segments: int, vocabulary: int) -> None:
    check_segments("linear_risk", segments, n_segments)
    if target.dim() == 1:
        check_labels("linear_risk", target, segments, vocabulary)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = widen(hidden) @ widen(weight).T
    return logits if bias is None else logits + widen(bias)


def _target(target: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return labels (T,) as they are, reference logits (T, V) widened."""
    if target.dim() == 1:
        return target
    return widen(target) if weight is None else _logits(target, weight, bias)
