"""Whether deltas may act on a model, and together."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from fastedit.backbone import EditableModel
from fastedit.backbone.active import active_key, installed_on
from fastedit.deltas import EditDelta, accumulate, company

#: The text of a delta that says how the model was when it was fitted, where other models may have it.
AS_FITTED = "fitted_as"
#: Begins a fingerprint of names and shapes alone.
ARCHITECTURE = "architecture:"


def fitted_as(model: EditableModel) -> str:
    """Dtype and quantization of a model, in words."""
    return f"{str(model.dtype).removeprefix('torch.')}, quantize={model.quantize}"


def checked_deltas(
    model: EditableModel, delta: EditDelta | Sequence[EditDelta], *, check_model: bool = True
) -> list[EditDelta]:
    """The deltas as a list, each of this base model.

    Raises:
        TypeError: something else than deltas. ValueError: none, or one of another model.
    """
    deltas = [delta] if isinstance(delta, EditDelta) else _listed(delta)
    sound: set[str] = set()
    for each in deltas if check_model else ():
        # Of many deltas of one model the model is looked at once
        if each.model_fingerprint not in sound or each.model_fingerprint.startswith(ARCHITECTURE):
            check_one(model, each)
            sound.add(each.model_fingerprint)
    return deltas


def check_editable(model: EditableModel) -> None:
    """Refuse to edit on top of deltas that act on some prompts only.

    Raises:
        ValueError: such deltas are active.
    """
    for holder in installed_on(model):
        if holder.routed and not holder.is_paused:
            raise ValueError(
                "edit: on top of active deltas an edit is fitted only where those act on every prompt (got one that is "
                "routed or asks another question); leave the block of applied, and apply all deltas together afterwards"
            )


def _listed(deltas: Any) -> list[EditDelta]:
    if hasattr(deltas, "deltas"):
        raise TypeError(f"applied: delta must be an EditDelta or a list of them (got a {type(deltas).__name__}; its "
                        "deltas are in .deltas)")  # fmt: skip
    try:
        listed = list(deltas)
    except TypeError:
        listed = [deltas]
    for each in listed:
        if not isinstance(each, EditDelta):
            raise TypeError(f"applied: delta must be an EditDelta or a list of them (got a {type(each).__name__})")
    if not listed:
        raise ValueError("applied: at least one delta is needed (got an empty list)")
    return listed


def _is_routed(delta: EditDelta) -> bool:
    return "router" in delta.spec.options


def check_one(model: EditableModel, delta: EditDelta) -> None:
    """Refuse a delta of another model.

    Raises:
        ValueError: names the delta's model and this one.
    """
    fitted = delta.model_fingerprint
    if fitted.startswith(ARCHITECTURE):
        if fitted != model.architecture:
            raise ValueError(
                f"applied: the delta of request {delta.request_id!r} is bound to maps of other names or shapes (got "
                f"delta {fitted[:24]!r}, model {model.architecture[:24]!r})"
            )
        before, now = delta.texts.get(AS_FITTED, "another model"), fitted_as(model)
        if before != now:
            message = f"applied: the delta of request {delta.request_id!r} was fitted in {before} and acts in {now}"
            warnings.warn(message, RuntimeWarning, stacklevel=4)
        return
    if not fitted or fitted == model.fingerprint:
        return
    if fitted == model.base_fingerprint:
        if _is_routed(delta):
            return
        raise ValueError(
            f"applied: the delta of request {delta.request_id!r} was fitted on the base model and would act on top of "
            f"{len(active_key(model))} others; apply edits of one sequence in one call, or give check_model=False"
        )
    raise ValueError(
        f"applied: a delta belongs to the model it was fitted on (got delta model={fitted[:12]!r}, "
        f"model={model.fingerprint[:12]!r}); one that was fitted inside of applied needs the same deltas around it"
    )


def require_sequence(deltas: Sequence[EditDelta]) -> None:
    """Refuse deltas that were not fitted on top of those before them.

    Raises:
        ValueError: names the first one and its company.
    """
    before: list[EditDelta] = []
    for number, delta in enumerate(deltas):
        # The company of those before, as one: what it grows by is hashed once
        expected = company(before)
        if delta.fitted_on is not None and delta.fitted_on != expected:
            raise ValueError(not_in_sequence(number, delta, len(deltas)))
        before = [_as_one([*before, delta])]


def memories(deltas: Sequence[EditDelta], check_sequence: bool) -> list[EditDelta]:
    """Deltas that a router chooses from; one that was fitted on top of others is added up with them.

    Raises:
        ValueError: one was fitted on top of others that are not there.
    """
    grouped: list[list[EditDelta]] = []
    part_prefix: dict[tuple[str, ...], int] = {}
    for number, delta in enumerate(deltas):
        place = part_prefix.get(delta.fitted_on) if delta.fitted_on else None
        if place is None:
            if delta.fitted_on and check_sequence:
                raise ValueError(not_in_sequence(number, delta, len(deltas)))
            place = len(grouped)
            grouped.append([])
        grouped[place].append(delta)
        part_prefix[company(grouped[place])] = place
    return [accumulate(memory) if len(memory) > 1 else memory[0] for memory in grouped]


def _as_one(deltas: Sequence[EditDelta]) -> EditDelta:
    return EditDelta(deltas[0].spec, {}, merged=company(deltas))


def not_in_sequence(number: int, delta: EditDelta, count: int) -> str:
    """What is wrong with a delta that was not fitted on top of those before it."""
    name = f"deltas[{number}] (request {delta.request_id!r})"
    if not delta.fitted_on:
        return (
            f"applied: {name} was fitted alone, not on top of those before it, and their sum is not what was scored; "
            f"apply one at a time, fit with mode='sequential', or give check_sequence=False to add up all {count}"
        )
    earlier = delta.fitted_on[0].partition(":")[0]
    return (
        f"applied: {name} was fitted on top of {earlier} earlier deltas, which are not those before it here; give the "
        f"sequence from its first edit on, in order, or check_sequence=False (got {count} deltas)"
    )
