"""``adam_step_``: one AdamW step of all edits' parameter rows, each clipped, masked and counted by itself."""

import torch
from torch import Tensor

from fastedit.ops._library import define, serve_with_triton
from fastedit.reference import adam_step as reference
from fastedit.reference._checks import fail
from fastedit.reference.arguments import check_adam_step

_OP = "adam_step_"


def _fake(
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
    check_adam_step(params, grads, exp_avg, exp_avg_sq, step, lr, active, beta1, beta2, eps, weight_decay, clip, radius)
    return exp_avg.new_empty(params.shape[0])


define(
    "adam_step_",
    "(Tensor(a!) params, Tensor grads, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) step, Tensor lr, "
    "Tensor active, float beta1, float beta2, float eps, float weight_decay, float? clip, float? radius) -> Tensor",
    reference.adam_step_,
    _fake,
)
serve_with_triton("adam_step_", "adam_step")


def adam_step_(
    params: Tensor,
    grads: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: float | Tensor,
    active: Tensor,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip: float | None = None,
    radius: float | None = None,
) -> Tensor:
    """Update every active row by one AdamW step in place and return the gradient norms.

    AdamW with decoupled weight decay, arXiv 1711.05101, algorithm 2, in the form of torch.optim.AdamW after
    torch.nn.utils.clip_grad_norm_ of each row by itself: nothing is reduced across rows, so a batch of B edits equals B
    single edits. ``radius`` keeps the values in an l_inf ball around zero (FT-L, arXiv 2012.00363, on a delta). Rows
    not active, and rows whose gradient norm is not finite, keep every bit, their step included. Gradients are read
    only.

    Args:
        params: (B, P), float32 | bfloat16 | float16 | float64. One edit's parameters a row, unit stride along P.
        grads: (B, P), dtype of params, or float32.
        exp_avg, exp_avg_sq: (B, P), float32 (float64 for float64 params). First and second moment, zeros at
            the start.
        step: (B,), int64. Steps done; incremented where active.
        lr: learning rate, or one per row (B,).
        active: (B,), bool. Rows to update.
        betas, eps, weight_decay: as in torch.optim.AdamW.
        clip: largest gradient norm of a row; None does not clip.
        radius: largest absolute value after the step; None does not clamp.
    Returns:
        norms (B,), dtype of exp_avg: gradient norm of every row before clipping, 0 where not active; one that is
        not finite is of a row that made no step.
    Raises:
        ValueError: shapes, dtypes or devices disagree, a setting is out of its range.
    """
    rates = rates_of(_OP, lr, params)
    with torch.no_grad():
        norm: Tensor = torch.ops.fastedit.adam_step_.default(
            params, grads, exp_avg, exp_avg_sq, step, rates, active, *betas, eps, weight_decay, clip, radius
        )
    return norm


def rates_of(op: str, lr: float | Tensor, params: Tensor) -> Tensor:
    """Return the learning rate of every edit (B,), float64, beside tensors (B, ...)."""
    rows = params.shape[0] if params.dim() else 0
    if not isinstance(lr, Tensor):
        return torch.full((rows,), float(lr), dtype=torch.float64, device=params.device)
    if lr.shape != (rows,) or lr.device != params.device:
        fail(op, f"lr is a number or of shape ({rows},) beside params", lr=f"{tuple(lr.shape)} {lr.device}")
    return lr.detach().to(torch.float64)
