"""Plain negative log-likelihood of the target, and the same with a KL term on locality views."""

from __future__ import annotations

import torch
from torch import Tensor

from fastedit.objectives.base import KL_ROLES, Direction, Losses, Objective, Role, TokenBatch, all_correct, beside_roles
from fastedit.objectives.roles import repeated
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
        views = _nll_by_role(tokens, tokens.laid_out.fitted(tokens.logits), self.fitted)
        total = _mean_of_views(tokens, views, self.fitted)
        nll = views.detach()[:, 0]
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
        n_views: views of every role but the edit's own; a role weighs the same whatever their number.
    """

    def __init__(
        self,
        weight: float = 1.0,
        *,
        rephrases: bool = False,
        direction: Direction = "reverse_kl",
        rephrase_weight: float | None = None,
        n_views: int = 1,
    ) -> None:
        self.weight = weight
        self.direction = direction
        self.rephrase_weight = rephrase_weight
        fitted = (Role.EDIT, Role.TEXT_REPHRASE, Role.IMAGE_REPHRASE) if rephrases else (Role.EDIT,)
        self.fitted = fitted
        self.roles: tuple[Role, ...] = repeated((*fitted, *KL_ROLES), n_views)

    def __call__(self, tokens: TokenBatch, steps: int | Tensor) -> Losses:
        """Losses; ``steps`` is not used."""
        n, layout = tokens.n_edits, tokens.laid_out
        if tokens.reference is None and layout.n_out:
            raise ValueError("objective: reference logits are needed for locality views (got reference=None)")
        fitted, out = layout.split(tokens.logits)
        views = _nll_by_role(tokens, fitted, self.fitted)
        fit = self._fit(tokens, views)
        if out is None or tokens.reference is None:
            kl = torch.zeros_like(fit)
        else:
            kl = risk(out, tokens.reference, layout.out_edits, n, kind=self.direction)[0]
        total = fit + self.weight * kl
        nll = views.detach()[:, 0]
        if self.rephrase_weight is None:
            return Losses(total, nll, all_correct(tokens), {"nll": nll, "kl": kl.detach()})
        worst = views.detach().amax(1)
        return Losses(total, worst, all_correct(tokens, *self.fitted), {"nll": nll, "kl": kl.detach()})

    def _fit(self, tokens: TokenBatch, views: Tensor) -> Tensor:
        """(B,) of the NLL (B, n) of every fitted view, the edit's own first."""
        if self.rephrase_weight is None:
            return _mean_of_views(tokens, views, self.fitted)
        if len(self.fitted) == 1:
            return views[:, 0]
        return views[:, 0] + self.rephrase_weight * _mean_of_views(tokens, views[:, 1:], self.fitted[1:])


class RetainingObjective:
    """An objective without a KL term, plus one on rows of locality roles that its edits were given from outside.

    An edit is right where it is itself, and the likeliest token of each of those rows is still what it was: else a fit
    would stop at the first step that says the target, whatever that did to them.

    Args:
        inner: the objective, which has no locality views of its own. weight: of KL(before || after) on those rows.
    """

    def __init__(self, inner: Objective, weight: float) -> None:
        self.inner, self.weight = inner, weight
        self.roles: tuple[Role, ...] = inner.roles
        self.beside: tuple[Role, ...] = beside_roles(inner)

    def __call__(self, tokens: TokenBatch, steps: int | Tensor) -> Losses:
        """The inner losses, with the term added to what is minimised."""
        losses, layout = self.inner(tokens, steps), tokens.laid_out
        _, out = layout.split(tokens.logits)
        if out is None or tokens.reference is None:
            return losses
        kl = risk(out, tokens.reference, layout.out_edits, tokens.n_edits, kind="forward_kl")[0]
        total = losses.total + self.weight * kl
        moved = (out.detach().argmax(-1) != tokens.reference.argmax(-1)).long()
        count = torch.zeros(tokens.n_edits, dtype=torch.long, device=moved.device)
        correct = losses.correct & (count.index_add_(0, layout.out_edits, moved) == 0)
        return Losses(total, losses.nll, correct, {**losses.parts, "retained_kl": kl.detach()})


def _nll_by_role(tokens: TokenBatch, fitted: Tensor, roles: tuple[Role, ...]) -> Tensor:
    """Mean NLL (B, n) of an edit's tokens of every role, from the logits (T_fitted, V) of what must change."""
    layout = tokens.laid_out
    labels = layout.fitted(tokens.labels)
    value, _ = risk(fitted, labels, layout.segments(*roles), tokens.n_edits * len(roles), kind="ce")
    return value.view(tokens.n_edits, len(roles))


def _mean_of_views(tokens: TokenBatch, values: Tensor, roles: tuple[Role, ...]) -> Tensor:
    """Mean (B,) of the values (B, n) of views that an edit has; 0 where it has none."""
    return values[:, 0] if len(roles) == 1 else tokens.laid_out.mean(values, roles)
