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

from fastedit.objectives.base import CE_ROLES, ROLES, Direction, Role, TokenBatch
from fastedit.ops import mmd2, risk

PENALTY_MODES = ("prompt_env", "risk_env", "paper", "token")
# σ² of the MMD kernel as multiples of the mean squared distance
SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)


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
    n, n_roles = tokens.n_edits, len(ROLES)
    slot = tokens.edit * n_roles + tokens.role
    present = torch.zeros(n * n_roles, dtype=torch.bool, device=slot.device)
    present[slot] = True

    fitted = tokens.is_role(*CE_ROLES)
    if per_token:
        value, env_grad, token_grad = _per_token(tokens, slot, fitted, direction)
    else:
        value, env_grad = risk(tokens.logits, tokens.labels, torch.where(fitted, slot, -1), n * n_roles, kind="ce")
        if not bool(fitted.all()):
            kl, kl_grad = risk(tokens.logits[~fitted], _reference(tokens), slot[~fitted], n * n_roles, kind=direction)
            value, env_grad = value + kl, env_grad + kl_grad
        token_grad = None
    mmd, mmd_grad, has_mmd = _generality(tokens, unbiased)
    return EnvironmentTable(
        value=torch.cat([value.view(n, n_roles), mmd[:, None]], 1),
        env_grad=torch.cat([env_grad.view(n, n_roles), mmd_grad[:, None]], 1),
        present=torch.cat([present.view(n, n_roles), has_mmd[:, None]], 1),
        token_grad=token_grad,
    )


def _reference(tokens: TokenBatch) -> Tensor:
    if tokens.reference is None:
        raise ValueError("tripartite: locality views need reference logits (got reference=None)")
    return tokens.reference


def _per_token(tokens: TokenBatch, slot: Tensor, fitted: Tensor, direction: Direction) -> tuple[Tensor, Tensor, Tensor]:
    """Segment means from per-token values, so that every token's own derivative stays visible."""
    count = int(slot.shape[0])
    token_numbers = torch.arange(count, device=slot.device)
    value, grad = risk(tokens.logits, tokens.labels, torch.where(fitted, token_numbers, -1), count, kind="ce")
    if not bool(fitted.all()):
        kl, kl_grad = risk(tokens.logits[~fitted], _reference(tokens), token_numbers[~fitted], count, kind=direction)
        value, grad = value + kl, grad + kl_grad
    slots = tokens.n_edits * len(ROLES)
    weight = 1 / torch.bincount(slot, minlength=slots).clamp(min=1)[slot].to(value.dtype)
    zeros = torch.zeros(slots, dtype=value.dtype, device=value.device)
    return zeros.index_add(0, slot, value * weight), zeros.index_add(0, slot, grad * weight), grad


def _generality(tokens: TokenBatch, unbiased: bool) -> tuple[Tensor, Tensor, Tensor]:
    """MMD² between the states of edit and rephrased views, one group per edit, never across edits."""
    n = tokens.n_edits
    x_mask, y_mask = tokens.is_role(Role.EDIT), tokens.is_role(Role.TEXT_REPHRASE, Role.IMAGE_REPHRASE)
    x_offsets, y_offsets = _offsets(tokens.edit[x_mask], n), _offsets(tokens.edit[y_mask], n)
    has = (x_offsets.diff() > 0) & (y_offsets.diff() > 0)
    if not bool(has.any()):
        zero = tokens.hidden.new_zeros(n, dtype=torch.promote_types(tokens.hidden.dtype, torch.float32))
        return zero, zero, has
    x, y = tokens.hidden[x_mask], tokens.hidden[y_mask]
    bandwidths = _bandwidths(x.detach(), y.detach(), tokens.edit[x_mask], tokens.edit[y_mask], n)
    value, env_grad = mmd2(x, y, x_offsets, y_offsets, bandwidths, unbiased=unbiased)
    return value * has, env_grad * has, has


def _offsets(edit: Tensor, n: int) -> Tensor:
    """Offsets (n + 1,) of sorted edit numbers."""
    counts = torch.bincount(edit, minlength=n)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _bandwidths(x: Tensor, y: Tensor, x_edit: Tensor, y_edit: Tensor, n: int) -> Tensor:
    """σ (n, Q): σ² in ratio 2 around the mean squared distance of an edit's pooled states, which are constants.

    The mean over all ordered pairs of a pool is twice its variance, so no pair is ever formed.
    """
    pooled = torch.cat([x, y]).to(torch.promote_types(x.dtype, torch.float32))
    edit = torch.cat([x_edit, y_edit])
    count = torch.bincount(edit, minlength=n).clamp(min=1).to(pooled.dtype)
    mean = pooled.new_zeros(n, pooled.shape[1]).index_add_(0, edit, pooled) / count[:, None]
    spread = (pooled - mean[edit]).square().sum(1)
    variance = pooled.new_zeros(n).index_add_(0, edit, spread) / count
    # mean over pairs i != j; the floor keeps identical states from dividing by zero
    mean_distance = 2 * variance * count / (count - 1).clamp(min=1)
    scales = torch.tensor(SCALES, dtype=pooled.dtype, device=pooled.device)
    return (mean_distance.clamp(min=1e-4)[:, None] * scales).sqrt()
