"""Deltas that change while a model serves: a change holds from the next call on; calls under way end as they began."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from fastedit.backbone import EditableModel
from fastedit.backbone.active import installing, is_listed
from fastedit.backbone.stock import cache_of
from fastedit.deltas.base import EditDelta
from fastedit.deltas.hooks import hooked
from fastedit.deltas.install import RowsHolder


class LiveDeltas(Protocol):
    """What knows which deltas hold now, such as a ledger that others write to.

    It may also have ``watch(prepare)``: it then calls ``prepare(deltas)`` with a sequence that ``current`` is about to
    give, in the thread that changes it; what serving needs of them is made there, and no call waits for it. ``prepare``
    raises what makes them unfit to act, and returns False once nobody needs it any more.
    """

    def current(self) -> Sequence[EditDelta]:
        """The deltas that hold now, none of them is fine. The same object as long as nothing changed.

        Called at the beginning of every call of the model, in any thread: it takes microseconds where nothing changed.
        """


def is_live(deltas: Any) -> bool:
    """Whether deltas are looked up at every call (``LiveDeltas``)."""
    return callable(getattr(deltas, "current", None))


class Version:
    """Deltas as they were at one time, ready to act.

    Args:
        deltas: the sequence. holder: of them; None where there are none.
        together: what the next version may take over. calls: of a stock model, in which they act.
    """

    def __init__(
        self, deltas: Sequence[EditDelta], holder: RowsHolder | None = None, together: Any = None, calls: Any = None
    ) -> None:
        self.deltas, self.holder, self.together, self.calls = deltas, holder, together, calls
        self._users = 0
        self._lock = threading.Lock()
        self._hooks = ExitStack()
        self._methods: dict[Hashable, Callable[..., Any]] = {}

    def enter(self) -> None:
        """From the first user on its hooks are there."""
        with self._lock:
            self._users += 1
            if self._users == 1 and self.holder is not None:
                self._hooks.enter_context(hooked(self.holder, everywhere=True))

    def leave(self) -> None:
        """With the last user its hooks go."""
        with self._lock:
            self._users -= 1
            if not self._users:
                self._hooks.close()

    def method(self, name: str, stock: Callable[..., Any]) -> Callable[..., Any]:
        """A method of the stock model in which the deltas act, made once; ``stock`` itself where there are none."""
        if self.calls is None:
            return stock
        made = self._methods.get((name, stock))
        if made is None:
            made = self._methods[name, stock] = getattr(self.calls, name)(stock)
        return made


#: What acts in a call that began when there was nothing, or before anything was attached.
NOTHING = Version(())
_NO_VERSIONS: Mapping[Any, Version] = MappingProxyType({})
#: By holder the version that the running call began with.
_HELD: ContextVar[Mapping[Any, Version]] = ContextVar("fastedit_versions", default=_NO_VERSIONS)


class LiveHolder:
    """Installed in the place of a ``RowsHolder``: gives that of the version which the running call began with.

    A call that begins looks up the current deltas. Where they are others than before it makes a version of them, from
    what the version before has; calls that begin meanwhile wait for it, those under way do not. A version is freed when
    the last call ends that uses it, and the last cache is gone that was filled by one.

    Args:
        model: frozen. live: the deltas.
        build: makes a version of a sequence, given the version before; called in one thread at a time.
    """

    changes = True

    def __init__(
        self,
        model: EditableModel,
        live: LiveDeltas,
        build: Callable[[Sequence[EditDelta], Version | None], Version],
    ) -> None:
        self.model, self.live, self._build = model, live, build
        self._lock, self._building = threading.Lock(), threading.Lock()
        self._version: Version | None = None
        self._ahead: Version | None = None
        self._blocks = 0
        self._of_cache: WeakKeyDictionary[Any, Version] = WeakKeyDictionary()
        watch = getattr(live, "watch", None)
        if watch is not None:
            watch(_prepare_of(weakref.ref(self)))

    @property
    def acts(self) -> bool:
        """Whether it is installed in the running context."""
        return is_listed(self)

    @property
    def held_version(self) -> Version | None:
        """The version that the running call began with; None outside of calls."""
        return _HELD.get().get(self)

    def acting(self) -> RowsHolder | None:
        """The deltas that act now: those of the running call, else the current ones."""
        return (self.held_version or self.latest()).holder

    def latest(self) -> Version:
        """The version of the deltas that hold now.

        Raises:
            ValueError: they cannot act on this model.
        """
        version = self._version
        if version is not None and version.deltas is self.live.current():
            return version
        with self._building:
            deltas, version = self.live.current(), self._version
            if version is None or version.deltas is not deltas:
                version = self._made(deltas)
                with self._lock:
                    before, self._version, self._ahead = self._version, version, None
                    if self._blocks:
                        version.enter()
                        if before is not None:
                            before.leave()
            return version

    def prepare(self, deltas: Sequence[EditDelta]) -> None:
        """Make a version of deltas that are about to hold."""
        with self._building:
            self._ahead = self._made(deltas)

    def _made(self, deltas: Sequence[EditDelta]) -> Version:
        if self._ahead is not None and self._ahead.deltas is deltas:
            return self._ahead
        if not len(deltas):
            return Version(deltas)
        # The model is looked at without these deltas
        with self._during(NOTHING):
            return self._build(deltas, self._version)

    @contextmanager
    def block(self) -> Iterator[None]:
        """Inside the block hooks of the current version stay between calls."""
        self.latest()
        with self._lock:
            self._blocks += 1
            if self._blocks == 1 and self._version is not None:
                self._version.enter()
        try:
            yield
        finally:
            with self._lock:
                self._blocks -= 1
                if not self._blocks and self._version is not None:
                    self._version.leave()

    @contextmanager
    def held(self, version: Version | None = None) -> Iterator[Version]:
        """Inside the block, a call, one version acts: that of the call around it, else the given or the latest one."""
        running = self.held_version
        if running is not None:
            yield running
            return
        version = self.latest() if version is None else version
        version.enter()
        try:
            # In this context too: it may be detached everywhere while the call goes on
            with installing(self), self._during(version):
                yield version
        finally:
            version.leave()

    @contextmanager
    def stock_call(self, given: Mapping[str, Any], *, unknown: bool = False) -> Iterator[Version]:
        """What ``held`` does, for a call of the stock model: one behind a cache has the version that filled it.

        Args:
            given: its arguments by name. unknown: whether nothing acts behind a cache that was filled by others.
        """
        cache = cache_of(given)
        version = None
        if cache is not None and cache.get_seq_length():
            version = self._of_cache.get(cache, NOTHING if unknown else None)
        with self.held(version) as held:
            yield held

    def remember(self, given: Mapping[str, Any], output: Any, version: Version) -> None:
        """A cache that a stock call filled has the version that acted in it."""
        cache = cache_of(given)
        cache = cache_of(output) if cache is None else cache
        if cache is not None:
            self._of_cache[cache] = version

    @contextmanager
    def _during(self, version: Version) -> Iterator[None]:
        before = _HELD.get()
        _HELD.set(MappingProxyType({**before, self: version}))
        try:
            yield
        finally:
            _HELD.set(before)


def _prepare_of(holder: weakref.ref[LiveHolder]) -> Callable[[Sequence[EditDelta]], bool]:
    def prepare(deltas: Sequence[EditDelta]) -> bool:
        there = holder()
        if there is not None:
            there.prepare(deltas)
        return there is not None

    return prepare
