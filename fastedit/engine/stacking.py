"""Deltas that are to act together, checked and stacked: what ``applied`` and ``attach`` install."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastedit.backbone import EditableModel
from fastedit.deltas import EditDelta, StackedDelta, accumulate, stack
from fastedit.deltas.kinds import is_mapped
from fastedit.engine.apply import (
    check_one,
    checked_deltas,
    memories,
    not_in_sequence,
    require_sequence,
)


@dataclass(frozen=True)
class Checks:
    """What is refused of deltas.

    Args:
        model: those of another base model. sequence: those that were not fitted in this company.
        apart: deltas that act always and were fitted apart stay apart, each for the rows that name it.
    """

    model: bool = True
    sequence: bool = True
    apart: bool = False


@dataclass(frozen=True)
class Together:
    """Deltas as they act together.

    Args:
        stacked: of ``count`` deltas, or sums of deltas. key: tells them from others.
        needs_choice: whether they act on no row unless it is said which.
    """

    stacked: StackedDelta
    key: str
    count: int
    needs_choice: bool = False


def put_together(
    model: EditableModel,
    delta: Any,
    checks: Checks,
    *,
    earlier: Together | None = None,
    keep: bool = True,
) -> Together:
    """Check deltas and stack them.

    Args:
        earlier: what was made of some of the deltas; what it has of those in storage is taken over.
        keep: whether the model keeps the stack of deltas in storage for the next call that takes them.
    Raises:
        TypeError, ValueError: see ``fastedit.applied``.
    """
    if not isinstance(delta, EditDelta) and is_mapped(delta):
        return _from_storage(model, delta, checks, earlier, keep)
    deltas = checked_deltas(model, delta, check_model=checks.model)
    routed = "router" in deltas[0].spec.options
    if routed:
        together = memories(deltas, checks.sequence)
    elif checks.apart and (len(deltas) == 1 or (checks.sequence and not any(each.fitted_on for each in deltas))):
        together = deltas
    else:
        if checks.sequence:
            require_sequence(deltas)
        together = deltas[:1] if len(deltas) == 1 else [accumulate(deltas)]
    stacked: StackedDelta = stack(together, device=model.device)
    return Together(stacked, key_of([each.id for each in together]), len(together), len(together) > 1 and not routed)


def key_of(ids: Sequence[str]) -> str:
    """What tells deltas from others: the id of one, a digest of those of several."""
    return ids[0] if len(ids) == 1 else hashlib.sha256("|".join(ids).encode()).hexdigest()


def _from_storage(
    model: EditableModel, deltas: Sequence[EditDelta], checks: Checks, earlier: Together | None, keep: bool
) -> Together:
    """Deltas that stay in storage; what was stacked of a sequence serves again."""
    # Which model they were checked against
    case = checks, model.fingerprint if checks.model else ""
    together: Together | None = model.stacks.get(deltas, case)
    if together is None or together.count != len(deltas):
        before = together or earlier
        stacked: Any = stack(
            deltas,
            device=model.device,
            check=_check_of(model, checks, len(deltas)),
            earlier=None if before is None else before.stacked,
        )
        together = Together(stacked, key_of(stacked.ids), len(deltas))
        if keep:
            model.stacks.put(deltas, case, together)
    return together


def _check_of(model: EditableModel, checks: Checks, count: int) -> Callable[[int, EditDelta], None]:
    """What is asked of each delta once, when it is read for the first time."""
    sound: set[str] = set()

    def check(number: int, delta: EditDelta) -> None:
        # One model after another is looked at, not one delta after another
        if checks.model and delta.model_fingerprint not in sound:
            check_one(model, delta)
            sound.add(delta.model_fingerprint)
        if checks.sequence and delta.fitted_on:
            raise ValueError(not_in_sequence(number, delta, count))

    return check
