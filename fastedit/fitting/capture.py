"""Steps that are recorded once and replayed: what a CPU launches op by op becomes one launch of a CUDA graph."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

#: Steps made op by op before one is recorded: they fill caches, choose kernels, and find out what has constant values.
WARM_UP = 2

#: A step of a fit: what it needs lies at fixed addresses, and so does what it changes; returns what the host may read.
Step = Callable[[], Tensor]


class Recorder(Protocol):
    """What records steps and makes them again."""

    def eager(self, step: Step) -> Tensor:
        """Make the step op by op, as it has to be before it is recorded."""

    def record(self, step: Step) -> tuple[Tensor, Callable[[], object]]:
        """Make the step once and keep it: what it returns, and what makes it again and writes its result there.

        Raises:
            RuntimeError: the step cannot be recorded, as it waits for the device or sends something there.
        """

    def forget(self) -> None:
        """No recording is used any more."""


class CudaGraphs:
    """CUDA graphs on a stream of their own; those of one arrangement share their memory, as they never run at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.forget()

    def eager(self, step: Step) -> Tensor:
        """On the stream of the recordings, between what the current one has done and what it will do."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            out = step()
        current.wait_stream(self.stream)
        return out

    def record(self, step: Step) -> tuple[Tensor, Callable[[], object]]:
        """Capture the step, which computes nothing, and replay it."""
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on reading images and copying deltas meanwhile
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            out = step()
        graph.replay()
        return out, graph.replay

    def forget(self) -> None:
        """Take other memory from now on: torch gives a pool back once its last graph is gone, and lets none join it."""
        self.pool = torch.cuda.graph_pool_handle()


def recorder_for(device: torch.device) -> Recorder:
    """What records steps on a device.

    Raises:
        ValueError: it is no NVIDIA GPU.
    """
    if device.type != "cuda":
        raise ValueError(f"solver: capture needs an NVIDIA GPU, which replays CUDA graphs (got device={device.type!r})")
    return CudaGraphs(device)


class StepCapture:
    """Makes a fit's steps: some op by op, then by replaying the recording of one, until something is arranged anew.

    Args:
        recorder: of the device. phase: times the replays.
    """

    def __init__(self, recorder: Recorder, phase: Callable[[str], AbstractContextManager[None]]) -> None:
        self._recorder, self._phase = recorder, phase
        self._arrangement: Hashable = None
        self._eager: Counter[Hashable] = Counter()
        self._kept: dict[Hashable, tuple[Tensor, Callable[[], object]]] = {}
        self._refused = False

    def run(self, step: Step, arrangement: Hashable, branch: Hashable) -> Tensor:
        """Make the step and return what it returns; the next step may write there.

        Args:
            step: the same at every call.
            arrangement: what the shapes and addresses of its inputs depend on; another one makes recordings void.
            branch: what else its ops depend on; each has a recording of its own.
        """
        if arrangement != self._arrangement:
            self._forget()
            self._arrangement = arrangement
        if branch in self._kept:
            out, replay = self._kept[branch]
            with self._phase("replay"):
                replay()
            return out
        if self._refused or self._eager[branch] < WARM_UP:
            self._eager[branch] += 1
            return self._recorder.eager(step)
        try:
            self._kept[branch] = self._recorder.record(step)
        except RuntimeError as error:
            self._refused = True
            self._forget()
            warnings.warn(f"solver: a step could not be recorded, so none will be ({error})", stacklevel=2)
            return self._recorder.eager(step)
        return self._kept[branch][0]

    def _forget(self) -> None:
        self._eager.clear()
        self._kept.clear()
        self._recorder.forget()
