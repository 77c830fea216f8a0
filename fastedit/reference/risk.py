"""Definition of ``risk``: segment means of a token risk and of its derivative by a dummy scale on the logits."""

import math

import torch
from torch import Tensor

from fastedit.reference._checks import check_labels, check_segments
from fastedit.reference._precision import accumulation_dtype, widen
from fastedit.reference.arguments import STATS as STATS
from fastedit.reference.arguments import check_risk, check_risk_upstream

# Columns of ``stats``, what backward needs of a token: max z, sum exp(z - max z) and E_p[z], p = softmax(z), and
#   forward_kl  the max and the sum of the reference logits (any pair that gives the same softmax)
#   reverse_kl  E_p[z - r] and h = Cov_p(z, z - r)

# exp(60) is still finite in float32 with room for a sum; beyond it the two log-sum-exps are as accurate.
_MAX_EXPONENT = 60.0


def risk(logits: Tensor, target: Tensor, segments: Tensor, n_segments: int, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return value (S,), env_grad (S,) and stats (T, 5), all in the accumulation dtype."""
    check_risk(logits, target, segments, n_segments, kind)
    check_segments("risk", segments, n_segments)
    dtype = accumulation_dtype(logits.dtype)
    keep = segments >= 0
    z = _finite(logits[keep])
    # (T', V), (T', 1): probabilities and logits centred so that E_p[a] = 0
    lse = torch.logsumexp(z, -1, keepdim=True)
    p = torch.softmax(z, -1)
    mean = (p * z).sum(-1, keepdim=True)
    extra = torch.zeros_like(mean).expand(-1, 2)

    if kind == "ce":
        check_labels("risk", target, segments, logits.shape[1])
        labels = target[keep]
        # as it is: a label of probability zero has an infinite risk
        picked = widen(logits[keep]).gather(-1, labels[:, None])
        # where every logit is -inf all are alike
        alike = (z <= _floor(z.dtype)).all(-1, keepdim=True)
        value = torch.where(alike, math.log(logits.shape[1]), lse - picked)
        env_grad = torch.where(alike, 0.0, mean - picked)
    elif kind == "forward_kl":
        r = _finite(target[keep])
        lse_r = torch.logsumexp(r, -1, keepdim=True)
        q = torch.softmax(r, -1)
        value = _divergence(q, r - z, lse_r, lse)
        env_grad = (p - q).mul(z - mean).sum(-1, keepdim=True)
        extra = torch.cat(_max_and_sum(r), -1)
    else:
        r = _finite(target[keep])
        v = z - r
        v_mean = (p * v).sum(-1, keepdim=True)
        value = _divergence(p, v, lse, torch.logsumexp(r, -1, keepdim=True))
        env_grad = (p * (z - mean) * (v - v_mean)).sum(-1, keepdim=True)
        extra = torch.cat([v_mean, env_grad], -1)

    stats = logits.new_zeros((logits.shape[0], STATS), dtype=dtype)
    stats[keep] = torch.cat([*_max_and_sum(z), mean, extra], -1)
    chosen = segments[keep]
    count = _count(chosen, n_segments, dtype)
    value_sum = count.new_zeros(n_segments).index_add(0, chosen, value[:, 0])
    env_sum = count.new_zeros(n_segments).index_add(0, chosen, env_grad[:, 0])
    return value_sum / count, env_sum / count, stats


def risk_backward(
    grad_value: Tensor, grad_env: Tensor, logits: Tensor, target: Tensor, segments: Tensor, stats: Tensor, kind: str
) -> Tensor:
    """Return the gradient by logits (T, V) of ``<grad_value, value> + <grad_env, env_grad>``."""
    n_segments = grad_value.shape[0] if grad_value.dim() else 0
    check_risk(logits, target, segments, n_segments, kind)
    check_risk_upstream("risk", grad_value, grad_env, stats, logits)
    check_segments("risk", segments, n_segments)
    if kind == "ce":
        check_labels("risk", target, segments, logits.shape[1])
    keep = segments >= 0
    chosen = segments[keep]
    z = _finite(logits[keep])
    top, total, mean, fourth, fifth = stats[keep].split(1, dim=-1)  # type: ignore[no-untyped-call]
    p = torch.exp(z - top) / total
    a = z - mean
    # (T', 1): what one token's risk and its scale derivative weigh in the result
    count = _count(chosen, grad_value.shape[0], stats.dtype)
    on_value = (grad_value / count)[chosen, None]
    on_env = (grad_env / count)[chosen, None]

    if kind == "ce":
        grad = p * (on_value + on_env * (1 + a))
        grad.scatter_add_(-1, target[keep][:, None], -(on_value + on_env))
    elif kind == "forward_kl":
        q = torch.exp(_finite(target[keep]) - fourth) / fifth
        grad = on_value * (p - q) + on_env * ((p - q) + p * a)
    else:
        b = z - _finite(target[keep]) - fourth
        grad = p * (on_value * b + on_env * (a * b - fifth + a + b))

    out = logits.new_zeros(logits.shape)
    out[keep] = grad.to(logits.dtype)
    return out


def _finite(logits: Tensor) -> Tensor:
    """Widen logits and lift -inf to a value of probability zero whose products with itself do not overflow."""
    wide = widen(logits)
    return wide.clamp(min=_floor(wide.dtype))


def _floor(dtype: torch.dtype) -> float:
    return -1e100 if dtype == torch.float64 else -1e15


def _max_and_sum(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return max (T, 1) and sum exp(logits - max) (T, 1)."""
    top = logits.amax(-1, keepdim=True)
    return top, torch.exp(logits - top).sum(-1, keepdim=True)


def _divergence(weight: Tensor, drift: Tensor, lse: Tensor, lse_other: Tensor) -> Tensor:
    """Return KL(w || w') (T, 1) from drift u - u' of the two logits, where w = softmax(u) and lse belongs to u.

    E_w[drift] - lse + lse' cancels when the two are close. For any c near the mean of drift, and u = drift - c, the sum
    E_w[u] + log E_w[exp(-u)] is the same number and does not; c need not be the mean to the last bit.
    """
    centre = (weight * drift).sum(-1, keepdim=True)
    drift = drift - centre
    ratio = (weight * torch.expm1((-drift).clamp(max=_MAX_EXPONENT))).sum(-1, keepdim=True)
    close = (weight * drift).sum(-1, keepdim=True) + torch.log1p(ratio)
    far = centre - lse + lse_other
    return torch.where(drift.amin(-1, keepdim=True) < -_MAX_EXPONENT, far, close)


def _count(segments: Tensor, n_segments: int, dtype: torch.dtype) -> Tensor:
    """Return tokens per segment (S,), at least 1 so that empty segments give zero means."""
    return torch.bincount(segments, minlength=n_segments).clamp(min=1).to(dtype)
