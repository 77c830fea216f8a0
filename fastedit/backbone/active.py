"""Which deltas are active on a model, in the context that asks: the base of everything that is computed there."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from fastedit.requests import Query

    from .packed import PackedState


class Holder(Protocol):
    """Installed deltas (``fastedit.deltas.RowsHolder``)."""

    model: Any
    point: tuple[int, str]
    routed: bool

    @property
    def key(self) -> str:
        """What tells these deltas from others: equal keys mean that both change a model alike."""

    @property
    def is_paused(self) -> bool:
        """Whether the deltas leave the model alone now."""

    @property
    def rewrites_prompts(self) -> bool:
        """Whether other questions are asked."""

    def paused(self) -> AbstractContextManager[None]:
        """Inside the block the deltas do not act."""

    def route(self, state: PackedState) -> None:
        """Choose what acts on these prompts, walked to ``point``."""

    def rewrite_prompts(self, queries: Sequence[Query]) -> list[Query]:
        """The questions to be asked instead."""


_INSTALLED: ContextVar[tuple[Holder, ...]] = ContextVar("fastedit_installed", default=())
#: Those that are installed for all threads, until they are detached.
_EVERYWHERE: list[Holder] = []
_NONE: ContextVar[bool] = ContextVar("fastedit_uninstalled", default=False)


def is_installed(holder: Holder) -> bool:
    """Whether deltas are installed in the running context."""
    return any(each is holder for each in _all())


def installed_on(model: Any) -> tuple[Holder, ...]:
    """The deltas that are installed on a model in the running context, in order, paused ones included."""
    return tuple(holder for holder in _all() if holder.model is model)


def _all() -> tuple[Holder, ...]:
    # Each once: a call holds on to those that are installed for all threads
    return () if _NONE.get() else tuple({id(each): each for each in (*_EVERYWHERE, *_INSTALLED.get())}.values())


@contextmanager
def installing(holder: Holder, *, everywhere: bool = False) -> Iterator[None]:
    """Inside the block deltas are installed, in this context or in all threads."""
    if everywhere:
        _EVERYWHERE.append(holder)
        try:
            yield
        finally:
            withdraw(holder)
        return
    _INSTALLED.set((*_INSTALLED.get(), holder))
    try:
        yield
    finally:
        left = list(_INSTALLED.get())
        newest = max(number for number, each in enumerate(left) if each is holder)
        _INSTALLED.set((*left[:newest], *left[newest + 1 :]))


def withdraw(holder: Holder) -> None:
    """Take deltas from those that are installed for all threads; contexts that installed them keep them."""
    _EVERYWHERE[:] = [each for each in _EVERYWHERE if each is not holder]


@contextmanager
def uninstalled() -> Iterator[None]:
    """Inside the block no delta acts on any model, whatever is installed around it."""
    before = _NONE.get()
    _NONE.set(True)
    try:
        yield
    finally:
        _NONE.set(before)


def active_key(model: Any) -> tuple[str, ...]:
    """Keys of the deltas that act on a model in the running context: part of the key of whatever is kept of it."""
    return tuple(holder.key for holder in installed_on(model) if not holder.is_paused)


def fingerprint_with(base: str, keys: Sequence[Hashable]) -> str:
    """The fingerprint of a model with active deltas; that of the base model where there are none."""
    if not keys:
        return base
    return hashlib.sha256("\n".join([base, *map(str, keys)]).encode()).hexdigest()
