"""Greedy decoding of right-padded rows with a key-value cache, row order kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .stacks import Context
from .states import Encoded, gather_positions

if TYPE_CHECKING:
    from .model import EditableModel


@torch.no_grad()
def greedy(model: EditableModel, encoded: Encoded, max_new_tokens: int) -> list[list[int]]:
    """Return the generated tokens of each row, the end token excluded.

    New tokens go behind the padding of the prompts; explicit positions and a mask over the padding make that equal
    to decoding each row alone. Decoding ends early where the model has no positions left.
    """
    from transformers import DynamicCache

    text = model.adapter.text
    state = model.start(encoded)
    context = model.context(state)
    context = Context(context.position_ids, context.rotary, context.masks, past=DynamicCache())
    hidden = state.hidden
    for index in range(model.n_layers):
        hidden = text.layer(index, hidden, context)
        if index in state.deep:
            hidden = hidden + state.deep[index]
    last = gather_positions(hidden, encoded.last_prompt[:, None])
    # The first generated token stands one after the largest position of the prompt.
    inside = encoded.attention_mask[:, None, :]
    places = (state.position_ids * inside).amax(dim=(1, 2)) + 1
    ends = torch.tensor(model.end_token_ids, device=hidden.device)
    visible = encoded.attention_mask
    done = torch.zeros(len(encoded), dtype=torch.bool, device=hidden.device)
    limit = getattr(text.config, "max_position_embeddings", None)
    room = max_new_tokens if limit is None else min(max_new_tokens, limit - int(places.max()) + 1)
    chosen: list[Tensor] = []
    for step in range(room):
        token = model.head(text.finish(last))[:, -1].argmax(dim=-1)
        token = torch.where(done, ends[0], token)
        done = done | torch.isin(token, ends)
        chosen.append(torch.where(done, -1, token))
        if step == room - 1 or bool(done.all()):
            break
        visible = torch.cat([visible, torch.ones_like(visible[:, :1])], dim=1)
        last = _step(model, token, places, visible, state.position_ids.shape[1], context.past)
        places = places + 1
    return [[token for token in row if token >= 0] for row in torch.stack(chosen, dim=1).tolist()]


def _step(model: EditableModel, token: Tensor, places: Tensor, visible: Tensor, axes: int, past: Any) -> Tensor:
    """Return the residual stream (R, 1, d) after all layers at one new token per row."""
    text = model.adapter.text
    position_ids = places[:, None, None].expand(-1, axes, 1)
    hidden = text.enter(text.embed(token[:, None]), position_ids)
    context = Context(
        position_ids=position_ids,
        rotary=text.rotary(hidden, position_ids),
        masks={kind: _step_mask(text.config, kind, visible, hidden) for kind in set(text.kinds)},
        past=past,
    )
    for index in range(model.n_layers):
        hidden = text.layer(index, hidden, context)
    return hidden


def _step_mask(config: Any, kind: str, visible: Tensor, hidden: Tensor) -> Tensor:
    """Return the mask over all keys for one new query per row, as the attention implementation takes it."""
    if kind == "sliding_attention":
        # A window counts tokens, not slots: padding between prompt and answer is no token.
        behind = visible.flip(1).cumsum(dim=1).flip(1)
        visible = visible & (behind <= config.sliding_window)
    implementation = config._attn_implementation
    if implementation.startswith("flash_attention"):
        return visible
    mask = visible[:, None, None, :]
    if implementation == "eager":
        floor = torch.finfo(hidden.dtype).min
        return torch.zeros_like(mask, dtype=hidden.dtype).masked_fill(~mask, floor)
    return mask
