"""The edits of a ledger at one moment: their deltas and requests, ready to act; or always those of now."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor

from fastedit.backbone import EditableModel
from fastedit.deltas import EditDelta
from fastedit.deltas.kinds import new_stack
from fastedit.engine.acting import applied
from fastedit.ledger.database import LedgerError
from fastedit.ledger.segments import LedgerDeltas, Stored
from fastedit.ledger.session import state_of
from fastedit.ledger.settings import acts_alone, plan_of
from fastedit.methods import EditPlan
from fastedit.methods.base import Method
from fastedit.requests import EditRequest

if TYPE_CHECKING:
    from fastedit.ledger.ledger import Ledger


class LedgerState:
    """What acts at a moment.

    Args:
        ledger: that it is of. event: after which; None is now.
    """

    def __init__(self, ledger: Ledger, event: int | None) -> None:
        self.ledger = ledger
        self.event = ledger.contents.newest_event() if event is None else event
        self.listed: list[Stored] = [stored for _, stored in ledger.contents.acting(self.event)]
        run = ledger.contents.run_of(self.listed[-1].edit) if self.listed else None
        self._plan = None if run is None else plan_of(run["settings"])
        self._mode = "single" if run is None else run["mode"]

    def __repr__(self) -> str:
        return f"<LedgerState: {len(self)} edits after event {self.event} of {self.ledger.folder}>"

    def __len__(self) -> int:
        return len(self.listed)

    @property
    def edit_ids(self) -> list[int]:
        """Numbers of the edits, in the order in which they act."""
        return [stored.edit for stored in self.listed]

    @property
    def id(self) -> str:
        """What identifies these deltas in this order."""
        return state_of(self.listed)

    @property
    def act_alone(self) -> bool:
        """Whether the edits cannot act together: they were fitted each alone on the base model, and are added to it."""
        return self._plan is not None and acts_alone(self._plan.method, self._mode)

    @property
    def deltas(self) -> LedgerDeltas:
        """The deltas as they were fitted, one an edit; read when asked for."""
        return LedgerDeltas(self.ledger.contents.segments, self.listed)

    def requests(self) -> list[EditRequest]:
        """What was asked, in the same order."""
        return self.ledger.contents.requests(self.edit_ids)

    def acting(self, replay: Replay | None = None) -> Sequence[EditDelta]:
        """The deltas that act together: those that were fitted, or what the method makes of them in sequence.

        Args:
            replay: what was made of those of an earlier moment; it goes on from there, and is of this one then.
        """
        if self._plan is None or self._plan.method.combine is Method.combine or self.act_alone:
            return self.deltas
        return self._replayed(self._plan, Replay() if replay is None else replay)

    def _replayed(self, plan: EditPlan, replay: Replay) -> Sequence[EditDelta]:
        """What the method has made of the deltas in sequence; where that is still one an edit, they are not kept."""
        if replay.listed != self.listed[: len(replay.listed)]:
            replay.clear()
        slim = plan.method.sequence == "route"
        new = [replay.slim(delta) if slim else delta for delta in self.deltas[len(replay.listed) :]]
        replay.committed = plan.method.expecting(plan.config, replay.committed, new)
        for given in new:
            replay.given.append(given)
            replay.committed = plan.method.combine(plan.config, replay.committed, given)
        replay.listed = list(self.listed)
        if not slim:
            return replay.committed
        return LedgerDeltas(self.ledger.contents.segments, self.listed, replay.changes(self.deltas))

    @contextmanager
    def applied(self) -> Iterator[EditableModel]:
        """Inside the block the model answers as edited, as it was at this moment."""
        model = self.ledger.needs_model("applied")
        with self.ledger.on_base():
            if not self.listed:
                yield model
                return
            self.require_together()
            block: AbstractContextManager[EditableModel] = applied(model, self.acting())
            with block as edited:
                yield edited

    def require_together(self) -> None:
        """Refuse edits that cannot act together.

        Raises:
            LedgerError: they were fitted each alone.
        """
        if self.act_alone and len(self) > 1:
            assert self._plan is not None
            raise LedgerError(
                f"ledger: edits by {self._plan.name!r} with mode='single' were fitted each alone and do not act "
                f"together; use mode='sequential', or apply one of .deltas (got {len(self)})"
            )


@dataclass
class Replay:
    """What a method has made of deltas in sequence.

    Args:
        listed: of which. given: what it was made of, in order. committed: what acts; it may have grown in place.
    """

    listed: list[Stored] = field(default_factory=list)
    given: list[EditDelta] = field(default_factory=list)
    committed: list[EditDelta] = field(default_factory=list)
    _changed: dict[int, tuple[EditDelta, str, dict[str, Tensor]]] = field(default_factory=dict)
    _names: dict[str, list[str]] = field(default_factory=dict)

    def clear(self) -> None:
        """Begin anew."""
        self.listed, self.given, self.committed = [], [], []
        self._changed.clear()

    def slim(self, delta: EditDelta) -> EditDelta:
        """A delta with those of its tensors alone that routers look at: those that act stay in storage."""
        spec = delta.spec
        if spec.text not in self._names:
            self._names[spec.text] = list(new_stack(spec, 0, trainable=False).fixed)
        return replace(delta, tensors={name: delta.tensors[name] for name in self._names[spec.text]})

    def changes(self, stored: LedgerDeltas) -> dict[int, tuple[str, dict[str, Tensor]]]:
        """By position the deltas that were changed on the way: their ids now, and the tensors that differ."""
        for number, (before, after) in enumerate(zip(self.given, self.committed, strict=True)):
            known = self._changed.get(number)
            if after is before or (known is not None and known[0] is after):
                continue
            new = {name: part for name, part in after.tensors.items() if part is not before.tensors[name]}
            whole = stored[number]
            self._changed[number] = after, replace(whole, tensors={**whole.tensors, **new}).id, new
        return {number: (delta_id, tensors) for number, (_, delta_id, tensors) in self._changed.items()}


class LiveEdits:
    """What acts now in a ledger, wherever it is changed: by this process or by another one (``LiveDeltas``).

    Args:
        ledger: that it follows.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._building = threading.Lock()
        #: The newest event that was looked at, and what acted after it: as it was made, and as it is given.
        self._newest: tuple[int, Sequence[EditDelta]] = (-1, ())
        self._seen: tuple[int, Sequence[EditDelta]] = (-1, ())
        self._replay = Replay()
        self._watchers: list[Callable[[Sequence[EditDelta]], bool]] = []

    def __repr__(self) -> str:
        return f"<LiveEdits: of {self.ledger!r}>"

    def current(self) -> Sequence[EditDelta]:
        """The deltas that act now: the same object as long as nothing changes.

        Raises:
            LedgerError: they cannot act together.
        """
        newest = self.ledger.contents.newest_event()
        if newest > self._seen[0]:
            self._seen = self._made(newest)
        return self._seen[1]

    def watch(self, prepare: Callable[[Sequence[EditDelta]], bool]) -> None:
        """Have ``prepare`` called with what is about to act, by who commits it in this process."""
        self._watchers.append(prepare)
        self.ledger.contents.followers.add(self)

    def follow(self) -> None:
        """Look at what was committed just now. What keeps it from acting is raised by the calls that ask for it."""
        with suppress(ValueError):
            # Not in the lock: who serves holds one of its own while it asks what acts now
            seen = self._made(self.ledger.contents.newest_event())
            if seen[1] is not self._seen[1]:
                self._watchers = [prepare for prepare in self._watchers if prepare(seen[1]) is not False]
            if seen[0] > self._seen[0]:
                self._seen = seen

    def _made(self, event: int) -> tuple[int, Sequence[EditDelta]]:
        """An event and what acts after it; of a later one where that was made already."""
        with self._building:
            if event > self._newest[0]:
                state = LedgerState(self.ledger, event)
                state.require_together()
                acting, before = state.acting(self._replay), self._newest
                # A tag, say, changes nothing that acts
                same = before[0] >= 0 and _ids(acting) == _ids(before[1])
                self._newest = event, before[1] if same else acting
            return self._newest

    def __len__(self) -> int:
        return len(self.current())

    def __iter__(self) -> Iterator[EditDelta]:
        return iter(self.current())

    def __getitem__(self, index: int) -> EditDelta:
        return self.current()[index]


def _ids(deltas: Sequence[EditDelta]) -> list[str]:
    return deltas.ids if isinstance(deltas, LedgerDeltas) else [delta.id for delta in deltas]


def state_at(ledger: Ledger, moment: str | int | None) -> LedgerState:
    """The state at a tag, after an event, or now.

    Raises:
        LedgerError: no such tag or event, or deltas that are not there any more.
    """
    if moment is None:
        return LedgerState(ledger, None)
    tags = ledger.tags()
    if isinstance(moment, str) and not moment.isdigit():
        if moment not in tags:
            raise LedgerError(f"ledger: tags are {sorted(tags)} (got {moment!r:.80})")
        return LedgerState(ledger, tags[moment])
    event, last = int(moment), ledger.contents.newest_event()
    if not 0 <= event <= last:
        raise LedgerError(f"ledger: events are numbered 1 to {last}, 0 is before the first (got {event})")
    compacted = int(ledger.contents.meta("compacted"))
    if event < compacted and event not in tags.values() and event:
        raise LedgerError(
            f"ledger: of moments before event {compacted}, at which it was compacted, those with a tag are there (got "
            f"{event}; tags are {tags})"
        )
    return LedgerState(ledger, event)
