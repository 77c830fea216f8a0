"""The multiplier λ of ODEdit's penalty: how large it begins, and how it climbs while the constraint T = 0 is violated.

ODEdit (arXiv 2601.19700), equations (11) to (13): ``min_φ max_δ R(φ) + λ(δ, φ) · T(φ)``. Since T >= 0 the ascent can
only raise λ; what lowers it is the primal step, where λ is a function of φ that it differentiates (``T · ∂λ/∂φ``). In
the code that is public for the paper's multiplier (OOD-TV-IRM, arXiv 2502.19665) ascent steps are short or shrink with
1/k, and the primal wins: λ falls from the moment it is there. Here an ascent step raises log λ by ``dual_lr`` times T
over its running mean, in every variant, and first by what the primal step before has taken from it: a rate that depends
neither on the size of T nor on the network, as a step of the primal's Adam does not depend on the size of its gradient.

λ is per edit ``scale · ratio · share``. The scale makes the penalty a share of the risk, by running means of R and T;
the ratio begins at 1 and is what the ascent changes; the share falls by ``backoff`` at each step before which the edit
no longer says its target. Ours: a penalty that keeps its size lowers T where it can by taking the edit back (T falls
with the slope of the loss, and is small where every answer is as likely as another).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from fastedit.objectives.base import TokenBatch
from fastedit.objectives.config import InvariantConfig

#: Steps that running means of R and T remember: |Γ| crosses zero within a fit, and one step's T says little.
MEMORY = 5


class Multiplier:
    """λ of B edits, each by itself; every state is changed where it lies, so that a recorded step can be replayed.

    Args:
        config: settings.
        start: the number of steps after which the penalty is there.
    """

    def __init__(self, config: InvariantConfig, start: int) -> None:
        self.config, self.start = config, start
        #: (B,) running means of R and T, and the size that λ begins with.
        self.mean_risk: Tensor | None = None
        self.mean_variation: Tensor | None = None
        self.scale: Tensor | None = None
        #: (B,) bool, the target was said at a step with the penalty on; what is left of λ since then.
        self.was_said: Tensor | None = None
        self.share: Tensor | None = None
        self.dual: Dual | None = None

    @property
    def ascends(self) -> bool:
        """Whether the ratio ever leaves 1."""
        return self.config.learn_dual and self.config.dual != "constant"

    def __call__(
        self, tokens: TokenBatch, risk: Tensor, variation: Tensor, said: Tensor, steps: Tensor, taken: frozenset[int]
    ) -> Tensor:
        """λ (B,) after this step's ascent; of edits before the start anything.

        Args:
            tokens: whose ``flat`` a network reads. risk, variation: (B,) R and T, detached. said: (B,) bool, the edit
                says its target. steps: (B,) int64, taken so far. taken: the numbers that occur in it.
        Raises:
            ValueError: a network without ``flat``.
        """
        since = steps - self.start
        scale, mean = self._calibrate(risk, variation, since)
        if self.config.backoff < 1:
            scale = scale * self._back_off(said, since, scale)
        if not self.ascends:
            return scale
        dual = self._dual(tokens, risk)
        summary = dual.read(tokens)
        if self.config.dual == "network-detached":
            summary = summary.detach()
        if self.start in taken:
            dual.restart(since == 0, summary.detach())
        if any(number > self.start for number in taken):
            pace = self.config.dual_lr * variation / mean.clamp(min=1e-30)
            dual.ascend(summary.detach(), torch.where(since > 0, pace, 0.0), self.config.max_ratio)
        return scale * dual(summary).clamp(max=self.config.max_ratio)

    def _calibrate(self, risk: Tensor, variation: Tensor, since: Tensor) -> tuple[Tensor, Tensor]:
        """The scale and the running mean of T (B,), of edits that have had the penalty for so many steps."""
        if self.scale is None or self.mean_risk is None or self.mean_variation is None:
            self.scale = torch.zeros_like(risk)
            self.mean_risk, self.mean_variation = torch.zeros_like(risk), torch.zeros_like(risk)
        # The mean of all so far, then one that forgets
        share = (1 / (since.clamp(min=0) + 1).to(risk.dtype)).clamp(min=1 / MEMORY)
        for mean, value in ((self.mean_risk, risk), (self.mean_variation, variation)):
            # Whatever was left there, NaN included, is no part of a fresh edit's
            mean.copy_(torch.where(since <= 0, value, mean + share * (value - mean)))
        scale = self.config.scale * self.mean_risk / self.mean_variation.clamp(min=1e-12)
        self.scale.copy_(torch.where(since < self.config.calibration, scale, self.scale))
        return self.scale.clone(), self.mean_variation

    def _back_off(self, said: Tensor, since: Tensor, like: Tensor) -> Tensor:
        """The share (B,) of λ that is left: 0 before the target is first said, less by each step that has lost it."""
        if self.was_said is None or self.share is None:
            self.was_said, self.share = torch.zeros_like(said), torch.ones_like(like)
        fresh = since <= 0
        self.was_said.logical_and_(~fresh)
        self.share.copy_(torch.where(fresh, 1.0, self.share))
        self.share.mul_(torch.where(self.was_said & ~said, self.config.backoff, 1.0))
        self.was_said.logical_or_(said)
        return torch.where(self.was_said, self.share, 0.0)

    def _dual(self, tokens: TokenBatch, risk: Tensor) -> Dual:
        if self.dual is None:
            if self.config.dual == "scalar":
                self.dual = DualScalar(risk)
            elif tokens.flat is None:
                raise ValueError("odedit: the multiplier's network reads the delta's parameters (got flat=None)")
            else:
                self.dual = DualNetwork(tokens.flat, self.config)
        return self.dual


class Dual(Protocol):
    """B ratios λ_b / s_b, each 1 where its edit begins."""

    def read(self, tokens: TokenBatch, /) -> Tensor:
        """What it goes by of φ (B, n), differentiable."""

    def restart(self, fresh: Tensor, summary: Tensor, /) -> None:
        """Begin anew for the edits in ``fresh`` (B,) bool, whose φ that is."""

    def __call__(self, summary: Tensor, /) -> Tensor:
        """(B,) ratios there."""

    def ascend(self, summary: Tensor, pace: Tensor, most: float, /) -> None:
        """Raise the logarithms by ``pace`` (B,), of ratios below ``most``.

        What is capped is not wound up further, and so comes down as soon as the primal lowers it.
        """


class DualScalar:
    """B numbers log(λ_b / s_b) that begin at 0.

    Args:
        like: (B,), whose dtype and device they have.
    """

    def __init__(self, like: Tensor) -> None:
        self.log = torch.zeros_like(like)

    def read(self, _tokens: TokenBatch) -> Tensor:
        """(B, 0): nothing of φ."""
        return self.log.new_zeros(len(self.log), 0)

    def restart(self, fresh: Tensor, _summary: Tensor) -> None:
        """Begin anew for the edits in ``fresh`` (B,) bool."""
        self.log.copy_(torch.where(fresh, 0.0, self.log))

    def __call__(self, _summary: Tensor) -> Tensor:
        """(B,) ratios."""
        return self.log.exp()

    def ascend(self, _summary: Tensor, pace: Tensor, most: float) -> None:
        """Raise the logarithms by ``pace`` (B,), of ratios below ``most``."""
        self.log.add_(torch.where(self.log.exp() < most, pace, 0.0))


class DualNetwork:
    """B independent two-layer networks φ_b -> λ_b / s_b: softplus over its first value, Xavier weights, zero bias.

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
        #: (B,) outputs at the φ that an edit begins with; the logarithm of the ratio that the last ascent aimed at.
        self.begun, self.reached = flat.new_full((n,), math.log(2)), flat.new_zeros(n)

    def restart(self, fresh: Tensor, summary: Tensor) -> None:
        """Give the networks of the edits in ``fresh`` (B,) bool their first values, whose ratio is 1 at ``summary``."""
        for first, tensor in zip(self._first, self.tensors, strict=True):
            tensor.copy_(torch.where(fresh[:, None, None], first, tensor))
        self.begun.copy_(torch.where(fresh, self._output(summary), self.begun))
        self.reached.copy_(torch.where(fresh, 0.0, self.reached))

    def read(self, tokens: TokenBatch) -> Tensor:
        """The summary of the deltas' parameters."""
        if tokens.flat is None:
            raise ValueError("odedit: the multiplier's network reads the delta's parameters (got flat=None)")
        return self.summary(tokens.flat, tokens.sketched)

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
        """(B,) ratios at a summary of φ."""
        return self._output(summary) / self.begun

    def _output(self, summary: Tensor) -> Tensor:
        first, bias, second, last = self.tensors
        hidden = torch.relu(torch.baddbmm(bias, summary[:, None, :], first))
        return F.softplus(torch.baddbmm(last, hidden, second)).view(-1)

    def ascend(self, summary: Tensor, pace: Tensor, most: float) -> None:
        """One step along the gradient of log λ by δ, as long as raises it by ``pace`` (B,) to first order.

        What a primal step has taken from λ since the last ascent is given back on top, so that the ascent keeps pace
        with a primal that differentiates λ. A network stays to the bit where its pace is 0 or its ratio is at ``most``.
        """
        highest = math.log(max(most, 1e-30))
        for tensor in self.tensors:
            tensor.requires_grad_(True)
        with torch.enable_grad():
            ratio = torch.log(self(summary))
            grads = torch.autograd.grad(ratio.sum(), self.tensors)
        ratio = ratio.detach()
        square = torch.stack([grad.square().sum((1, 2)) for grad in grads]).sum(0)
        climbs = (pace > 0) & (ratio < highest)
        aim = torch.maximum(self.reached, ratio) + pace
        self.reached.copy_(torch.where(climbs, aim, self.reached).clamp(max=highest))
        size = torch.where(climbs, (self.reached - ratio) / square.clamp(min=1e-12), 0.0).reshape(-1, 1, 1)
        for tensor, grad in zip(self.tensors, grads, strict=True):
            tensor.requires_grad_(False)
            tensor += torch.where(size > 0, size * grad, 0.0)


def multiplier_bytes(config: InvariantConfig, parameters: int, edits: int, element: int, columns: int) -> int:
    """Bytes that the multipliers take beside a step's: networks and their gradients, signs, blocks of a sketch.

    Args:
        config: settings. parameters: of a delta. edits: B. element: bytes of a parameter.
        columns: of parameters that a sketch goes through at a time.
    """
    if not config.learn_dual or config.dual in ("scalar", "constant"):
        return 8 * edits * element
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
