"""The view an objective has of a batch: label tokens with their edit and role."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal, Protocol

import torch
from torch import Tensor

from fastedit.ops import risk


class Role(IntEnum):
    """What a training view is for (ODEdit, arXiv 2601.19700, section 3: IN, SE and OUT prompt groups)."""

    EDIT = 0  # IN: the edit itself
    TEXT_REPHRASE = 1  # SE: another wording
    IMAGE_REPHRASE = 2  # SE: another picture of the same
    TEXT_LOCALITY = 3  # OUT: an unrelated text-only question
    IMAGE_LOCALITY = 4  # OUT: an unrelated question about an image


ROLES = tuple(Role)
# Of a KL: KL(unedited || edited) or KL(edited || unedited)
Direction = Literal["forward_kl", "reverse_kl"]
CE_ROLES = (Role.EDIT, Role.TEXT_REPHRASE, Role.IMAGE_REPHRASE)
KL_ROLES = (Role.TEXT_LOCALITY, Role.IMAGE_LOCALITY)


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
    """

    hidden: Tensor
    logits: Tensor
    labels: Tensor
    edit: Tensor
    role: Tensor
    n_edits: int
    reference: Tensor | None = None
    flat: Tensor | None = None

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


def all_correct(tokens: TokenBatch, *roles: Role) -> Tensor:
    """(B,) bool: every token of some roles' views, by default the edit's, has its label as the largest logit."""
    logits = tokens.logits.detach()
    if logits.device.type == "cpu" and logits.dtype in (torch.bfloat16, torch.float16):
        # torch finds the largest of half-precision numbers five times as slowly
        logits = logits.float()
    # All tokens, not a selection: a GPU need not be waited for
    wrong = (logits.argmax(-1) != tokens.labels) & tokens.is_role(*(roles or (Role.EDIT,)))
    count = torch.zeros(tokens.n_edits, dtype=torch.long, device=tokens.labels.device)
    return count.index_add_(0, tokens.edit, wrong.long()) == 0


def losses_by_role(tokens: TokenBatch) -> Tensor:
    """(B, roles) by edit and role: the NLL of views that must change, KL(unedited || edited) of those that must not."""
    n, n_roles = tokens.n_edits, len(ROLES)
    slot = tokens.edit * n_roles + tokens.role
    fitted = tokens.is_role(*CE_ROLES)
    value, _ = risk(tokens.logits, tokens.labels, torch.where(fitted, slot, -1), n * n_roles, kind="ce")
    if tokens.reference is not None and tokens.reference.shape[0]:
        kl, _ = risk(tokens.logits[~fitted], tokens.reference, slot[~fitted], n * n_roles, kind="forward_kl")
        value = value + kl
    return value.view(n, n_roles)
