"""Plain negative log-likelihood of the target, and the same with a KL term on locality views."""

from __future__ import annotations

import torch
from torch import Tensor

from fastedit.objectives.base import KL_ROLES, Direction, Losses, Role, TokenBatch, all_correct
from fastedit.ops import risk


class NLLObjective:
    """Mean NLL of the target tokens of the edit view, per edit (the loss of FT and LoRA editing).

    Args:
        fitted: views whose NLL is averaged, the edit view first.
        beside: views that are not in the loss, for deltas with a loss of their own: of their rows no more runs along
            than the delta reads.
    """

    def __init__(self, fitted: tuple[Role, ...] = (Role.EDIT,), beside: tuple[Role, ...] = ()) -> None:
        self.fitted, self.beside = fitted, beside
        self.roles: tuple[Role, ...] = (*fitted, *beside)

    def __call__(self, tokens: TokenBatch, steps: int | Tensor) -> Losses:
        """Losses; ``steps`` is not used."""
        views = [_segment_nll(tokens, role, tokens.n_edits) for role in self.fitted]
        total = views[0][0] if len(views) == 1 else _mean_present([v for v, _ in views], [p for _, p in views])
        nll = views[0][0].detach()
        return Losses(total, nll, all_correct(tokens), {"nll": nll})


class KLObjective:
    """NLL on the edit view and, when wanted, its rephrases, plus a weighted KL to the unedited model on locality views.

    ``FT + KL`` of the editing literature. The direction is KL(edited || unedited) by default, as in ODEdit's equation
    (3); ``direction="forward_kl"`` is KL(unedited || edited), as in MEND's training loss (arXiv 2110.11309).

    Args:
        weight: of the KL term.
        rephrases: also fit the rephrased views (mean over the views).
        direction: "reverse_kl" or "forward_kl".
        rephrase_weight: fit the edit, and the mean of its rephrased views with this weight; an edit is right where they
            are as well, and its NLL is that of its worst view. None takes all views alike and asks for the edit alone.
    """

    def __init__(
        self,
        weight: float = 1.0,
        *,
        rephrases: bool = False,
        direction: Direction = "reverse_kl",
        rephrase_weight: float | None = None,
    ) -> None:
        self.weight = weight
        self.direction = direction
        self.rephrase_weight = rephrase_weight
        fitted = (Role.EDIT, Role.TEXT_REPHRASE, Role.IMAGE_REPHRASE) if rephrases else (Role.EDIT,)
        self.fitted = fitted
        self.roles: tuple[Role, ...] = (*fitted, *KL_ROLES)

    def __call__(self, tokens: TokenBatch, steps: int | Tensor) -> Losses:
        """Losses; ``steps`` is not used."""
        n = tokens.n_edits
        nll_views = [_segment_nll(tokens, role, n) for role in self.fitted]
        fit = self._fit(nll_views)
        locality = tokens.is_role(*KL_ROLES)
        out = torch.zeros_like(fit)
        if tokens.reference is None:
            if bool(locality.any()):
                raise ValueError("objective: reference logits are needed for locality views (got reference=None)")
        elif tokens.reference.shape[0]:
            out = risk(tokens.logits[locality], tokens.reference, tokens.edit[locality], n, kind=self.direction)[0]
        total = fit + self.weight * out
        nll = nll_views[0][0].detach()
        if self.rephrase_weight is None:
            return Losses(total, nll, all_correct(tokens), {"nll": nll, "kl": out.detach()})
        worst = torch.stack([value.detach() for value, _ in nll_views]).amax(0)
        return Losses(total, worst, all_correct(tokens, *self.fitted), {"nll": nll, "kl": out.detach()})

    def _fit(self, views: list[tuple[Tensor, Tensor]]) -> Tensor:
        """(B,) of the NLL of every fitted view and whether an edit has it, the edit's own first."""
        if self.rephrase_weight is None:
            return _mean_present([value for value, _ in views], [has for _, has in views])
        if len(views) == 1:
            return views[0][0]
        return views[0][0] + self.rephrase_weight * _mean_present([v for v, _ in views[1:]], [p for _, p in views[1:]])


def _segment_nll(tokens: TokenBatch, role: Role, n: int) -> tuple[Tensor, Tensor]:
    """Mean NLL (B,) of one role and whether each edit has tokens of it (B,) bool."""
    chosen = tokens.is_role(role)
    segments = torch.where(chosen, tokens.edit, -1)
    present = torch.zeros(n, dtype=torch.bool, device=tokens.edit.device)
    present[tokens.edit[chosen]] = True
    value, _ = risk(tokens.logits, tokens.labels, segments, n, kind="ce")
    return value, present


def _mean_present(values: list[Tensor], present: list[Tensor]) -> Tensor:
    """Mean over the listed (B,) values that are present, per edit; 0 where none is."""
    table = torch.stack(values, 1)
    mask = torch.stack(present, 1).to(table.dtype)
    return (table * mask).sum(1) / mask.sum(1).clamp(min=1)
