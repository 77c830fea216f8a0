"""What enters modules of the frozen model: at the tokens that carry labels, of questions or of prepared rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastedit.backbone import EditableModel, PackedState, Site
from fastedit.backbone.context import scoped_hooks
from fastedit.backbone.packed_forward import packed_start, packed_tail
from fastedit.requests import Query

#: Questions that are walked together.
QUESTIONS = 64


@contextmanager
def captured(model: EditableModel, sites: Sequence[Site]) -> Iterator[dict[Site, Tensor]]:
    """Inside the block the newest input (..., d_in) of each site's module is in the yielded table."""
    found: dict[Site, Tensor] = {}
    device = model.device

    def hook_for(site: Site) -> Any:
        def hook(_module: Any, args: tuple[Tensor, ...]) -> None:
            found[site] = args[0].to(device)

        return hook

    with scoped_hooks({model.module(site): hook_for(site) for site in sites}, before=True):
        yield found


@torch.no_grad()
def wanted_inputs(model: EditableModel, state: PackedState, sites: Sequence[Site]) -> tuple[dict[Site, Tensor], Tensor]:
    """What enters the sites at the wanted tokens of a state, (M, d_in) each, and the final hidden states (M, d).

    Args:
        model: frozen; no delta may act.
        state: at or below every site.
    """
    with captured(model, sites) as inputs:
        hidden = packed_tail(model, state)
    found = {}
    for site in sites:
        flat = inputs[site].reshape(-1, inputs[site].shape[-1])
        # The last layer is computed at wanted tokens alone
        found[site] = flat if flat.shape[0] == len(state.wanted) else flat[state.wanted]
    return found, hidden


def answer_inputs(
    model: EditableModel, queries: Sequence[Query], sites: Sequence[Site]
) -> Iterator[tuple[Mapping[Site, Tensor], tuple[int, ...]]]:
    """What enters the sites where the answers of questions are predicted, some questions at a time.

    Yields:
        by site (M, d_in), rows in order, from the last token of a prompt to the last token of its answer; and how many
        of these tokens each row has.
    """
    for start in range(0, len(queries), QUESTIONS):
        encoded = model.encode(queries[start : start + QUESTIONS], answers=True)
        with torch.no_grad():
            state = packed_start(model, encoded)
        yield wanted_inputs(model, state, sites)[0], state.wanted_counts


@torch.no_grad()
def answered(model: EditableModel, queries: Sequence[Query]) -> list[bool]:
    """Whether the model gives each question its answer: every token of it, the end included, is the likeliest.

    Args:
        model: no delta may act. queries: with their answers.
    """
    found: list[bool] = []
    for start in range(0, len(queries), QUESTIONS):
        encoded = model.encode(queries[start : start + QUESTIONS], answers=True)
        state = packed_start(model, encoded)
        right = model.head(packed_tail(model, state)).argmax(-1) == encoded.labels[encoded.label_mask]
        found += [bool(part.all()) for part in torch.split(right, list(state.wanted_counts))]
    return found
