"""Which deltas are active on a model, in the context that asks: the base of everything that is computed there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
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
    #: Whether it stands for deltas that change, of which every call has those that it began with.
    changes: bool

    @property
    def key(self) -> str:
        """What tells these deltas from others: equal keys mean that both change a model alike."""

    @property
    def is_paused(self) -> bool:
        """Whether the deltas leave the model alone now."""

    @property
    def rewrites_prompts(self) -> bool:
        """Whether other questions are asked."""

    @property
    def needs_choice(self) -> bool:
        """Whether a call has to tell which of the deltas acts on which row, by a router or otherwise."""

    def acting(self) -> Holder | None:
        """The holder of the deltas that act in the running call: itself, unless they change."""

    def paused(self) -> AbstractContextManager[None]:
        """Inside the block the deltas do not act."""

    def route(self, state: PackedState) -> None:
        """Choose what acts on these prompts, walked to ``point``."""

    def rewrite_prompts(self, queries: Sequence[Query]) -> list[Query]:
        """The questions to be asked instead."""


class Changing(Protocol):
    """Stands for deltas that change (``fastedit.deltas.live.LiveHolder``)."""

    model: Any
    changes: bool

    def acting(self) -> Holder | None:
        """The holder of the deltas that act in the running call; None where there are none."""

    def held(self) -> AbstractContextManager[Any]:
        """Inside the block, a call, the deltas stay as they are."""


_INSTALLED: ContextVar[tuple[Holder | Changing, ...]] = ContextVar("fastedit_installed", default=())
#: Those that are installed for all threads, until they are detached.
_EVERYWHERE: list[Holder | Changing] = []
_NONE: ContextVar[bool] = ContextVar("fastedit_uninstalled", default=False)
#: Which of those that are installed do not act in this context.
_HIDDEN: ContextVar[Callable[[Any], bool] | None] = ContextVar("fastedit_hidden", default=None)


def is_installed(holder: Holder) -> bool:
    """Whether deltas are installed in the running context."""
    return any(each is holder for each in _all())


def installed_on(model: Any) -> tuple[Holder, ...]:
    """The deltas that are installed on a model in the running context, in order, paused ones included."""
    return tuple(holder for holder in _all() if holder.model is model)


def is_listed(holder: Changing) -> bool:
    """Whether what stands for changing deltas is installed in the running context."""
    return any(each is holder for each in _listed())


def refuse_others(model: Any) -> None:
    """Refuse a walk of a model whose modules have deltas of another editable model that only the other can choose from.

    Raises:
        ValueError: such deltas act now.
    """
    for holder in _all():
        if holder.model is model or holder.model.hf is not model.hf:
            continue
        if holder.needs_choice and not holder.is_paused:
            raise ValueError(
                "attach: edits that have to be chosen from act in calls of the stock model, and of the fastedit model "
                "that they were attached to; attach them to the one that is called, fastedit.attach(model, deltas) "
                "instead of fastedit.attach(hf_model, deltas, processor) (got a call of another fastedit model around "
                "the same stock model)"
            )


@contextmanager
def holding(model: Any) -> Iterator[None]:
    """Inside the block, a call of a model, deltas that change stay what they were at its beginning."""
    changing = [each for each in _listed() if each.changes and each.model is model]
    with ExitStack() as entered:
        for each in changing:
            entered.enter_context(each.held())  # type: ignore[union-attr]
        yield


def _all() -> tuple[Holder, ...]:
    acting = (each.acting() for each in _listed())
    # Each once: a call holds on to those that are installed for all threads
    return tuple({id(each): each for each in acting if each is not None}.values())


def _listed() -> tuple[Holder | Changing, ...]:
    if _NONE.get():
        return ()
    hidden = _HIDDEN.get()
    listed = (*_EVERYWHERE, *_INSTALLED.get())
    return listed if hidden is None else tuple(each for each in listed if not hidden(each))


def is_everywhere(holder: Holder | Changing) -> bool:
    """Whether deltas are installed for all threads."""
    return any(each is holder for each in _EVERYWHERE)


@contextmanager
def hiding(hidden: Callable[[Any], bool]) -> Iterator[None]:
    """Inside the block, in this context, deltas do not act for whose holder ``hidden`` is true."""
    before = _HIDDEN.get()
    _HIDDEN.set(hidden if before is None else lambda each: before(each) or hidden(each))
    try:
        yield
    finally:
        _HIDDEN.set(before)


@contextmanager
def installing(holder: Holder | Changing, *, everywhere: bool = False) -> Iterator[None]:
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


def withdraw(holder: Holder | Changing) -> None:
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
