"""Edits made ready for a method: encoded, walked once to where their delta begins, with what the frozen model says."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from fastedit.backbone import EditableModel, PackedState
from fastedit.backbone.branches import branched, branches
from fastedit.backbone.context import outside_inference_mode
from fastedit.backbone.generic.adapter import generic
from fastedit.backbone.packed_forward import hold_constant, packed_prefix, packed_start, packed_tail
from fastedit.backbone.token_layout import token_layout
from fastedit.backbone.vision import VISION, watched
from fastedit.deltas import DeltaSpec, split_point
from fastedit.fitting.views import TrainingView
from fastedit.objectives import Role
from fastedit.requests import Query

__all__ = ["EditRows", "Phases", "prepare", "split_point"]


class Phases(Protocol):
    """Anything that times the parts of a run."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """A timer for a part."""


@dataclass
class EditRows:
    """The rows of one edit with all that is constant over its steps.

    Args:
        state: its rows where the delta begins to matter; its wanted tokens carry labels.
        labels: (T,) int64. role: (T,) int64, values of Role.
        reference: (T', V) logits of the unedited model for the tokens of locality roles, or None.
        row_roles: role of each row.
    """

    state: PackedState
    labels: Tensor
    role: Tensor
    reference: Tensor | None
    row_roles: tuple[int, ...] = ()


@outside_inference_mode
@torch.no_grad()
def prepare(
    model: EditableModel,
    spec: DeltaSpec,
    views: Sequence[Sequence[TrainingView]],
    timer: Phases,
    *,
    beside: Sequence[Role] = (),
    share: bool = False,
) -> list[EditRows]:
    """Encode the views of some edits, run the frozen prefix once, keep the unedited logits of the locality views.

    No delta may act meanwhile: the reference is the unedited model.

    Args:
        model: frozen. spec: of the deltas. views: by edit. timer: gets the phases.
        beside: roles of views without loss: they have no labels and no reference, and of their rows there is what a
            delta compares (its option ``tokens``).
        share: what rephrased views begin with as their edit does is there once (``can_branch``).
    """
    caches = model.caches
    flat = [view for vs in views for view in vs]
    point = (*split_point(spec), spec.positions)
    compared = str(spec.options.get("tokens", "all")) if _ends_before_the_last(model, point) else ""
    points = [(*point, compared) if view.role in beside else point for view in flat]
    active = model.active_key
    with timer.phase("prefix"):
        asked = [(active, at, _key(model, view.query)) for at, view in zip(points, flat, strict=True)]
        states = caches.states.get_all(asked)
    missing = [number for number, state in enumerate(states) if state is None]
    if missing:
        with timer.phase("encode"):
            encoded = model.encode([flat[number].query for number in missing], answers=True)
            labels = encoded.labels[encoded.label_mask]
        with timer.phase("prefix"):
            state = packed_start(model, encoded)
            if share:
                state = branched(state, branches(encoded, leaders([flat[number].role for number in missing])))
            state = watched(model, state, encoded) if point[1] == VISION else packed_prefix(model, state, *point[:2])
            if spec.positions != "all":
                state = hold_constant(model, replace(state, live=token_layout(state).acting(spec.positions)))
            parts = torch.split(labels, list(state.wanted_counts))
            for row, number in enumerate(missing):
                found = (state.of_row(row), parts[row])
                if flat[number].role in beside and compared:
                    found = (_only_compared(found[0], compared), parts[row][:0])
                if flat[number].role >= Role.TEXT_LOCALITY:
                    # Drawn from a pool, and so likely to come again. A copy: a slice would keep the batch in memory
                    found = (found[0].map(torch.clone), found[1].clone())
                    caches.states.put(asked[number], found)
                states[number] = found
    known = [state for state in states if state is not None]
    out = [n for n, view in enumerate(flat) if view.role >= Role.TEXT_LOCALITY and view.role not in beside]
    logits = _references(model, flat, known, out, timer)
    rows: list[EditRows] = []
    first = 0
    for vs in views:
        numbers = range(first, first + len(vs))
        first += len(vs)
        edit_references = [logits[number] for number in numbers if number in logits]
        role = [torch.full_like(known[number][1], int(flat[number].role)) for number in numbers]
        rows.append(
            EditRows(
                PackedState.cat([known[number][0] for number in numbers]),
                torch.cat([known[number][1] for number in numbers]),
                torch.cat(role),
                torch.cat(edit_references) if edit_references else None,
                tuple(int(flat[number].role) for number in numbers),
            )
        )
    return rows


def can_branch(model: EditableModel, spec: DeltaSpec) -> bool:
    """Whether rows of an edit may share what they begin with: no delta tells rows apart, and no token looks ahead."""
    by_token = spec.kind in ("full", "low_rank") or (spec.kind == "side" and spec.options.get("tokens") == "last")
    in_decoder = bool(spec.sites) and split_point(spec)[1] != VISION and generic(model.adapter) is None
    return by_token and in_decoder and spec.positions == "all"


def leaders(roles: Sequence[Role]) -> list[int]:
    """By row, the row that it may branch off: the edit's own, before rephrased views; else itself."""
    found, edit = [], 0
    for row, role in enumerate(roles):
        edit = row if role == Role.EDIT else edit
        found.append(edit if role in (Role.TEXT_REPHRASE, Role.IMAGE_REPHRASE) else row)
    return found


def _ends_before_the_last(model: EditableModel, point: tuple[int, str, str]) -> bool:
    """Whether a walk from a point has whole rows, of which tokens may be left out: not behind the last attention."""
    return generic(model.adapter) is None and (point[0] < model.n_layers - 1 and point[1] == "ffn")


def _only_compared(state: PackedState, tokens: str) -> PackedState:
    """One row's tokens of the prompt that are compared, one of ``deltas.scope.TOKENS``; none of them is wanted."""
    end = token_layout(state).prompts[0] - 1
    place = torch.arange(state.hidden.shape[0], device=state.hidden.device)
    kept = place == end if tokens == "last" else place <= end
    return replace(state, wanted=state.wanted[:0], wanted_counts=(0,)).only(kept)


def _references(
    model: EditableModel,
    flat: Sequence[TrainingView],
    known: Sequence[tuple[PackedState, Tensor]],
    out: Sequence[int],
    timer: Phases,
) -> dict[int, Tensor]:
    """Unedited logits (T, V) at the labels of the given views, by number of the view."""
    if not out:
        return {}
    caches = model.caches
    with timer.phase("reference"):
        active = model.active_key
        cached = caches.references.get_all([(active, _key(model, flat[number].query)) for number in out])
        found = dict(zip(out, cached, strict=True))
        missing = [number for number in out if found[number] is None]
        if missing:
            state = PackedState.cat([known[number][0] for number in missing])
            logits = model.head(packed_tail(model, state))
            for number, part in zip(missing, torch.split(logits, list(state.wanted_counts)), strict=True):
                found[number] = part.clone()
                caches.references.put((active, _key(model, flat[number].query)), found[number])
    return {number: part for number, part in found.items() if part is not None}


def _key(model: EditableModel, query: Query) -> tuple[str, str, str]:
    return query.prompt, model.images.identity(query.image), query.answer or ""
