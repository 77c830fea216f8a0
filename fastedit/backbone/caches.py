"""What the unedited model makes of questions, kept within a budget: on its device, then in host memory, then not."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from .packed import PackedState
from .states import ImageFeatures

Value = TypeVar("Value")


class SpillCache(Generic[Value]):
    """Values by key under a budget. The least recently used move to host memory, and out of it when that is full.

    Threads may use one cache at once.

    Where the device is the host there is nothing to move to: they are dropped and computed again.

    Args:
        budget: bytes on the device. host_budget: bytes in host memory.
        size: bytes of a value. move: a value on another device.
    """

    def __init__(
        self,
        budget: int,
        host_budget: int,
        size: Callable[[Value], int],
        move: Callable[[Value, torch.device | str], Value],
    ) -> None:
        self.budget_bytes, self.host_budget_bytes = budget, host_budget
        self._size, self._move = size, move
        self._near: OrderedDict[Hashable, Value] = OrderedDict()
        self._far: OrderedDict[Hashable, tuple[Value, Any]] = OrderedDict()
        self.held_bytes = self.far_bytes = 0
        self.hits = self.misses = 0
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._near) + len(self._far)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._near or key in self._far

    def get(self, key: Hashable) -> Value | None:
        """The value, on the device it was put on, or None."""
        with self._lock:
            return self._get(key)

    def _get(self, key: Hashable) -> Value | None:
        if key in self._near:
            self._near.move_to_end(key)
            self.hits += 1
            return self._near[key]
        if key in self._far:
            value, device = self._far.pop(key)
            self.far_bytes -= self._size(value)
            self.hits += 1
            back = self._move(value, device)
            self.put(key, back, device=device)
            return back
        self.misses += 1
        return None

    def get_all(self, keys: Sequence[Hashable]) -> list[Value | None]:
        """The values of several keys."""
        return [self.get(key) for key in keys]

    def put(self, key: Hashable, value: Value | None, *, device: torch.device | None = None) -> None:
        """Keep a value, which makes room by moving others away. One over the whole budget is not kept."""
        if value is None or self._size(value) > self.budget_bytes:
            return
        with self._lock:
            self._put(key, value, device)

    def _put(self, key: Hashable, value: Value, device: torch.device | None) -> None:
        if key in self._near:
            self.held_bytes -= self._size(self._near.pop(key))
        if key in self._far:
            # Asked for twice before it was there, and moved away in between
            self.far_bytes -= self._size(self._far.pop(key)[0])
        self._near[key] = value
        self.held_bytes += self._size(value)
        while self.held_bytes > self.budget_bytes:
            moved_key, moved = self._near.popitem(last=False)
            self.held_bytes -= self._size(moved)
            self._spill(moved_key, moved, _device_of(moved) if device is None else device)

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._near.clear()
            self._far.clear()
            self.held_bytes = self.far_bytes = 0

    def _spill(self, key: Hashable, value: Value, device: torch.device) -> None:
        size = self._size(value)
        if device.type == "cpu" or size > self.host_budget_bytes:
            return
        self._far[key] = (self._move(value, "cpu"), device)
        self.far_bytes += size
        while self.far_bytes > self.host_budget_bytes:
            _, (dropped, _) = self._far.popitem(last=False)
            self.far_bytes -= self._size(dropped)


class Caches:
    """Prefix states with their labels, and reference logits, of one frozen model.

    Args:
        budget: bytes of each on the device, and as much in host memory.
    """

    def __init__(self, budget: int) -> None:
        self.states: SpillCache[tuple[PackedState, Tensor]] = SpillCache(
            budget, budget, lambda pair: pair[0].n_bytes + _bytes(pair[1]), _moved_state
        )
        self.references = tensor_cache(budget)

    def clear(self) -> None:
        """Drop everything."""
        self.states.clear()
        self.references.clear()


def feature_cache(budget: int) -> SpillCache[ImageFeatures]:
    """Return a cache of what the decoder receives of images."""

    def moved(features: ImageFeatures, to: torch.device | str) -> ImageFeatures:
        return ImageFeatures(features.tokens.to(to), tuple(part.to(to) for part in features.deep))

    return SpillCache(budget, budget, lambda features: features.n_bytes, moved)


def tensor_cache(budget: int) -> SpillCache[Tensor]:
    """Return a cache of tensors."""
    return SpillCache(budget, budget, _bytes, lambda part, to: part.to(to))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _moved_state(pair: tuple[PackedState, Tensor], to: torch.device | str) -> tuple[PackedState, Tensor]:
    return pair[0].map(lambda tensor: tensor.to(to)), pair[1].to(to)


def _device_of(value: Any) -> torch.device:
    if isinstance(value, tuple):
        return _device_of(value[-1])
    if isinstance(value, ImageFeatures):
        return value.tokens.device
    device: torch.device = value.device
    return device


class Recent:
    """What was made for a few objects, those that were asked for last; it and they are held until others come.

    Args:
        most: objects.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._lock = threading.RLock()
        self._kept: OrderedDict[tuple[int, Hashable], tuple[Any, Any]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, owner: Any, case: Hashable) -> Any:
        """What was made for this very object in a case, or None."""
        with self._lock:
            key = id(owner), case
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key][1]

    def made(self, owner: Any, case: Hashable, make: Callable[[], Any]) -> Any:
        """What was made for this very object in a case, or else is made now, by one thread."""
        with self._lock:
            known = self.get(owner, case)
            if known is None:
                known = make()
                self.put(owner, case, known)
            return known

    def put(self, owner: Any, case: Hashable, made: Any) -> None:
        """Keep what was made for an object; what was asked for longest ago makes room."""
        with self._lock:
            # The object with it: no other one has its identity then
            self._kept[id(owner), case] = owner, made
            self._kept.move_to_end((id(owner), case))
            while len(self._kept) > self.most:
                self._kept.popitem(last=False)
