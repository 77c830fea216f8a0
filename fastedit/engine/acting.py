"""Let fitted edits act on a model for the length of a block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from fastedit.backbone import EditableModel
from fastedit.backbone.context import overridden
from fastedit.deltas import EditDelta, Rows, installed
from fastedit.engine.stacking import Checks, put_together


@contextmanager
def applied(
    model: EditableModel,
    delta: EditDelta | Sequence[EditDelta],
    *,
    check_model: bool = True,
    check_sequence: bool = True,
) -> Iterator[EditableModel]:
    """Inside the block the model answers as edited; on leaving it is bit-identical to what it was.

    The edits act in the context that the block is entered in: other threads and tasks have the base model, or edits of
    their own. ``fastedit.edit`` inside the block edits what acts there, and its deltas belong to that model.

    Args:
        model: the base model.
        delta: one edit, or several of one method that act together, in the order in which they were made.
        check_model: refuse deltas that were fitted on another base model, or on top of other deltas.
        check_sequence: refuse deltas that act always and were not fitted on top of those before them: together they are
            not what was scored. False adds them up all the same.
    Yields:
        The same model.
    Raises:
        TypeError: something else than deltas.
        ValueError: no delta, deltas of different kinds, of another base model, or not fitted in this company.
    """
    with ExitStack() as entered:
        entered.enter_context(acting(model, delta, Checks(check_model, check_sequence)))
        for module in model.hf.modules():
            if hasattr(module, "save_pretrained"):
                entered.enter_context(overridden(module, lambda _stock: refuse_to_save, "save_pretrained"))
        yield model


@contextmanager
def acting(model: EditableModel, delta: EditDelta | Sequence[EditDelta], checks: Checks) -> Iterator[None]:
    """What ``applied`` does, but that the model's own calls alone are known to happen inside the block."""
    together = put_together(model, delta, checks)
    with installed(model, together.stacked, Rows(), key=together.key):
        yield


def refuse_to_save(*_args: Any, **_options: Any) -> None:
    """Stand in for ``save_pretrained`` where edits act that are not in the weights."""
    raise ValueError(
        "save_pretrained: inside of applied the weights are still those of the base model, which would be written "
        "without the edits; save those by Run.save or fastedit.deltas.save_deltas, or leave the block to save the base"
    )
