"""The view an objective has of a batch: label tokens with their edit and role."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from fastedit.objectives.layout import BatchLayout
from fastedit.objectives.roles import CE_ROLES, KL_ROLES, ROLES, Role
from fastedit.ops import risk

__all__ = [
    "CE_ROLES",
    "KL_ROLES",
    "ROLES",
    "Direction",
    "Losses",
    "Objective",
    "Role",
    "TokenBatch",
    "all_correct",
    "losses_by_role",
]

# Of a KL: KL(unedited || edited) or KL(edited || unedited)
Direction = Literal["forward_kl", "reverse_kl"]


@dataclass
class TokenBatch:
    """Label tokens of all views of B edits, packed; token t predicts ``labels[t]``.

    Args:
        hidden: (T, d) final hidden states of the edited model.
        logits: (T, V) of the edited model.
        labels: (T,) int64.
        edit: (T,) int64, the edit a token belongs to.
        role: (T,) int64, values of Role.
        n_edits: B.
        reference: (T_out, V) logits of the unedited model for the tokens of KL roles, in their order; None when unused.
        flat: (B, P) parameters of the deltas (a leaf when the objective may differentiate by them); None when unused.
        sketched: makes of signs (P,) int8 and a length L < P the count-sketch (B, L + 1) of ``flat`` with the logarithm
            of its norm, differentiable by the parameters (``deltas.sketch``); None makes it of ``flat``.
        layout: of ``edit`` and ``role``; None is made of them at its first use, which reads them off the device.
        taken: the numbers of steps that occur among the edits at work, where the host knows them without asking.
    """

    hidden: Tensor
    logits: Tensor
    labels: Tensor
    edit: Tensor
    role: Tensor
    n_edits: int
    reference: Tensor | None = None
    flat: Tensor | None = None
    sketched: Callable[[Tensor, int], Tensor] | None = None
    layout: BatchLayout | None = None
    taken: frozenset[int] | None = None
    _made: BatchLayout | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def laid_out(self) -> BatchLayout:
        """The layout that was given, or made of edits and roles."""
        if self.layout is not None:
            return self.layout
        if self._made is None:
            self._made = BatchLayout.of(self.edit, self.role, self.n_edits)
        return self._made

    def steps_taken(self, steps: int | Tensor) -> frozenset[int]:
        """The numbers of steps that occur among the edits at work; asks for ``steps`` where they are not known."""
        if self.taken is not None:
            return self.taken
        return frozenset([steps] if isinstance(steps, int) else steps.tolist())

    def is_role(self, *roles: Role) -> Tensor:
        """(T,) bool, tokens of any of the roles."""
        mask = torch.zeros_like(self.role, dtype=torch.bool)
        for role in roles:
            mask |= self.role == int(role)
        return mask


@dataclass
class Losses:
    """Per-edit outcome of one evaluation of an objective.

    Args:
        total: (B,) what is minimised; differentiable.
        nll: (B,) mean negative log-likelihood of the target, detached.
        correct: (B,) bool, every target token is the argmax.
        parts: named (B,) values for the record, detached.
    """

    total: Tensor
    nll: Tensor
    correct: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """A loss per edit; ``roles`` says which views it needs besides the edit itself."""

    roles: tuple[Role, ...]

    def __call__(self, tokens: TokenBatch, steps: int | Tensor) -> Losses:
        """Losses after so many optimiser steps: one number, or (B,) int64, an edit's own. No tokens give zeros."""


def beside_roles(objective: Objective) -> tuple[Role, ...]:
    """Roles of the views that an objective has no loss on: a delta with a loss of its own reads them."""
    return getattr(objective, "beside", ())


def branch_of(objective: Objective, taken: frozenset[int]) -> Hashable:
    """What the ops of an objective depend on where the edits at work have taken these numbers of steps."""
    return objective.branch(taken) if hasattr(objective, "branch") else None


def all_correct(tokens: TokenBatch, *roles: Role) -> Tensor:
    """(B,) bool: every token of some roles' views, by default the edit's, has its label as the largest logit.

    The roles are of those that must change.
    """
    layout = tokens.laid_out
    logits, labels = layout.fitted(tokens.logits.detach()), layout.fitted(tokens.labels)
    if logits.device.type == "cpu" and logits.dtype in (torch.bfloat16, torch.float16):
        # torch finds the largest of half-precision numbers five times as slowly
        logits = logits.float()
    # All fitted tokens, not a selection of logits
    wrong = logits.argmax(-1) != labels
    chosen = layout.chosen(*(roles or (Role.EDIT,)))
    wrong = wrong if chosen is None else wrong & chosen
    count = torch.zeros(tokens.n_edits, dtype=torch.long, device=labels.device)
    return count.index_add_(0, layout.fitted_edits, wrong.long()) == 0


def losses_by_role(tokens: TokenBatch) -> Tensor:
    """(B, roles) by edit and role: the NLL of views that must change, KL(unedited || edited) of those that must not."""
    n, n_roles, layout = tokens.n_edits, len(ROLES), tokens.laid_out
    fitted, out = layout.split(tokens.logits)
    value, _ = risk(fitted, layout.fitted(tokens.labels), layout.segments(*ROLES), n * n_roles, kind="ce")
    if out is not None and tokens.reference is not None and tokens.reference.shape[0]:
        kl, _ = risk(out, tokens.reference, layout.out_slots, n * n_roles, kind="forward_kl")
        value = value + kl
    return value.view(n, n_roles)
