"""Losses for training loops that are not fastedit's: the ops as modules, with the labels convention of the field.

Logits are (..., V), labels (...) int64 with -100 where a token does not count, as in ``torch.nn.CrossEntropyLoss`` and
in transformers; hidden states are (..., d). All are differentiable once, run under autocast, gradient checkpointing
and ``torch.compile``, and keep their sums in float32 (float64 for float64).

`InvariantRisk` is ODEdit's objective over environments of a training set (arXiv 2601.19700, equations (9) to (12)),
`TripartiteRisk` the sum of its three risks (equation (9)).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastedit.ops import mmd2, risk
from fastedit.ops.risk import KINDS, Kind

__all__ = ["FusedLinearRisk", "InvariantRisk", "RiskLoss", "TripartiteRisk"]

IGNORE = -100
Reduction = Literal["mean", "sum", "none"]
REDUCTIONS = ("mean", "sum", "none")
#: Logits that `FusedLinearRisk` holds at a time, by default: 64 MiB of float32.
CHUNK_ELEMENTS = 1 << 24


def _check(owner: str, name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        listed = ", ".join(map(str, allowed))
        raise ValueError(f"{owner}: {name} must be one of {listed} (got {name}={value!r})")


def _reduced(value: Tensor, counted: Tensor, reduction: str) -> Tensor:
    """Token values as ``torch.nn.CrossEntropyLoss`` reduces them; a mean over no token is 0, not NaN."""
    if reduction == "none":
        return value
    total = value.sum()
    return total if reduction == "sum" else total / counted.sum().clamp(min=1)


class RiskLoss(nn.Module):
    """A token risk: cross-entropy, or the KL to or from reference logits.

    ``kind="ce"`` equals ``torch.nn.CrossEntropyLoss(ignore_index=-100)`` on (..., V) logits, but for a batch without
    any counted token, whose mean is 0.

    Args:
        kind: "ce"; "forward_kl", KL(reference || model); "reverse_kl", KL(model || reference).
        reduction: "mean" over counted tokens, "sum", or "none" (0 where a token is ignored).
        ignore_index: the label of tokens that do not count.
        shift: score the logits at a token by the next token's label, as causal language models do; labels are then
            those of the input.
    Raises:
        ValueError: an unknown kind or reduction.
    """

    def __init__(
        self, kind: Kind = "ce", *, reduction: Reduction = "mean", ignore_index: int = IGNORE, shift: bool = False
    ) -> None:
        super().__init__()
        _check("RiskLoss", "kind", kind, KINDS)
        _check("RiskLoss", "reduction", reduction, REDUCTIONS)
        self.kind, self.reduction, self.ignore_index, self.shift = kind, reduction, ignore_index, shift

    def forward(self, logits: Tensor, labels: Tensor, reference: Tensor | None = None) -> Tensor:
        """Return the loss.

        Args:
            logits: (..., V). labels: (...) int64; only which are ignored is read where ``kind`` is a KL.
            reference: (..., V) logits of the model that is to be kept close, for the KLs; constant.
        Raises:
            ValueError: shapes disagree, or reference logits are absent or not asked for.
        """
        value, counted, shape = _token_risks(self, logits, labels, reference)
        reduced = _reduced(value, counted, self.reduction)
        return reduced.view(shape) if self.reduction == "none" else reduced


def _token_risks(
    loss: RiskLoss, logits: Tensor, labels: Tensor, reference: Tensor | None
) -> tuple[Tensor, Tensor, torch.Size]:
    """Values of all tokens (0 where ignored), which count, and the shape of the labels that were scored."""
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"RiskLoss: labels must have the shape of the logits without the last dimension "
            f"(got labels {tuple(labels.shape)}, logits {tuple(logits.shape)})"
        )
    if (reference is None) != (loss.kind == "ce"):
        needed = "takes no reference logits" if loss.kind == "ce" else "needs reference logits"
        raise ValueError(f"RiskLoss: kind {loss.kind!r} {needed} (got reference={_shape(reference)})")
    if loss.shift:
        logits, labels = logits[..., :-1, :], labels[..., 1:]
        reference = None if reference is None else reference[..., :-1, :]
    flat, wanted = logits.flatten(0, -2), labels.flatten()
    counted = wanted != loss.ignore_index
    segments = torch.arange(flat.shape[0], device=flat.device).where(counted, -1)
    target = wanted if reference is None else reference.to(flat.dtype).flatten(0, -2)
    value, _ = risk(flat, target, segments, flat.shape[0], kind=loss.kind)
    return value, counted, labels.shape


def _shape(value: Tensor | None) -> str:
    return "None" if value is None else str(tuple(value.shape))


class FusedLinearRisk(nn.Module):
    """A token risk from hidden states and the language-model head, without all logits in memory at once.

    Logits are made a chunk of tokens at a time and made again in the backward, as in Liger Kernel's fused linear
    cross-entropy; ignored tokens are left out before the product. Gradients reach the hidden states and the head.

    Args:
        head: (..., d) -> (..., V), ``model.lm_head`` for example; used as it is, so its parameters stay the model's.
        kind, reduction, ignore_index, shift: as in `RiskLoss`.
        chunk: tokens a chunk; None takes as many as have 2^24 logits together.
    Raises:
        ValueError: an unknown kind or reduction, or a chunk below 1.
    """

    def __init__(
        self,
        head: nn.Module,
        kind: Kind = "ce",
        *,
        reduction: Reduction = "mean",
        ignore_index: int = IGNORE,
        shift: bool = False,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        if chunk is not None and chunk < 1:
            raise ValueError(f"FusedLinearRisk: chunk must be positive (got chunk={chunk})")
        self.loss = RiskLoss(kind, reduction="none", ignore_index=ignore_index)
        _check("FusedLinearRisk", "reduction", reduction, REDUCTIONS)
        # Registered, its parameters would be the loss's as well as the model's
        self._head = (head,)
        self.reduction, self.shift, self.chunk = reduction, shift, chunk

    def forward(self, hidden: Tensor, labels: Tensor, reference: Tensor | None = None) -> Tensor:
        """Return the loss of (..., d) hidden states; labels and reference logits as in `RiskLoss`."""
        if hidden.shape[:-1] != labels.shape:
            raise ValueError(
                f"FusedLinearRisk: labels must have the shape of the hidden states without the last dimension "
                f"(got labels {tuple(labels.shape)}, hidden {tuple(hidden.shape)})"
            )
        if self.shift:
            hidden, labels = hidden[..., :-1, :], labels[..., 1:]
            reference = None if reference is None else reference[..., :-1, :]
        wanted = labels.flatten()
        counted = (wanted != self.loss.ignore_index).nonzero().flatten()
        states, chosen = hidden.flatten(0, -2).index_select(0, counted), wanted.index_select(0, counted)
        goals = None if reference is None else reference.flatten(0, -2)
        parts = []
        for start in range(0, len(counted), self._tokens()):
            end = start + self._tokens()
            goal = None if goals is None else goals.index_select(0, counted[start:end])
            part = checkpoint(self._values, states[start:end], chosen[start:end], goal, use_reentrant=False)
            assert isinstance(part, Tensor)
            parts.append(part)
        value = torch.cat(parts) if parts else states.sum(1)
        if self.reduction == "none":
            return value.new_zeros(wanted.shape).index_copy(0, counted, value).view(labels.shape)
        return value.sum() / (max(1, len(counted)) if self.reduction == "mean" else 1)

    def _values(self, states: Tensor, labels: Tensor, reference: Tensor | None) -> Tensor:
        value: Tensor = self.loss(self._head[0](states), labels, reference)
        return value

    def _tokens(self) -> int:
        if self.chunk is not None:
            return self.chunk
        width = getattr(self._head[0], "out_features", None) or 1 << 16
        return max(1, CHUNK_ELEMENTS // width)


class InvariantRisk(nn.Module):
    """Mean risk over environments plus a total-variation penalty on how they would rescale the logits.

    ``R + λ·T``, with R the mean over environments e of their mean risk R_e and ``T = (mean_e |Γ_e|)²``, where
    ``Γ_e = ∂R_e(w·logits)/∂w`` at w = 1: ODEdit, equations (9) to (12) (arXiv 2601.19700), with λ constant here. An
    environment is whatever a data set says: a source, a template, an annotator. Environments that a batch lacks count
    nowhere.

    Args:
        environments: number E of environments.
        multiplier: λ, from 0 up.
        kind, ignore_index, shift: as in `RiskLoss`.
    Attributes:
        risks: (E,) R_e of the last batch, detached, NaN where an environment is absent; penalty: its T, detached.
    Raises:
        ValueError: an unknown kind, no environment, or a negative multiplier.
    """

    risks: Tensor
    penalty: Tensor

    def __init__(
        self,
        environments: int,
        *,
        multiplier: float = 1.0,
        kind: Kind = "ce",
        ignore_index: int = IGNORE,
        shift: bool = False,
    ) -> None:
        super().__init__()
        _check("InvariantRisk", "kind", kind, KINDS)
        if environments < 1:
            raise ValueError(f"InvariantRisk: environments must be positive (got environments={environments})")
        if multiplier < 0:
            raise ValueError(f"InvariantRisk: multiplier must not be negative (got multiplier={multiplier})")
        self.environments, self.multiplier, self.kind = environments, multiplier, kind
        self.ignore_index, self.shift = ignore_index, shift

    def forward(self, logits: Tensor, labels: Tensor, environment: Tensor, reference: Tensor | None = None) -> Tensor:
        """Return the loss, a scalar.

        Args:
            logits: (B, T, V) or (T, V). labels: (B, T) or (T,), as in `RiskLoss`.
            environment: (B,) int64 in [0, E), one a row; or of the labels' shape, one a token.
            reference: of the logits' shape, for the KLs.
        Raises:
            ValueError: shapes disagree.
        """
        if environment.shape != labels.shape:
            if environment.shape != labels.shape[:1]:
                raise ValueError(
                    f"InvariantRisk: environment must have one entry a row or a token "
                    f"(got environment {tuple(environment.shape)}, labels {tuple(labels.shape)})"
                )
            environment = environment[:, None].expand(labels.shape)
        if self.shift:
            logits, labels, environment = logits[..., :-1, :], labels[..., 1:], environment[..., 1:]
            reference = None if reference is None else reference[..., :-1, :]
        wanted = labels.flatten()
        segments = environment.flatten().where(wanted != self.ignore_index, -1)
        target = wanted if reference is None else reference.to(logits.dtype).flatten(0, -2)
        value, slope = risk(logits.flatten(0, -2), target, segments, self.environments, kind=self.kind)
        present = torch.zeros(self.environments + 1, dtype=value.dtype, device=value.device)
        present = present.index_fill(0, segments.where(segments >= 0, self.environments), 1.0)[:-1]
        count = present.sum().clamp(min=1)
        penalty = (slope.abs().sum() / count).square()
        self.risks, self.penalty = value.detach().where(present > 0, torch.nan), penalty.detach()
        loss: Tensor = value.sum() / count + self.multiplier * penalty
        return loss


class TripartiteRisk(nn.Module):
    """ODEdit's three risks summed: reliability, locality, generality (arXiv 2601.19700, equations (2), (3), (6), (9)).

    Args:
        weights: of reliability, locality and generality.
        ignore_index, shift: as in `RiskLoss`.
    Attributes:
        parts: (3,) the three risks of the last call, detached and unweighted.
    """

    parts: Tensor
    #: σ² of the kernel as multiples of the mean squared distance.
    SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)

    def __init__(
        self,
        weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
        *,
        ignore_index: int = IGNORE,
        shift: bool = False,
    ) -> None:
        super().__init__()
        self.weights = weights
        self.reliability = RiskLoss("ce", ignore_index=ignore_index, shift=shift)
        self.locality = RiskLoss("reverse_kl", ignore_index=ignore_index, shift=shift)

    def forward(
        self,
        edited: tuple[Tensor, Tensor],
        kept: tuple[Tensor, Tensor, Tensor] | None = None,
        states: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Return the weighted sum, a scalar; a part that is absent counts 0.

        Args:
            edited: logits (..., V) and labels (...) of what must change.
            kept: logits, labels (which count), and the reference logits of what must stay: KL(model || reference).
            states: last hidden states (n, d) of questions and (m, d) of their rewordings: MMD² between them, several
                Gaussian scales around their mean squared distance.
        """
        reliability: Tensor = self.reliability(*edited)
        zero = reliability.new_zeros(())
        locality = zero if kept is None else self.locality(*kept)
        generality = zero if states is None else self._generality(*states)
        self.parts = torch.stack([reliability, locality.to(reliability), generality.to(reliability)]).detach()
        rel, loc, gen = self.weights
        return rel * reliability + loc * locality + gen * generality

    def _generality(self, asked: Tensor, reworded: Tensor) -> Tensor:
        first, second = (torch.tensor([0, len(part)], device=part.device) for part in (asked, reworded))
        pooled = torch.cat([asked, reworded]).detach()
        pooled = pooled.to(torch.promote_types(pooled.dtype, torch.float32))
        # Over pairs i != j the mean squared distance is twice the unbiased variance
        distance = 2 * pooled.var(0).sum()
        scales = torch.tensor(self.SCALES, dtype=pooled.dtype, device=pooled.device)
        widths = (distance.clamp(min=1e-4) * scales).sqrt()[None]
        return mmd2(asked, reworded, first, second, widths)[0].sum()
