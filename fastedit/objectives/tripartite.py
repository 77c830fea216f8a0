"""ODEdit's tripartite risk and its environment gradients, per edit.

ODEdit (arXiv 2601.19700): reliability, equation (2); locality, equation (3); generality by MMD², equation (6); their
sum, equation (9). A dummy multiplier w = 1 on the final hidden state scales logits and MMD features alike; the
derivative of a risk by w is that environment's gradient (``env_grad`` of the ops), which the total-variation penalty
of equations (9) to (11) is made of.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastedit.objectives.base import Direction, TokenBatch
from fastedit.objectives.layout import BatchLayout, Group
from fastedit.objectives.roles import ROLES
from fastedit.ops import mmd2, risk

# σ² of the MMD kernel as multiples of the mean squared distance
SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)
GROUPS: tuple[Group, Group] = ("edit", "rephrased")


@dataclass
class EnvironmentTable:
    """Risks and environment gradients of B edits.

    Args:
        value: (B, E) risk per environment; columns are the five roles, then generality (MMD²).
        env_grad: (B, E) derivative of each by the dummy multiplier.
        present: (B, E) bool; an absent view counts nowhere.
        token_grad: (T,) per-token derivative, only in mode "token".
    """

    value: Tensor
    env_grad: Tensor
    present: Tensor
    token_grad: Tensor | None = None


def tripartite(
    tokens: TokenBatch,
    *,
    direction: Direction = "reverse_kl",
    unbiased: bool = False,
    per_token: bool = False,
) -> EnvironmentTable:
    """Risks and environment gradients of every view, and of the MMD² between edit and rephrased views.

    Args:
        tokens: packed label tokens; ``reference`` is needed when locality views are present.
        direction: of the locality KL; "reverse_kl" is KL(edited || unedited), equation (3).
        unbiased: MMD² without the diagonal.
        per_token: also return every token's own derivative (penalty mode "token").
    Returns:
        EnvironmentTable.
    Raises:
        ValueError: locality views without reference logits.
    """
    n, n_roles, layout = tokens.n_edits, len(ROLES), tokens.laid_out
    token_grad = None
    if per_token:
        value, env_grad, token_grad = _per_token(tokens, direction)
    else:
        fitted, out = layout.split(tokens.logits)
        value, env_grad = risk(fitted, layout.fitted(tokens.labels), layout.segments(*ROLES), n * n_roles, kind="ce")
        if out is not None:
            kl, kl_grad = risk(out, _reference(tokens), layout.out_slots, n * n_roles, kind=direction)
            value, env_grad = value + kl, env_grad + kl_grad
    mmd, mmd_grad = _generality(tokens, unbiased)
    return EnvironmentTable(
        value=torch.cat([value.view(n, n_roles), mmd[:, None]], 1),
        env_grad=torch.cat([env_grad.view(n, n_roles), mmd_grad[:, None]], 1),
        present=layout.present,
        token_grad=token_grad,
    )


def _reference(tokens: TokenBatch) -> Tensor:
    if tokens.reference is None:
        raise ValueError("tripartite: locality views need reference logits (got reference=None)")
    return tokens.reference


def _per_token(tokens: TokenBatch, direction: Direction) -> tuple[Tensor, Tensor, Tensor]:
    """Segment means from per-token values, so that every token's own derivative stays visible."""
    layout = tokens.laid_out
    fitted, out = layout.split(tokens.logits)
    numbers = torch.arange(fitted.shape[0], device=fitted.device)
    value, grad = risk(fitted, layout.fitted(tokens.labels), numbers, fitted.shape[0], kind="ce")
    if out is not None:
        numbers = torch.arange(out.shape[0], device=out.device)
        kl, kl_grad = risk(out, _reference(tokens), numbers, out.shape[0], kind=direction)
        value, grad = layout.joined(value, kl), layout.joined(grad, kl_grad)
    weight, slots = 1 / layout.slot_sizes(value.dtype), layout.slots
    zeros = torch.zeros(tokens.n_edits * len(ROLES), dtype=value.dtype, device=value.device)
    return zeros.index_add(0, slots, value * weight), zeros.index_add(0, slots, grad * weight), grad


def _generality(tokens: TokenBatch, unbiased: bool) -> tuple[Tensor, Tensor]:
    """MMD² (B,) between the states of edit and rephrased views, one group per edit, never across edits; its derivative.

    Both are 0 of an edit that lacks one of the two.
    """
    layout = tokens.laid_out
    if not layout.has_generality:
        zero = tokens.hidden.new_zeros(tokens.n_edits, dtype=torch.promote_types(tokens.hidden.dtype, torch.float32))
        return zero, zero
    x, y = (tokens.hidden.index_select(0, layout.group(name)) for name in GROUPS)
    x_offsets, y_offsets = (layout.offsets(name) for name in GROUPS)
    return mmd2(x, y, x_offsets, y_offsets, _bandwidths(x.detach(), y.detach(), layout), unbiased=unbiased)


def _bandwidths(x: Tensor, y: Tensor, layout: BatchLayout) -> Tensor:
    """σ (B, Q): σ² in ratio 2 around the mean squared distance of an edit's pooled states, which are constants.

    The mean over all ordered pairs of a pool is twice its variance, so no pair is ever formed.
    """
    pooled = torch.cat([x, y]).to(torch.promote_types(x.dtype, torch.float32))
    edit, dtype = layout.pooled(), pooled.dtype
    zeros = pooled.new_zeros(layout.n_edits, pooled.shape[1])
    mean = zeros.index_add_(0, edit, pooled) / layout.pooled_sizes(dtype)[:, None]
    spread = (pooled - mean.index_select(0, edit)).square().sum(1)
    # mean over pairs i != j; the floor keeps identical states from dividing by zero
    total = pooled.new_zeros(layout.n_edits).index_add_(0, edit, spread)
    mean_distance = 2 * total / layout.pooled_sizes(dtype, less=1)
    return (mean_distance.clamp(min=1e-4)[:, None] * layout.constant(SCALES)).sqrt()
