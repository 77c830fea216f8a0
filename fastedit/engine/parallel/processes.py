"""Workers as processes of this machine, each the only one of a ``concurrent.futures.ProcessPoolExecutor``.

One executor a worker: where a process is killed its own executor breaks, and says so of its shard and no other.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch

from fastedit.engine.parallel.worker import Worker

T = TypeVar("T")
#: Of this process, where it is a worker's.
_workers: list[Worker] = []


class Processes:
    """Starts workers, for task after task.

    Args:
        workers: how many share the machine's threads. device: of the run's model.
    """

    def __init__(self, workers: int, device: torch.device) -> None:
        self._device = device
        self._threads = max(1, torch.get_num_threads() // workers)
        self._folder = tempfile.TemporaryDirectory(prefix="fastedit-")
        #: Of the present task, pickled.
        self.path = Path(self._folder.name, "task")

    def give(self, task: bytes) -> None:
        """What workers take up when they start, pickled."""
        self.path.write_bytes(task)

    def close(self) -> None:
        """Remove what was given."""
        self._folder.cleanup()

    def new_worker(self, place: int) -> ProcessWorker:
        """The worker of a place; of several GPUs each has one."""
        device = None
        if self._device.type == "cuda" and torch.cuda.device_count() > 1:
            device = f"cuda:{place % torch.cuda.device_count()}"
        return ProcessWorker(self.path, device, self._threads)

    @staticmethod
    def is_lost(error: BaseException) -> bool:
        """Whether an error says that a worker's process is gone."""
        return isinstance(error, BrokenProcessPool)


class ProcessWorker:
    """A worker's process (``dispatch.Handle``)."""

    def __init__(self, task: Path, device: str | None, threads: int) -> None:
        self._begin = task, device, threads
        context = get_context("spawn")
        # The worker holds the other end, and ends when this one is closed: by ``close``, or with this process
        held, self._lifeline = context.Pipe(duplex=False)
        self._executor = ProcessPoolExecutor(1, mp_context=context, initializer=_watch, initargs=(held,))

    def start(self) -> Future[int]:
        """See ``Handle``."""
        return self._submitted(_begin, *self._begin)

    def make(self, shard: bytes) -> Future[bytes]:
        """See ``Handle``."""
        return self._submitted(_make, shard)

    def _submitted(self, call: Callable[..., T], *arguments: Any) -> Future[T]:
        """A future also where the process died while it had nothing to do."""
        try:
            return self._executor.submit(call, *arguments)
        except BrokenProcessPool as error:
            lost: Future[T] = Future()
            lost.set_exception(error)
            return lost

    def close(self) -> None:
        """See ``Handle``."""
        self._lifeline.close()
        self._executor.shutdown(wait=False, cancel_futures=True)


def _watch(lifeline: Connection) -> None:
    """End this process when that of the run does, or closes its end; Ctrl-C is for that one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait() -> None:
        try:
            lifeline.recv_bytes()
        except (EOFError, OSError):
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _begin(task: Path, device: str | None, threads: int) -> int:
    if _workers:
        _workers[-1].take_up(task.read_bytes())
    else:
        _workers.append(Worker(task.read_bytes(), device, threads))
    return os.getpid()


def _make(shard: bytes) -> bytes:
    return _workers[-1].make(shard)
