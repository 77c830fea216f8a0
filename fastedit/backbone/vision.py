"""The vision side as something that is edited: what its tower puts out stays, what joins it to the decoder runs anew.

A walk of packed rows then begins one stage earlier than at layer 0: the states of image tokens are not known before the
linear maps between tower and decoder have run, with whatever is hooked in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .active import uninstalled
from .context import autocast_key
from .packed import PackedState
from .states import Encoded, ImageInputs, Site
from .token_layout import Running, TokenLayout, showing

if TYPE_CHECKING:
    from .model import EditableModel

#: The stage of a state whose image tokens are still to be computed, before "attention" of layer 0.
VISION = "vision"
#: The layer of a linear map on the vision side.
VISION_LAYER = -1


def vision_sites(model: EditableModel, names: Sequence[str] | None = None) -> list[Site]:
    """Return the linear maps between the vision tower and the decoder, in the order in which they run.

    Args:
        model: any. names: of some of them; None is all.
    Raises:
        ValueError: a family whose maps cannot be edited, or a name that it does not have.
    """
    paths = model.adapter.vision_linears()
    if not paths:
        raise ValueError(f"{model.name}: the vision side of {model.adapter.family} cannot be edited (got no maps)")
    chosen = list(paths) if names is None else list(names)
    for name in chosen:
        if name not in paths:
            raise ValueError(f"sites: vision names must be among {', '.join(paths)} (got name={name!r})")
    found = []
    for name in chosen:
        module: Any = model.hf.get_submodule(paths[name])
        found.append(Site(VISION_LAYER, name, paths[name], int(module.in_features), int(module.out_features)))
    return found


@torch.no_grad()
def watched(model: EditableModel, state: PackedState, encoded: Encoded) -> PackedState:
    """Return the state before its image tokens are known, with what the tower makes of every row's image.

    Args:
        state: entering layer 0, of these rows.
    """
    cast = autocast_key(model.device)
    known: dict[str, Tensor] = {}
    missing: list[ImageInputs] = []
    for image in encoded.distinct_images.values():
        found = model.tower_outputs.get((image.key, cast))
        if found is None:
            missing.append(image)
        else:
            known[image.key] = found
    size = model.vision_batch
    for start in range(0, len(missing), size):
        chunk = missing[start : start + size]
        with uninstalled():
            outputs = model.adapter.look(chunk)
        for image, output in zip(chunk, outputs, strict=True):
            # A copy: a view of a whole batch would keep it in memory
            known[image.key] = output.clone()
            model.tower_outputs.put((image.key, cast), known[image.key])
    seen = tuple(
        None if image is None else torch.cat([known[part.key] for part in image.looked_at]) for image in encoded.images
    )
    return replace(state, stage=VISION, seen=seen)


def renewed(model: EditableModel, state: PackedState) -> PackedState:
    """Return the state entering layer 0: image tokens computed anew, differentiable in whatever is hooked in.

    Rows without an image are left alone.
    """
    assert state.stage == VISION
    seen = [output for output in state.seen if output is not None]
    if not seen or state.image is None:
        return replace(state, stage="attention", seen=())
    marks = state.image
    places = state.remembered("image places", lambda: marks.nonzero()[:, 0])
    with showing(state.remembered("vision", lambda: _layouts(state))):
        tokens = model.adapter.join(seen)
    if tokens.shape[0] != len(places):
        got = f"features={tokens.shape[0]}, tokens={len(places)}"
        raise ValueError(f"{model.name}: images have as many features as tokens (got {got})")
    entering = model.adapter.text.enter(tokens[None].to(state.hidden), state.position_ids[None, :, places])
    hidden = state.hidden.index_copy(0, places, entering[0].to(state.hidden.device))
    return replace(state, hidden=hidden, stage="attention", seen=())


def _layouts(state: PackedState) -> Running:
    """Whose the tokens are on the vision side: those that the decoder gets, and those that the tower puts out."""
    assert state.image is not None
    joined = [int(part.sum()) for part in torch.split(state.image, list(state.counts))]
    given = [0 if output is None else output.shape[0] for output in state.seen]
    return Running({sum(counts): TokenLayout(tuple(counts)) for counts in (given, joined)})
