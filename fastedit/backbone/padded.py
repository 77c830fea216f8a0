"""The decoder walked over right-padded rows: plain, and the measure of the packed walk."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .stacks import Context, causal_masks
from .states import STAGES, Encoded, ImageFeatures, PrefixState, gather_positions

if TYPE_CHECKING:
    from .model import EditableModel


@torch.no_grad()
def start(model: EditableModel, encoded: Encoded) -> PrefixState:
    """Return the state entering layer 0: word embeddings with image features in place."""
    text = model.adapter.text
    features = model.features(encoded)
    # Image tokens are replaced below; their id may lie outside of the embedding table.
    embeddings = text.embed(encoded.input_ids.masked_fill(encoded.image_mask, 0))
    position_ids = model.adapter.position_ids(encoded.lengths, encoded.image_mask, encoded.images)
    deep: dict[int, Tensor] = {}
    for row, image in enumerate(encoded.images):
        if image is None:
            continue
        marks = encoded.image_mask[row]
        shown = ImageFeatures.cat([features[part.key] for part in image.looked_at])
        embeddings[row, marks] = shown.tokens.to(embeddings)
        for layer, part in enumerate(shown.deep):
            if layer not in deep:
                deep[layer] = torch.zeros_like(embeddings)
            deep[layer][row, marks] = part.to(embeddings)
    hidden = text.enter(embeddings, position_ids)
    return PrefixState(hidden, position_ids, encoded.lengths, 0, "attention", deep)


@torch.no_grad()
def prefix(model: EditableModel, encoded: Encoded, layer: int, stage: str = "attention") -> PrefixState:
    """Return the state entering a decoder layer, or entering its feed-forward block.

    Args:
        encoded: R rows.
        layer: 0 <= layer < n_layers.
        stage: "attention" (entering the layer) or "ffn" (the residual stream after its attention block).
    Raises:
        ValueError: no such layer or stage.
    """
    model.check_layer(layer)
    if stage not in STAGES:
        raise ValueError(f"prefix: stage must be one of {', '.join(STAGES)} (got stage={stage!r})")
    if model.watching:
        raise ValueError(
            "prefix: a delta on the vision side acts in generate, answer and edits, where the model computes image "
            "tokens anew (got padded rows)"
        )
    text = model.adapter.text
    state = model.start(encoded)
    masks = context(model, state)
    hidden = state.hidden
    for index in range(layer):
        hidden = _add_deep(text.layer(index, hidden, masks), state, index)
    if stage == "ffn":
        hidden = text.attend(layer, hidden, masks)
    deep = {index: part for index, part in state.deep.items() if index >= layer}
    return PrefixState(hidden, state.position_ids, state.lengths, layer, stage, deep)


def tail(model: EditableModel, state: PrefixState, *, positions: Tensor | None = None) -> Tensor:
    """Return final hidden states after the final norm, differentiable in whatever is hooked onto submodules.

    Args:
        state: from `prefix`, R rows of N positions.
        positions: (R, M), int64; -1 is padding. The last layer then computes queries, feed-forward and final norm
            at these positions only.
    Returns:
        (R, N, d), or (R, M, d) at the positions. Padding yields unspecified finite values.
    """
    text = model.adapter.text
    last = model.n_layers - 1
    if state.gathered:
        if state.layer != last or positions is not None:
            got = f"layer={state.layer} of 0..{last}, positions {'given' if positions is not None else 'not given'}"
            raise ValueError(f"tail: a gathered state must be of the last layer, without positions (got {got})")
        return text.finish(_add_deep(text.feed_forward(last, state.hidden), state, last))
    if state.stage == "ffn" and state.layer == last and positions is not None:
        # Nothing mixes positions any more.
        return tail(model, state.at(positions))
    hidden, first = state.hidden, state.layer
    if state.stage == "ffn":
        hidden = _add_deep(text.feed_forward(first, hidden), state, first)
        first += 1
    masks = context(model, state)
    for index in range(first, last if positions is not None else last + 1):
        hidden = _add_deep(text.layer(index, hidden, masks), state, index)
    if positions is not None:
        hidden = text.feed_forward(last, text.attend_at(last, hidden, positions, masks))
        if last in state.deep:
            hidden = hidden + gather_positions(state.deep[last], positions)
    return text.finish(hidden)


def context(model: EditableModel, state: PrefixState) -> Context:
    """Return masks and position tables of a state, made once and kept with it."""
    known = state.cache.get("context")
    if isinstance(known, Context):
        return known
    text = model.adapter.text
    with torch.no_grad():
        made = Context(
            position_ids=state.position_ids,
            rotary=text.rotary(state.hidden, state.position_ids),
            masks=causal_masks(text.config, set(text.kinds), state.hidden),
        )
    state.cache["context"] = made
    return made


def _add_deep(hidden: Tensor, state: PrefixState, layer: int) -> Tensor:
    return hidden + state.deep[layer] if layer in state.deep else hidden
