"""Let fitted edits act on a model for the length of a block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fastedit.backbone import EditableModel
from fastedit.deltas import EditDelta, Rows, accumulate, installed, stack


@contextmanager
def applied(
    model: EditableModel, delta: EditDelta | Sequence[EditDelta], *, check_model: bool = True
) -> Iterator[EditableModel]:
    """Inside the block the model answers as edited; on leaving it is bit-identical to what it was.

    Args:
        model: the base model.
        delta: one edit, or several of one method that act together, in the order in which they were made.
        check_model: refuse deltas that were fitted on another base model.
    Yields:
        The same model.
    Raises:
        ValueError: no delta, deltas of different kinds, or of another base model.
    """
    deltas = [delta] if isinstance(delta, EditDelta) else list(delta)
    if check_model:
        for each in deltas:
            if each.model_fingerprint and each.model_fingerprint != model.fingerprint:
                raise ValueError(
                    "applied: a delta belongs to the model it was fitted on "
                    f"(got delta model={each.model_fingerprint[:12]!r}, model={model.fingerprint[:12]!r})"
                )
    # Those that a router chooses from stay apart
    together = deltas if "router" in deltas[0].spec.options or len(deltas) == 1 else [accumulate(deltas)]
    with installed(model, stack(together, device=model.device), Rows()):
        yield model
