"""ODEdit's objective: tripartite risk plus a total-variation penalty whose multiplier is learned in a primal-dual loop.

ODEdit (arXiv 2601.19700), equations (9) to (13): min over the delta, max over the multiplier's network, of
``R + λ(δ, φ) · T`` with ``T = (Σ_e π_e |Γ_e|)²``. Every edit has its own φ, λ, δ and T; nothing couples edits.

How λ is made and climbs is ``objectives.multiplier``. Ours besides: |Γ| is smoothed near zero, because the locality
risk starts at exactly 0 and the sign of rounding noise must not push it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastedit.objectives.base import Losses, TokenBatch, all_correct
from fastedit.objectives.config import InvariantConfig
from fastedit.objectives.layout import ALL_COLUMNS, CE_COLUMNS, EDIT_COLUMN, KL_COLUMNS, BatchLayout
from fastedit.objectives.multiplier import Multiplier
from fastedit.objectives.roles import ROLES, Role, repeated
from fastedit.objectives.tripartite import EnvironmentTable, tripartite


class InvariantObjective:
    """``R + λ·T`` per edit, with the dual step taken first (equation (13) in Gauss-Seidel order).

    At step k > 0 the multiplier's network ascends with T at the current φ before the primal uses λ; that is the
    paper's order (dual after primal) without an extra forward.

    Args:
        config: settings.
        steps: the optimiser steps planned, for the warm-up share.
    """

    def __init__(self, config: InvariantConfig, steps: int) -> None:
        self.config = config
        self.roles: tuple[Role, ...] = repeated(ROLES, config.n_views)
        self.start = math.ceil(config.warmup * steps)
        self.multiplier = Multiplier(config, self.start)

    def branch(self, taken: frozenset[int]) -> tuple[bool, ...]:
        """Where edits stand that have taken these numbers of steps: before the start, at it, behind it."""
        return min(taken) < self.start, self.start in taken, max(taken) > self.start

    def __call__(self, tokens: TokenBatch, steps: int | Tensor) -> Losses:
        """Losses after the given steps, one number or (B,) int64; updates the multipliers' networks on the way."""
        config = self.config
        table = tripartite(
            tokens, direction=config.direction, unbiased=config.unbiased, per_token=config.penalty == "token"
        )
        reliability, locality, generality = self._risks(table, tokens.laid_out)
        rel, loc, gen = config.weights
        total_risk = rel * reliability + loc * locality + gen * generality
        nll = table.value[:, int(Role.EDIT)].detach()
        parts = {"nll": nll, "kl": locality.detach(), "mmd2": generality.detach()}
        taken = tokens.steps_taken(steps)
        if not any(number >= self.start for number in taken):
            return Losses(total_risk, nll, all_correct(tokens), parts)

        if isinstance(steps, int):
            steps = torch.full((tokens.n_edits,), steps)
        steps = steps.to(total_risk.device)
        variation = self._variation(table, tokens)
        said = all_correct(tokens)
        multiplier = self.multiplier(tokens, total_risk.detach(), variation.detach(), said, steps, taken)
        penalty = multiplier * variation
        shown = multiplier.detach()
        if not all(number >= self.start for number in taken):
            on = steps >= self.start
            penalty, shown = torch.where(on, penalty, 0.0), torch.where(on, shown, 0.0)
        parts |= {"tv": variation.detach(), "lambda": shown}
        return Losses(total_risk + penalty, nll, said, parts)

    def _risks(self, table: EnvironmentTable, layout: BatchLayout) -> tuple[Tensor, Tensor, Tensor]:
        """Reliability, locality and generality (B,). In mode prompt_env the rephrased views are environments of the
        same reliability loss and are averaged with the edit view; in the others reliability is equation (2) alone."""
        fitted = CE_COLUMNS if self.config.penalty in ("prompt_env", "token") else EDIT_COLUMN
        reliability, locality = (layout.mean(table.value[:, chosen], chosen) for chosen in (fitted, KL_COLUMNS))
        return reliability, locality, table.value[:, -1]

    def _variation(self, table: EnvironmentTable, tokens: TokenBatch) -> Tensor:
        """T (B,): the squared, weighted sum of |Γ| over the environments of the chosen mode."""
        mode, layout = self.config.penalty, tokens.laid_out
        if mode == "token":
            if table.token_grad is None:
                raise ValueError("odedit: mode token needs per-token gradients (got token_grad=None)")
            size = self._magnitude(table.token_grad)
            zero = torch.zeros(tokens.n_edits, dtype=size.dtype, device=size.device)
            return (zero.index_add(0, layout.edits, size) / layout.edit_sizes(size.dtype)).square()
        if mode == "prompt_env":
            return layout.mean(self._magnitude(table.env_grad), ALL_COLUMNS).square()
        groups = torch.stack(
            [
                table.env_grad[:, int(Role.EDIT)],
                layout.mean(table.env_grad[:, KL_COLUMNS], KL_COLUMNS),
                table.env_grad[:, -1],
            ],
            1,
        )
        if mode == "risk_env":
            return self._magnitude(groups).sum(1).square()
        return self._magnitude(groups.sum(1)).square()

    def _magnitude(self, gradient: Tensor) -> Tensor:
        epsilon = self.config.smoothing
        if epsilon == 0:
            return gradient.abs()
        return torch.sqrt(gradient.square() + epsilon * epsilon) - epsilon
