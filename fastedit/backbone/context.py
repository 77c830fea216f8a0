"""What belongs to a call and not to the model: whose hooks fire, what a module's forward is, which deltas are active.

Several threads, or tasks of an event loop, may use one model at once: some answer as it is, some edited, some fit. So
nothing that a call needs is written on the model. It is in context variables, which every thread and task has for
itself, and hooks and replaced methods, which PyTorch knows for the whole process only, ask them first. A thread that is
started inside a block begins with an empty context; ``contextvars.copy_context().run`` takes the block's along.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .placement import is_offloaded

P = ParamSpec("P")
Returned = TypeVar("Returned")


class Scope:
    """A block of code in one context; whatever was set up by the block asks whether it is inside of it."""

    __slots__ = ("everywhere",)

    def __init__(self, *, everywhere: bool = False) -> None:
        self.everywhere = everywhere

    @property
    def entered(self) -> bool:
        """Whether the running code is inside the block; a scope that is everywhere is entered by all threads."""
        return self.everywhere or self in _SCOPES.get()

    @contextmanager
    def inside(self) -> Iterator[Scope]:
        """Enter the block."""
        if self.everywhere:
            yield self
            return
        _SCOPES.set(_SCOPES.get() | {self})
        try:
            yield self
        finally:
            _SCOPES.set(_SCOPES.get() - {self})


_SCOPES: ContextVar[frozenset[Scope]] = ContextVar("fastedit_scopes", default=frozenset())


@contextmanager
def scoped_hooks(
    hooks: Mapping[nn.Module, Callable[..., Any]],
    *,
    before: bool = False,
    with_kwargs: bool = False,
    everywhere: bool = False,
) -> Iterator[Scope]:
    """Inside the block, modules have forward hooks that other threads' calls of the same modules pass by.

    Args:
        hooks: by module, as for ``register_forward_hook``. before: as for ``register_forward_pre_hook``.
        with_kwargs: hooks take keyword arguments too. everywhere: the hooks fire in all threads.
    Yields:
        Scope of the block.
    """
    scope = Scope(everywhere=everywhere)
    handles: list[Any] = []
    try:
        with scope.inside():
            for module, hook in hooks.items():
                register = module.register_forward_pre_hook if before else module.register_forward_hook
                handles.append(register(_guarded(scope, hook), with_kwargs=with_kwargs))
            yield scope
    finally:
        for handle in handles:
            handle.remove()


def _guarded(scope: Scope, hook: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(*args: Any) -> Any:
        return hook(*args) if scope.entered else None

    return guarded


_NO_METHODS: Mapping[tuple[int, str], Callable[..., Any]] = MappingProxyType({})
_METHODS: ContextVar[Mapping[tuple[int, str], Callable[..., Any]]] = ContextVar("fastedit_methods", default=_NO_METHODS)


class _Dispatch:
    """Stands in the place of a method of an object; calls what the running context put there, else what was there."""

    def __init__(self, owner: Any, name: str) -> None:
        self.key = (id(owner), name)
        self.before: Any = owner.__dict__.get(name)
        self.original: Callable[..., Any] = getattr(owner, name)
        self.users = 0
        #: Methods that stand there in every context, the newest last.
        self.everywhere: list[Callable[..., Any]] = []
        # Libraries look at the signature of a model's forward
        self.__wrapped__ = self.original

    @property
    def outermost(self) -> Callable[..., Any]:
        """The method where the running context has none of its own."""
        return self.everywhere[-1] if self.everywhere else self.original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method of the running context."""
        return _METHODS.get().get(self.key, self.outermost)(*args, **kwargs)


_LOCK = threading.RLock()
_DISPATCHES: WeakKeyDictionary[Any, dict[str, _Dispatch]] = WeakKeyDictionary()


@contextmanager
def overridden(
    owner: Any,
    make: Callable[[Callable[..., Any]], Callable[..., Any]],
    name: str = "forward",
    *,
    everywhere: bool = False,
) -> Iterator[None]:
    """Inside the block, in this context, a method of an object is another one; elsewhere it stays what it is.

    Args:
        owner: a module, or any object that has attributes.
        make: from the method that there was to the one in its place.
        name: of the method. everywhere: it is replaced in all threads.
    """
    with _LOCK:
        known = _DISPATCHES.setdefault(owner, {})
        dispatch = known.get(name)
        if dispatch is None:
            dispatch = known[name] = _Dispatch(owner, name)
            setattr(owner, name, dispatch)
        dispatch.users += 1
    try:
        with _everywhere(dispatch, make) if everywhere else _in_context(dispatch, make):
            yield
    finally:
        with _LOCK:
            dispatch.users -= 1
            if not dispatch.users:
                # An instance attribute of before goes back; else the class's method shows again
                delattr(owner, name)
                if dispatch.before is not None:
                    setattr(owner, name, dispatch.before)
                del _DISPATCHES[owner][name]


@contextmanager
def _in_context(dispatch: _Dispatch, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    key, before = dispatch.key, _METHODS.get()
    _METHODS.set(MappingProxyType({**before, key: make(before.get(key, dispatch.outermost))}))
    try:
        yield
    finally:
        _METHODS.set(MappingProxyType({k: v for k, v in _METHODS.get().items() if k != key} | _kept(before, key)))


@contextmanager
def _everywhere(dispatch: _Dispatch, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    with _LOCK:
        method = make(dispatch.outermost)
        dispatch.everywhere.append(method)
    try:
        yield
    finally:
        with _LOCK:
            dispatch.everywhere.remove(method)


def _kept(before: Mapping[Any, Any], key: tuple[int, str]) -> dict[Any, Any]:
    return {key: before[key]} if key in before else {}


def outside_inference_mode(function: Callable[P, Returned]) -> Callable[P, Returned]:
    """Let a function make usual tensors under ``torch.inference_mode`` too: what it keeps may need gradients later."""

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> Returned:
        with torch.inference_mode(False):
            return function(*args, **kwargs)

    return called


class Frozen:
    """A module as an edit needs it, for the length of a block: in eval mode, its parameters without gradients.

    What it is outside comes back with the last block that is left, of whatever thread; nothing is done to a module that
    is like that already.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module, self._users, self._lock = module, 0, threading.RLock()
        self._training: list[nn.Module] = []
        #: By owner and name: those whose weights are read for one call only are exchanged at every call.
        self._parameters: list[tuple[nn.Module, str]] = []
        # Hooks that bring a weight for one call and take it away again serve one thread at a time
        self._one_by_one: AbstractContextManager[Any] = threading.RLock() if is_offloaded(module) else nullcontext()

    @contextmanager
    def block(self) -> Iterator[None]:
        """Inside the block the module is frozen."""
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._training = [module for module in self._module.modules() if module.training]
                self._parameters = [
                    (module, name)
                    for module in self._module.modules()
                    for name, part in module._parameters.items()
                    if part is not None and part.requires_grad
                ]
                self._set(False)
        try:
            with self._one_by_one:
                yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._set(True)
                    self._training, self._parameters = [], []

    def _set(self, changed: bool) -> None:
        for module in self._training:
            # Not train(), which a module may do more in, and which reaches its children
            module.training = changed
        for module, name in self._parameters:
            getattr(module, name).requires_grad_(changed)


def on_frozen_model(function: Callable[P, Returned]) -> Callable[P, Returned]:
    """Let a function, whose first argument is an editable model, find it frozen."""

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> Returned:
        model: Any = args[0] if args else kwargs.get("model")
        # What is no model is refused by the function itself
        with model.frozen() if hasattr(model, "frozen") else nullcontext():
            return function(*args, **kwargs)

    return called


def with_gradients(function: Callable[P, Returned]) -> Callable[P, Returned]:
    """Let a function that fits compute gradients, also where its caller has switched them off."""

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> Returned:
        with torch.inference_mode(False), torch.enable_grad():
            return function(*args, **kwargs)

    return called


def autocast_key(device: torch.device) -> Hashable:
    """The type that ``torch.autocast`` computes in on a device now, or None: what is kept of one is not for others."""
    if not torch.is_autocast_enabled(device.type):
        return None
    return str(torch.get_autocast_dtype(device.type))
