"""ODEdit's objective: tripartite risk plus a total-variation penalty whose multiplier is learned in a primal-dual loop.

ODEdit (arXiv 2601.19700), equations (9) to (13): min over the delta, max over the multiplier's network, of
``R + λ(δ, φ) · T`` with ``T = (Σ_e π_e |Γ_e|)²``. Every edit has its own φ, λ, δ and T; nothing couples edits.

Where the paper is silent we follow OOD-TV-IRM (arXiv 2502.19665) in spirit: λ is a small network of φ (not detached)
with a softplus output, ascent steps are normalised and diminishing. Ours: λ reads a fixed count-sketch of φ when φ is
large, its scale is calibrated when the penalty is switched on, and |Γ| is smoothed near zero, because the locality
risk starts at exactly 0 and the sign of rounding noise must not push it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastedit.objectives.base import Direction, Losses, TokenBatch, all_correct
from fastedit.objectives.layout import ALL_COLUMNS, CE_COLUMNS, EDIT_COLUMN, KL_COLUMNS, BatchLayout
from fastedit.objectives.roles import ROLES, Role
from fastedit.objectives.tripartite import PENALTY_MODES, EnvironmentTable, tripartite
from fastedit.settings import check_ranges


@dataclass(frozen=True)
class InvariantConfig:
    """Settings of the tripartite risk and the penalty.

    Args:
        penalty: which environments the total variation runs over: "prompt_env" (every view and the generality risk,
            mean), "risk_env" (reliability, locality, generality, sum), "paper" (their sum is one environment, equation
            (9) read literally), "token" (every label token).
        direction: of the locality KL; "reverse_kl" is KL(edited || unedited), equation (3).
        weights: of reliability, locality and generality; all 1 in equation (9).
        dual_lr: γ2, step of the multiplier's network.
        learn_dual: False keeps the multiplier at its calibrated value (an ablation).
        scale: penalty size relative to the risk when it is switched on.
        max_ratio: λ is capped at this many times its calibrated scale.
        warmup: share of the steps before the penalty is switched on.
        smoothing: ε of the smoothed |Γ| = sqrt(Γ² + ε²) - ε.
        hidden: width of the multiplier's network.
        sketch: length of the count-sketch of φ that the network reads when φ is longer.
        unbiased: MMD² without its diagonal. Off: an edit has a handful of label tokens, and the unbiased form of so
            few is minimised below zero by pushing the edit's own tokens apart.
        seed: of the network and the sketch.
    """

    penalty: str = "prompt_env"
    direction: Direction = "reverse_kl"
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    dual_lr: float = 1e-3
    learn_dual: bool = True
    scale: float = 0.1
    max_ratio: float = 10.0
    warmup: float = 0.2
    smoothing: float = 1e-3
    hidden: int = 32
    sketch: int = 4096
    unbiased: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.penalty not in PENALTY_MODES:
            raise ValueError(f"odedit: penalty is one of {list(PENALTY_MODES)} (got penalty={self.penalty!r})")
        if self.direction not in ("reverse_kl", "forward_kl"):
            raise ValueError(f"odedit: direction is reverse_kl or forward_kl (got direction={self.direction!r})")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"odedit: warmup is a share of the steps, 0 to 1 (got warmup={self.warmup!r})")
        numbers = ("dual_lr", "scale", "max_ratio", "smoothing")
        check_ranges("odedit", self, at_least={"hidden": 1, "sketch": 1}, not_negative=numbers)
        if len(self.weights) != 3 or min(self.weights) < 0:
            raise ValueError(f"odedit: weights are three numbers >= 0 (got weights={self.weights!r})")


class InvariantObjective:
    """``R + λ·T`` per edit, with the dual step taken first (equation (13) in Gauss-Seidel order).

    At step k > 0 the multiplier's network ascends with T at the current φ before the primal uses λ; that is the
    paper's order (dual after primal) without an extra forward.

    Args:
        config: settings.
        steps: the optimiser steps planned, for the warm-up share.
    """

    roles: tuple[Role, ...] = ROLES

    def __init__(self, config: InvariantConfig, steps: int) -> None:
        self.config = config
        self.start = math.ceil(config.warmup * steps)
        self.scale: Tensor | None = None  # (B,) s_λ
        self.dual: DualNetwork | None = None

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
        multiplier = self._multiplier(tokens, total_risk.detach(), variation.detach(), steps, taken)
        penalty = multiplier * variation
        shown = multiplier.detach()
        if not all(number >= self.start for number in taken):
            on = steps >= self.start
            penalty, shown = torch.where(on, penalty, 0.0), torch.where(on, shown, 0.0)
        parts |= {"tv": variation.detach(), "lambda": shown}
        return Losses(total_risk + penalty, nll, all_correct(tokens), parts)

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

    def _multiplier(
        self, tokens: TokenBatch, risk: Tensor, variation: Tensor, steps: Tensor, taken: frozenset[int]
    ) -> Tensor:
        """λ (B,) after this step's dual ascent, of edits that have taken so many steps; before the start anything."""
        if tokens.flat is None:
            raise ValueError("odedit: the multiplier reads the delta's parameters (got flat=None)")
        if self.scale is None or self.dual is None:
            self.scale = torch.zeros_like(risk)
            self.dual = DualNetwork(tokens.flat, self.config)
        if self.start in taken:
            # softplus(0) = log 2: the penalty starts at ``scale`` times the risk
            fresh = steps == self.start
            scale = self.config.scale * risk / (math.log(2) * variation).clamp(min=1e-12)
            # In place: a recorded step reads both where they were
            self.scale.copy_(torch.where(fresh, scale, self.scale))
            self.dual.restart(fresh)
        summary = self.dual.summary(tokens.flat, tokens.sketched)
        if self.config.learn_dual and any(number > self.start for number in taken):
            since = (steps - self.start).clamp(min=0)
            self.dual.ascend(summary.detach(), variation * self.scale, self.config.dual_lr, since)
        return self.scale * self.dual(summary).clamp(max=self.config.max_ratio)


class DualNetwork:
    """B independent two-layer networks φ_b -> λ_b / s_b, softplus output, Xavier weights, zero bias.

    Args:
        flat: (B, P) parameters of the deltas.
        config: widths and seed.
    """

    def __init__(self, flat: Tensor, config: InvariantConfig) -> None:
        n, width = flat.shape
        generator = torch.Generator().manual_seed(config.seed)
        self.length = min(width, config.sketch)
        #: (P,) int8, where a sketch is read.
        self.signs: Tensor | None = None
        if width > config.sketch:
            signs = torch.randint(0, 2, (width,), generator=generator, dtype=torch.int8) * 2 - 1
            self.signs = signs.to(flat.device)
        hidden = config.hidden
        first = _xavier(self.length + 1, hidden, generator)
        second = _xavier(hidden, 1, generator)
        # Every edit starts from the same network, so that its result does not depend on its batch.
        self._first = [first.to(flat), flat.new_zeros(1, hidden), second.to(flat), flat.new_zeros(1, 1)]
        self.tensors = [tensor.expand(n, -1, -1).clone() for tensor in self._first]

    def restart(self, fresh: Tensor) -> None:
        """Give the networks of the edits in ``fresh`` (B,) bool their first values."""
        for first, tensor in zip(self._first, self.tensors, strict=True):
            tensor.copy_(torch.where(fresh[:, None, None], first, tensor))

    def summary(self, flat: Tensor, sketched: Callable[[Tensor, int], Tensor] | None = None) -> Tensor:
        """(B, length + 1): φ itself or its count-sketch, and the logarithm of its norm. Differentiable by φ.

        Args:
            flat: (B, P), φ. sketched: makes the sketch without reading it (``TokenBatch.sketched``).
        """
        if self.signs is not None and sketched is not None:
            return sketched(self.signs, self.length)
        norm = 0.5 * torch.log(flat.square().sum(1, keepdim=True) + 1e-12)
        if self.signs is None:
            return torch.cat([flat, norm], 1)
        padded = F.pad(flat * self.signs, (0, -flat.shape[1] % self.length))
        return torch.cat([padded.view(flat.shape[0], -1, self.length).sum(1), norm], 1)

    def __call__(self, summary: Tensor) -> Tensor:
        """(B,) softplus output."""
        first, bias, second, last = self.tensors
        hidden = torch.relu(torch.baddbmm(bias, summary[:, None, :], first))
        return F.softplus(torch.baddbmm(last, hidden, second)).view(-1)

    def ascend(self, summary: Tensor, weight: Tensor, lr: float, since: int | Tensor) -> None:
        """One normalised, diminishing ascent step on Σ_b weight_b · λ_b; norms are per edit and tensor.

        Args:
            since: (B,) int64, ascent steps counted from 1; none is made where it is 0.
        """
        for tensor in self.tensors:
            tensor.requires_grad_(True)
        with torch.enable_grad():
            grads = torch.autograd.grad((weight.detach() * self(summary)).sum(), self.tensors)
        since = since.to(weight.device) if isinstance(since, Tensor) else torch.full_like(weight, since)
        size = torch.where(since > 0, lr / (since.to(weight.dtype) + 1) ** 1.0001, 0.0).reshape(-1, 1, 1)
        for tensor, grad in zip(self.tensors, grads, strict=True):
            tensor.requires_grad_(False)
            norm = torch.linalg.vector_norm(grad, dim=(1, 2), keepdim=True)
            tensor += size * torch.where(norm > 0, grad / norm.clamp(min=1e-30), 0.0)


def penalty_bytes(config: InvariantConfig, parameters: int, edits: int, element: int, columns: int) -> int:
    """Bytes that the penalty takes beside a step's: networks and their gradients, signs, blocks of a sketch.

    Args:
        config: settings. parameters: of a delta. edits: B. element: bytes of a parameter.
        columns: of parameters that a sketch goes through at a time.
    """
    length = min(parameters, config.sketch)
    # The first one's expanded copy, weights, gradients, and what their update takes
    networks = 4 * edits * ((length + 3) * config.hidden + 1) * element
    if length == parameters:
        # Read as they are: with the norm beside, and their gradient
        return networks + 4 * edits * parameters * element
    return networks + parameters + 3 * edits * min(columns, parameters) * element


def _xavier(fan_in: int, fan_out: int, generator: torch.Generator) -> Tensor:
    bound = math.sqrt(6 / (fan_in + fan_out))
    return (torch.rand(fan_in, fan_out, generator=generator, dtype=torch.float64) * 2 - 1) * bound
