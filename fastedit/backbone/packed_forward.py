"""The decoder walked over packed rows: to a point in the middle, to the end, and on from stored keys and values."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .active import refuse_others
from .attention import AttentionPlan, Past, attend, padded, plan_attention, varlen_function
from .constant_past import ConstantPast
from .generic.adapter import generic
from .packed import KeyValue, PackedState, PaddedStart, pack
from .states import Encoded, ImageFeatures
from .token_layout import running
from .vision import VISION, renewed

if TYPE_CHECKING:
    from .model import EditableModel


class Attention:
    """What a stack's attention needs of the walk beside the residual stream."""

    def __init__(self, model: EditableModel, state: PackedState, past: Past | None, queries: Tensor | None) -> None:
        self.queries, self.rotary = queries, state.rotary
        self._model, self._state, self._past = model, state, past
        self._elsewhere: dict[torch.device, Attention] = {}

    def on(self, device: torch.device) -> Attention:
        """The same for a layer on a device."""
        if device == self._state.hidden.device:
            return self
        if device not in self._elsewhere:
            moved = Attention(self._model, self._state, self._past, self.queries)
            moved.queries = None if self.queries is None else self.queries.to(device)
            moved.rotary = None if self.rotary is None else (self.rotary[0].to(device), self.rotary[1].to(device))
            self._elsewhere[device] = moved
        return self._elsewhere[device]

    def at_queries(self, values: Tensor) -> Tensor:
        """Values (T, ...) of the query tokens, (Tq, ...)."""
        return values if self.queries is None else values[self.queries]

    def mix(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of (Tq, heads, d_head) over (T, groups, d_head) and what came before: (Tq, heads * d_head)."""
        text, state = self._model.adapter.text, self._state
        window = text.config.sliding_window if text.kinds[layer] == "sliding_attention" else None
        capacity = getattr(self._past, "capacity", None)
        counts = state.counts if self.queries is None else state.wanted_counts
        plan = state.remembered(
            (window, capacity, self.queries is None),
            lambda: plan_attention(state, self.queries, counts, window=window, capacity=capacity),
        )
        if query.device != state.hidden.device:
            key_there = (window, capacity, self.queries is None, query.device)
            plan = state.remembered(key_there, lambda: plan.to(query.device))
        varlen = varlen_function(str(text.config._attn_implementation), query.device)
        return attend(layer, query, key, value, plan, scale=scale, past=self._past, varlen=varlen)


@torch.no_grad()
def padded_start(model: EditableModel, encoded: Encoded) -> PaddedStart:
    """Return what enters layer 0: word embeddings with image features among them, and positions."""
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
    return PaddedStart(hidden, position_ids, text.rotary(hidden, position_ids), deep)


def packed_start(model: EditableModel, encoded: Encoded) -> PackedState:
    """Return the packed state entering layer 0. Wanted are the label positions, or the last token of every prompt."""
    wanted = encoded.label_mask
    if not bool(wanted.any()):
        wanted = torch.zeros_like(encoded.attention_mask)
        wanted[torch.arange(len(encoded), device=wanted.device), encoded.last_prompt] = True
    traced = generic(model.adapter)
    if traced is not None:
        packed = traced.start(encoded, wanted)
    else:
        packed = pack(encoded, padded_start(model, encoded), wanted)
    if any(image is not None for image in encoded.images):
        packed.live = _behind_image(encoded)[encoded.attention_mask]
        packed.image = encoded.image_mask[encoded.attention_mask]
    return packed


@torch.no_grad()
def packed_prefix(
    model: EditableModel, state: PackedState, layer: int, stage: str, past: Past | None = None
) -> PackedState:
    """Return the state at a later point: entering `layer`, or its feed-forward block.

    At the feed-forward block of the last layer no token sees another any more: only wanted tokens are kept.
    """
    if (state.layer, state.stage) == (layer, stage):
        return state
    refuse_others(model)
    if state.stage == VISION:
        state = renewed(model, state)
    traced = generic(model.adapter)
    if traced is not None:
        return traced.walker.prefix(state, layer, stage, past)
    hidden, first = state.hidden, state.layer
    attention = Attention(model, state, past, None)
    with running(state):
        if state.stage == "ffn":
            hidden = _fed(model, first, hidden, state.deep)
            first += 1
        for index in range(first, layer):
            hidden = _attended(model, index, hidden, attention)
            hidden = _fed(model, index, hidden, state.deep)
        if stage == "ffn":
            hidden = _attended(model, layer, hidden, attention)
    hidden = hidden.to(state.hidden.device)
    deep = {index: part for index, part in state.deep.items() if index >= layer}
    found = replace(state, hidden=hidden, layer=layer, stage=stage, deep=deep)
    if stage == "ffn" and layer == model.n_layers - 1:
        return _only_wanted(found)
    return found


def packed_tail(model: EditableModel, state: PackedState, past: Past | None = None) -> Tensor:
    """Return the final hidden states (M, d) of the wanted tokens, differentiable in whatever is hooked in.

    Args:
        model: frozen. state: at any point.
        past: keys and values of earlier tokens, which this extends; None with a state that has constants uses those.
    """
    refuse_others(model)
    traced = generic(model.adapter)
    if traced is not None:
        return traced.walker.tail(state, past)
    last = model.n_layers - 1
    if past is None and any(state.starts) and state.constant:
        past = state.remembered("constant", lambda: ConstantPast(state))
    if state.stage == VISION:
        state = renewed(model, state)
    hidden, first = state.hidden, state.layer
    whole = Attention(model, state, past, None)
    with running(state):
        if state.stage == "ffn":
            if first == last:
                return _finished(model, _taken(hidden, state), state)
            hidden = _fed(model, first, hidden, state.deep)
            first += 1
        for index in range(first, last):
            hidden = _fed(model, index, _attended(model, index, hidden, whole), state.deep)
        asked = None if len(state.wanted) == hidden.shape[0] else state.wanted
        hidden = _attended(model, last, hidden, Attention(model, state, past, asked))
        return _finished(model, hidden, state)


@torch.no_grad()
def hold_constant(model: EditableModel, state: PackedState) -> PackedState:
    """Return the state without the tokens that are not live, whose keys and values are kept instead.

    Args:
        state: of a walk that no delta has touched, where a delta acts on live tokens only. Tokens of a row that are
            not live come before those that are.
    """
    if generic(model.adapter) is not None or state.live is None or bool(state.live.all()):
        return state
    if not bool(state.live[state.wanted].all()):
        # A prompt that ends with its image: there an answer's first token is predicted
        return state
    after = state.only(state.live)
    if after.stage == "ffn" and after.layer == model.n_layers - 1:
        return after
    none = torch.empty(0, dtype=torch.long, device=state.hidden.device)
    before = _ends_wanted(replace(state, wanted=none, wanted_counts=(0,) * len(state)).only(~state.live))
    collected = _Collected()
    attention = Attention(model, before, collected, None)
    hidden, first, last = before.hidden, before.layer, model.n_layers - 1
    with running(before):
        if before.stage == "ffn":
            hidden = _fed(model, first, hidden, before.deep)
            first += 1
        for index in range(first, last):
            hidden = _fed(model, index, _attended(model, index, hidden, attention), before.deep)
        # Of the last layer keys and values are all that later tokens see: one query a row, since some there must be
        _attended(model, last, hidden, Attention(model, before, collected, before.wanted))
    return replace(after, starts=before.counts, constant=collected.found)


def _ends_wanted(state: PackedState) -> PackedState:
    """The state with the last token of each row wanted, of rows that have any."""
    ends = [end - 1 for end, count in zip(accumulate(state.counts), state.counts, strict=True) if count]
    wanted = torch.tensor(ends, dtype=torch.long, device=state.hidden.device)
    return replace(state, wanted=wanted, wanted_counts=tuple(min(count, 1) for count in state.counts))


class _Collected:
    """Keeps the keys and values of every layer; nothing comes before them."""

    def __init__(self) -> None:
        self.found: dict[int, KeyValue] = {}

    def extend(self, layer: int, plan: AttentionPlan, key: Tensor, value: Tensor) -> KeyValue:
        """See `Past`."""
        self.found[layer] = (key, value)
        return padded(key, plan.key_slots, plan.rows, plan.keys), padded(value, plan.key_slots, plan.rows, plan.keys)


def _behind_image(encoded: Encoded) -> Tensor:
    """(R, N), bool: places behind the last image token of their row; all of a row without an image."""
    places = torch.arange(encoded.input_ids.shape[1], device=encoded.input_ids.device)
    last = torch.where(encoded.image_mask, places, -1).amax(dim=1, keepdim=True)
    return places > last


def _only_wanted(state: PackedState) -> PackedState:
    kept = torch.zeros(state.hidden.shape[0], dtype=torch.bool, device=state.hidden.device)
    kept[state.wanted] = True
    return state.only(kept)


def _taken(values: Tensor, state: PackedState) -> Tensor:
    return values if len(state.wanted) == values.shape[0] else values[state.wanted]


def _attended(model: EditableModel, index: int, hidden: Tensor, attention: Attention) -> Tensor:
    """The residual stream (Tq, d) after the attention block of a layer, on the device of that."""
    if model.layer_devices is not None:
        device = model.layer_devices[index]
        hidden, attention = hidden.to(device), attention.on(device)
    return model.adapter.text.attend_packed(index, hidden, attention)


def _fed(model: EditableModel, index: int, hidden: Tensor, deep: dict[int, Tensor]) -> Tensor:
    """The residual stream (T, d) after a feed-forward block and what is added behind it."""
    if model.layer_devices is not None:
        hidden = hidden.to(model.layer_devices[index])
    hidden = model.adapter.text.feed_forward(index, hidden[None])[0]
    return hidden + deep[index].to(hidden.device) if index in deep else hidden


def _finished(model: EditableModel, hidden: Tensor, state: PackedState) -> Tensor:
    """The last feed-forward block and the final norm for the wanted tokens."""
    text, last = model.adapter.text, model.n_layers - 1
    hidden = text.feed_forward(last, hidden[None])
    if last in state.deep:
        hidden = hidden + _taken(state.deep[last], state)[None]
    return text.finish(hidden)[0].to(state.hidden.device)
