"""Definition of ``adam_step_``: one AdamW step of every active row, each clipped by its own norm."""

import torch
from torch import Tensor

from fastedit.reference._precision import widen
from fastedit.reference.arguments import check_adam_step, check_adam_step_memory


def adam_step_(
    params: Tensor,
    grads: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: Tensor,
    active: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    clip: float | None,
    radius: float | None,
) -> Tensor:
    """Update params, moments (B, P) and step (B,) in place; return the gradient norms (B,), 0 where not active.

    Rows whose norm is not finite stay as they are.
    """
    check_adam_step(params, grads, exp_avg, exp_avg_sq, step, lr, active, beta1, beta2, eps, weight_decay, clip, radius)
    check_adam_step_memory(params, exp_avg, exp_avg_sq)
    rows = active.nonzero()[:, 0]
    norm = exp_avg.new_zeros(params.shape[0])
    grad = widen(grads[rows]).to(exp_avg.dtype)
    norm[rows] = torch.linalg.vector_norm(grad, dim=1)
    finite = norm[rows].isfinite()
    rows, grad = rows[finite], grad[finite]
    step[rows] += 1
    if clip is not None:
        # the coefficient of torch.nn.utils.clip_grad_norm_, row by row
        grad = grad * (clip / (norm[rows, None] + 1e-6)).clamp(max=1.0)

    # (B', 1), float64 as torch.optim.AdamW computes its scalars
    count = step[rows, None].double()
    rate = lr[rows, None].double()
    correction1 = 1.0 - beta1**count
    correction2 = 1.0 - beta2**count
    first = exp_avg[rows].lerp(grad, 1.0 - beta1)
    second = exp_avg_sq[rows] * beta2 + (1.0 - beta2) * grad * grad
    denominator = second.sqrt() / correction2.sqrt().to(second.dtype) + eps
    value = widen(params[rows]).to(exp_avg.dtype) * (1.0 - rate * weight_decay).to(exp_avg.dtype)
    value = value - (rate / correction1).to(first.dtype) * first / denominator
    if radius is not None:
        value = value.clamp(-radius, radius)
    exp_avg[rows], exp_avg_sq[rows], params[rows] = first, second, value.to(params.dtype)
    return norm
