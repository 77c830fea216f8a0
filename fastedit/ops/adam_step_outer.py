"""``adam_step_outer_``: the step of ``adam_step_`` for matrices whose gradient is a sum of few outer products."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastedit.ops._library import define
from fastedit.ops.adam_step import rates_of
from fastedit.reference import adam_step_outer as reference

_OP = "adam_step_outer_"


def _fake(
    params: Sequence[Tensor],
    inputs: Sequence[Tensor],
    grads: Sequence[Tensor],
    offsets: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
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
    settings = (beta1, beta2, eps, weight_decay, clip, radius)
    reference.check_adam_step_outer(params, inputs, grads, offsets, exp_avg, exp_avg_sq, step, lr, active, *settings)
    return params[0].new_empty(params[0].shape[0])


define(
    _OP,
    "(Tensor(a!)[] params, Tensor[] inputs, Tensor[] grads, Tensor[] offsets, Tensor(b!)[] exp_avg, "
    "Tensor(c!)[] exp_avg_sq, Tensor(d!) step, Tensor lr, Tensor active, float beta1, float beta2, float eps, "
    "float weight_decay, float? clip, float? radius) -> Tensor",
    reference.adam_step_outer_,
    _fake,
)


def adam_step_outer_(
    params: Sequence[Tensor],
    inputs: Sequence[Tensor],
    grads: Sequence[Tensor],
    offsets: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
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
    """Update every active edit's matrices by one AdamW step in place and return the gradient norms.

    As ``adam_step_`` of the gradients ``G_b = sum_t grads_t inputs_t^T``, t the tokens of edit b, with the matrices of
    all parts as one row: the clip is by the norm over all of them. No gradient is ever held: its norm is a sum over
    pairs of tokens, ``|G_b|^2 = sum_tu (grads_t . grads_u) (inputs_t . inputs_u)``, and it is made piece by piece where
    it is used. That is worth it where an edit has fewer tokens than a matrix has rows.

    Args:
        params: one (B, o, i) per part, float32 | float64, matrices contiguous. Parts may differ in o and i.
        inputs: one (T, i) per part, dtype of params. Tokens sorted by edit.
        grads: one (T, o) per part, dtype of params.
        offsets: one (B + 1,) per part, int64. Edit b has the tokens offsets[b] to offsets[b + 1] - 1.
        exp_avg, exp_avg_sq: as params. First and second moment, zeros at the start.
        step: (B,), int64. Steps done; incremented where active.
        lr: learning rate, or one per edit (B,).
        active: (B,), bool. Edits to update.
        betas, eps, weight_decay, clip, radius: as in ``adam_step_``.
    Returns:
        norms (B,), dtype of params: gradient norm of every edit before clipping, 0 where not active; one that is not
        finite is of an edit that made no step.
    Raises:
        ValueError: lengths, shapes, dtypes or devices disagree, a setting is out of its range.
    """
    rates = rates_of(_OP, lr, step)
    with torch.no_grad():
        norm: Tensor = torch.ops.fastedit.adam_step_outer_.default(
            list(params),
            list(inputs),
            list(grads),
            list(offsets),
            list(exp_avg),
            list(exp_avg_sq),
            step,
            rates,
            active,
            *betas,
            eps,
            weight_decay,
            clip,
            radius,
        )
    return norm
