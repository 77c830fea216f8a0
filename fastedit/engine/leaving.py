"""Fitted deltas on their way to host memory: their device goes on while they leave it."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from fastedit.deltas import EditDelta
from fastedit.engine.profiling.timing import PhaseTimer
from fastedit.fitting.solver import FitOutcome

#: Bytes of fitted deltas that may be on a GPU together: on their way, or waiting to be scored.
MOST_BYTES = 2 << 30


class Event(Protocol):
    """The end of a copy."""

    def query(self) -> bool:
        """Whether it is reached."""

    def synchronize(self) -> None:
        """Wait for it."""


class Copies(Protocol):
    """What copies tensors to host memory beside their device's work."""

    def buffer(self, like: Tensor) -> Tensor:
        """Host memory for a tensor, page-locked where there is such."""

    def begin(self, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> Event:
        """Copy sources, as the work queued so far leaves them, to targets."""


class SideStream:
    """Copies on a stream of their own.

    Args:
        device: an NVIDIA GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def buffer(self, like: Tensor) -> Tensor:
        """Host memory for a tensor."""
        try:
            return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
        except RuntimeError:
            # The system locks no more pages: the copy is slower then, and the same
            return torch.empty(like.shape, dtype=like.dtype)

    def begin(self, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> Event:
        """Copy sources, as the work queued so far leaves them, to targets."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self.stream)
        return event


@dataclass(eq=False)
class Fitted:
    """A fitted edit's delta where it is: on its device, in host memory, or in both with equal values.

    Args:
        on_device: None where the device has no room for it. in_memory: None until it has arrived.
    """

    on_device: EditDelta | None
    in_memory: EditDelta | None = None

    @property
    def nearest(self) -> EditDelta:
        """On the device if it is there."""
        delta = self.in_memory if self.on_device is None else self.on_device
        assert delta is not None
        return delta


@dataclass
class _Departure:
    """A delta on its way; its tensors stay on the device until ``event``, or others would be written over them."""

    number: int
    fitted: Fitted
    outcome: FitOutcome
    finite: Tensor
    buffers: Sequence[Tensor]
    event: Event


class Leaving:
    """Takes fitted deltas to host memory, in order; whoever asks for one waits for its copy and no other work.

    Values that are not finite become a delta that changes nothing, of an edit that has diverged: the device decides,
    and what it decided leaves with the delta.

    Args:
        device: where the deltas are fitted.
        keep: gets the number, the delta in host memory and the outcome of every edit once it has arrived.
        timer: seconds by phase.
        most_bytes: of deltas on the device together.
        copies: how they leave; None is a side stream on a GPU, and at once on other devices.
    """

    def __init__(
        self,
        device: torch.device,
        keep: Callable[[int, EditDelta, FitOutcome], None],
        timer: PhaseTimer,
        *,
        most_bytes: int = MOST_BYTES,
        copies: Copies | None = None,
    ) -> None:
        self.device, self.keep, self.timer, self.most_bytes = device, keep, timer, most_bytes
        self.copies = SideStream(device) if copies is None and device.type == "cuda" else copies
        self._departures: deque[_Departure] = deque()
        #: Whose deltas are on the device, for as long as somebody has a use for them.
        self._near: weakref.WeakSet[Fitted] = weakref.WeakSet()

    @property
    def device_bytes(self) -> int:
        """Bytes of deltas on the device."""
        return sum(_size(fitted.on_device) for fitted in self._near if fitted.on_device is not None)

    def send(self, number: int, delta: EditDelta, outcome: FitOutcome) -> Fitted:
        """Let an edit's delta leave; its tensors are not written to any more.

        Raises:
            What ``keep`` raises, of this edit or of one that had to arrive before.
        """
        copies, size = self.copies, _size(delta)
        finite = _finite(delta, self.device)
        while self._departures and self.device_bytes + size > self.most_bytes:
            self._arrive()
        if copies is None or size == 0 or self.device_bytes + size > self.most_bytes:
            return self._at_once(number, delta, outcome, finite)
        delta = _nothing_unless(finite, delta)
        sources = [finite, *delta.tensors.values()]
        buffers = [copies.buffer(tensor) for tensor in sources]
        fitted = Fitted(delta)
        event = copies.begin(sources, buffers)
        self._departures.append(_Departure(number, fitted, outcome, buffers[0], buffers[1:], event))
        self._near.add(fitted)
        return fitted

    def poll(self) -> None:
        """Keep what has arrived, without waiting."""
        while self._departures and self._departures[0].event.query():
            self._arrive()

    def land(self) -> None:
        """Wait for all that are on their way; one that cannot be kept is dropped, and holds up no other.

        Raises:
            What ``keep`` raises first.
        """
        errors: list[Exception] = []
        while self._departures:
            try:
                self._arrive()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def release(self) -> None:
        """The same, and none stays on the device: what is to be scored is in host memory."""
        try:
            self.land()
        finally:
            for fitted in self._near:
                if fitted.in_memory is not None:
                    fitted.on_device = None

    def _arrive(self) -> None:
        """Wait for the one that left first, and keep it."""
        departure = self._departures.popleft()
        fitted = departure.fitted
        with self.timer.phase("store"):
            departure.event.synchronize()
            # Page-locked memory is for the next ones
            tensors = [buffer.clone() for buffer in departure.buffers]
        delta = fitted.nearest
        delta = fitted.in_memory = replace(delta, tensors=dict(zip(delta.tensors, tensors, strict=True)))
        self.keep(departure.number, delta, _judged(departure.outcome, departure.finite))

    def _at_once(self, number: int, delta: EditDelta, outcome: FitOutcome, finite: Tensor) -> Fitted:
        if not bool(finite):
            delta = _nothing_unless(finite, delta)
        if any(tensor.device.type != "cpu" for tensor in delta.tensors.values()):
            delta = replace(delta, tensors={name: tensor.cpu() for name, tensor in delta.tensors.items()})
        self.keep(number, delta, _judged(outcome, finite))
        return Fitted(None, delta)


def _size(delta: EditDelta) -> int:
    """Bytes of its tensors."""
    return sum(tensor.nbytes for tensor in delta.tensors.values())


def _judged(outcome: FitOutcome, finite: Tensor) -> FitOutcome:
    """An outcome as it is, or of an edit that has diverged."""
    return outcome if bool(finite) else replace(outcome, status="diverged")


def _finite(delta: EditDelta, device: torch.device) -> Tensor:
    """() bool on the device: whether all values of a delta are finite."""
    parts = [tensor.isfinite().all().to(device) for tensor in delta.tensors.values()]
    return torch.stack(parts).all() if parts else torch.ones((), dtype=torch.bool)


def _nothing_unless(finite: Tensor, delta: EditDelta) -> EditDelta:
    """A delta as it is, or of zeros."""
    tensors = {name: tensor.masked_fill(~finite.to(tensor.device), 0) for name, tensor in delta.tensors.items()}
    return replace(delta, tensors=tensors)
