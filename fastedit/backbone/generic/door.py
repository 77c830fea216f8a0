"""What the stock multimodal model hands to its decoder, caught row by row at the decoder's door.

Ids, positions, image features, masks and whatever else a family passes on come from the stock forward itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .context import Forward, walking
from .cross import AXES, ENCODED, PER_TOKEN, STATES, TOKEN_AXIS, followed
from .decoder import Decoder, bound
from .masks import RowMask, moved_mask, row_mask

#: Arguments of a decoder that a walk sets itself, or has no use for.
_DROPPED = frozenset({"attention_mask", "past_key_values", "use_cache", "cache_position", "labels", "cache"})
#: Of a row alone it says nothing: no encoder state is padding.
_DROPPED |= {"encoder_attention_mask"}
EMBEDDED, IDS, PLACES = "inputs_embeds", "input_ids", "position_ids"


@dataclass(frozen=True)
class Row:
    """One row as the decoder gets it.

    Args:
        count: tokens, up to the last one here. values: arguments of the decoder's forward by name. masks: what tokens
            see, each once. kinds: by layer, which of the masks.
        first: the place of the first token that values tell of.
    """

    count: int
    values: dict[str, Any]
    masks: tuple[RowMask, ...]
    kinds: tuple[int, ...]
    first: int = 0

    def map(self, change: Callable[[Tensor], Tensor]) -> Row:
        """Return the row with every tensor replaced by ``change(tensor)``."""
        values = {name: map_tensors(value, change) for name, value in self.values.items()}
        return replace(self, values=values, masks=tuple(moved_mask(mask, change) for mask in self.masks))

    def without(self, name: str) -> Row:
        """Return the row without one of its values."""
        return replace(self, values={known: value for known, value in self.values.items() if known != name})

    @property
    def n_bytes(self) -> int:
        """Size of all tensors in bytes."""
        sizes: list[int] = []

        def count(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel() * tensor.element_size())
            return tensor

        self.map(count)
        return sum(sizes)


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return lists, tuples and dictionaries of tensors with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: map_tensors(part, change) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [map_tensors(part, change) for part in value]
        return tuple(parts) if isinstance(value, tuple) else parts
    return value


class _Left(Exception):
    """The row has been caught."""


class _Door:
    """A walk that catches what the decoder is given, and what masks it hands to its layers, and computes nothing."""

    makes_masks = True

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.values: dict[str, Any] = {}
        self.given: dict[str, Any] = {}
        #: By layer; layers that read images are not run without one.
        self.masks: dict[int, Tensor | None] = {}

    def root(self, stock: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Catch the arguments."""
        values = bound(self.decoder.signature, args, kwargs)
        self.given = {name: value for name, value in values.items() if name not in ("use_cache", "past_key_values")}
        self.values = values
        return stock(*args, **kwargs)

    def layer(self, index: int, _stock: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Catch the mask."""
        given = self.decoder.arguments(index, args, kwargs)
        mask = given.get("attention_mask")
        self.masks[index] = mask if isinstance(mask, Tensor) and mask.dim() == 4 else None
        if index == self.decoder.n_layers - 1:
            raise _Left
        return self.decoder.returned(index, next(iter(given.values())))

    def part(self, _role: str, _index: int, stock: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Never inside of a layer."""
        return stock(*args, **kwargs)

    def attend(self, *_: Any) -> None:
        """Leave attention outside of the decoder to the stock function."""
        return


def follow(decoder: Decoder, row: Row, ids: Tensor, behind: int) -> Row:
    """Return tokens of text behind a row that ends with text, as the decoder would be handed them.

    Args:
        ids: (1, K). behind: how many tokens behind the row the first of them is.
    """
    start = row.count + behind
    values: dict[str, Any] = {IDS: ids} if IDS in row.values else {EMBEDDED: decoder.root.embed_tokens(ids)}
    if PLACES in row.values:
        ahead = torch.arange(1 + behind, 1 + behind + ids.shape[1], device=ids.device)
        values[PLACES] = row.values[PLACES][..., -1:] + ahead
    values |= followed(row.values, ids.shape[1])
    masks = tuple(dict.fromkeys(decoder.windows))
    return Row(start + ids.shape[1], values, masks, tuple(masks.index(window) for window in decoder.windows), start)


def follows(decoder: Decoder, short: Row, ids: Tensor, whole: Row) -> bool:
    """Whether what a decoder is handed of a row's last tokens (1, K) is what `follow` says.

    Args:
        short: the row without them. whole: with them.
    """
    guess = follow(decoder, short, ids, 0)
    if set(whole.values) - set(guess.values) - _of_images(whole) or guess.count != whole.count:
        return False
    for name, value in guess.values.items():
        known = whole.values.get(name)
        axis = TOKEN_AXIS if name in PER_TOKEN else 1 if name == EMBEDDED else -1
        if known is None:
            return False
        if not torch.equal(
            known if name in (STATES, ENCODED) else known.narrow(axis, short.count, ids.shape[1]), value
        ):
            return False
    key = torch.arange(whole.count, device=ids.device)
    places = key[short.count :, None]
    for index in range(decoder.n_layers):
        seen, window = whole.masks[whole.kinds[index]], guess.masks[guess.kinds[index]]
        right = (key <= places) if window is None else (key <= places) & (key > places - window)
        if isinstance(seen, Tensor):
            if seen.dtype != torch.bool or not torch.equal(seen[short.count :], right):
                return False
        elif not torch.equal((key <= places) if seen is None else (key <= places) & (key > places - seen), right):
            return False
    return True


def _of_images(row: Row) -> set[str]:
    """Values that tell of images alone: marks of tokens, and lists of features."""
    return {name for name, value in row.values.items() if not isinstance(value, Tensor) or value.dtype == torch.bool}


@torch.no_grad()
def enter(decoder: Decoder, forward: Callable[..., Any], inputs: Mapping[str, Any]) -> tuple[Row, dict[str, Any]]:
    """Run the stock forward of one row up to the decoder's layers.

    Args:
        forward: of the whole model. inputs: its keyword arguments, of one row.
    Returns:
        What the decoder's layers are handed, and the arguments of its own forward.
    """
    door = _Door(decoder)
    try:
        with decoder.instrumented(), walking(door):
            forward(**inputs, use_cache=False)
    except _Left:
        pass
    if not door.masks:
        raise ValueError(f"load: the stock forward must run its decoder (got {type(decoder.hf).__name__})")
    count = int(next(door.values[name] for name in (EMBEDDED, IDS) if door.values.get(name) is not None).shape[1])
    values = {name: value for name, value in door.values.items() if name not in _DROPPED and value is not None}
    values = {name: value for name, value in values.items() if not isinstance(value, (bool, str))}
    if IDS in values and hasattr(decoder.hf.config, "vision_config"):
        # Beside rows with images, which come as embeddings; models of text alone may need ids for more than those
        values[EMBEDDED] = decoder.root.embed_tokens(values.pop(IDS))
    masks: list[RowMask] = []
    number: dict[int, int] = {}
    kinds = []
    made: Tensor | None = None
    for index in range(decoder.n_layers):
        made = door.masks.get(index, made)
        if id(made) not in number:
            number[id(made)] = len(masks)
            masks.append(row_mask(made, decoder.windows[index]))
        kinds.append(number[id(made)])
    return Row(count, values, tuple(masks), tuple(kinds)), door.given


@dataclass
class Joiner:
    """Puts the arguments of several rows together as those of packed rows.

    Args:
        axes: by argument, which of its axes counts tokens; None where none does. Filled as arguments are met.
    """

    axes: dict[str, int | None] = field(default_factory=lambda: dict(AXES))

    def learn(self, rows: Sequence[Row]) -> None:
        """Find the axes from rows of different lengths."""
        for name in {name for row in rows for name in row.values} - set(AXES):
            known = [(row.values[name], row.count) for row in rows if isinstance(row.values.get(name), Tensor)]
            if not known:
                continue
            shared = [
                axis
                for axis in range(known[0][0].dim())
                if all(value.dim() > axis and value.shape[axis] == count for value, count in known)
            ]
            if len(shared) > 1 or (shared and len({count for _, count in known}) < 2):
                shared = shared[-1:] if name == PLACES else shared[:1]
            self.axes[name] = shared[0] if shared else None

    def axis(self, name: str, value: Tensor, count: int) -> int | None:
        """The axis of an argument that counts tokens."""
        if name not in self.axes:
            matching = [axis for axis in range(value.dim()) if value.shape[axis] == count]
            self.axes[name] = (matching[-1] if name == PLACES else matching[0]) if matching else None
        return self.axes[name]

    def join(
        self, rows: Sequence[Row | None], starts: Sequence[int], counts: Sequence[int], device: torch.device
    ) -> dict[str, Any]:
        """Return the arguments of the decoder for some tokens of every row.

        Args:
            rows: R rows; None where a row has no tokens now. starts, counts: which of its tokens. device: of the state.
        """
        present = [(row, a, n) for row, a, n in zip(rows, starts, counts, strict=True) if row is not None and n]
        names = list(dict.fromkeys(name for row, _, _ in present for name in row.values))
        joined: dict[str, Any] = {}
        for name in names:
            value = self._joined(name, present)
            if value is not None:
                joined[name] = value
        if PLACES not in joined:
            places = [torch.arange(a, a + n, device=device) for _, a, n in present]
            joined[PLACES] = torch.cat(places)[None]
        return joined

    def _joined(self, name: str, present: Sequence[tuple[Row, int, int]]) -> Any:
        known = next(row.values[name] for row, _, _ in present if name in row.values)
        row = next(row for row, _, _ in present if name in row.values)
        if not isinstance(known, Tensor):
            # Features of images, one list entry per layer: rows that go on behind their prompt have no images left
            if any(a for _, a, _ in present):
                return None
            if isinstance(known, (list, tuple)):
                parts = [each.values[name] for each, _, _ in present if name in each.values]
                return [torch.cat([part[number] for part in parts]) for number in range(len(known))]
            return known
        if name == ENCODED:
            return torch.cat([each.values[name] for each, _, _ in present], 1)
        axis = self.axis(name, known, row.count - row.first)
        if axis is None:
            if name != STATES and any(a for _, a, _ in present):
                return None
            return torch.cat([each.values[name] for each, _, _ in present if name in each.values])
        if known.dtype == torch.bool and any(a for _, a, _ in present):
            return None
        parts = []
        for each, start, count in present:
            value = each.values.get(name)
            if value is None:
                parts.append(_absent(name, known, axis, start, count))
            else:
                parts.append(value.narrow(axis, start - each.first, count))
        return torch.cat(parts, axis)


def _absent(name: str, like: Tensor, axis: int, start: int, count: int) -> Tensor:
    """What stands for an argument of a row that has none: no marks, positions in sequence."""
    shape = list(like.shape)
    shape[axis] = count
    if name == PLACES:
        return torch.arange(start, start + count, device=like.device, dtype=like.dtype).expand(shape)
    return like.new_zeros(shape)


def linears(module: nn.Module) -> dict[str, nn.Module]:
    """Linear maps inside of a module by path, quantized ones among them."""
    return {path: part for path, part in module.named_modules() if hasattr(part, "in_features") and path}
