"""When memory runs out: tell it from other errors, and give back what is only kept for speed."""

from __future__ import annotations

import errno
import gc
import resource
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from fastedit.backbone import EditableModel
from fastedit.ops import release_workspaces

Result = TypeVar("Result")
# What torch's allocator on the CPU, the C++ library and the system say, and libraries of a GPU; a GPU's allocator has
# an exception of its own. In small letters.
_SAID = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "bad allocation",
    "status_alloc_failed",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out.

    Triton's OutOfResources does not: it is about one block of a kernel, whatever the batch, and the ops see to it.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    message = str(error).lower()
    return isinstance(error, RuntimeError) and any(said in message for said in _SAID)


class Halving:
    """How many of something go together: half as many where memory runs out; one alone is tried twice.

    Args:
        model: whose caches are emptied before the next try. size: how many at first.
        doing: what is done with them, "scoring {} edits", for the warning. then: how it goes on with fewer.
    """

    def __init__(self, model: EditableModel, size: int, doing: str, then: str = "{} at a time") -> None:
        self.model, self.size, self.doing, self.then = model, size, doing, then
        #: How many are tried now; who tries fewer than it said writes it down.
        self.trying = 0
        #: How many have ended, counted by who tries: what ran out again without any is given up.
        self.done = 0
        self._short = False
        self._failed_at = -1

    @contextmanager
    def trial(self, count: int) -> Iterator[None]:
        """Inside the block ``count`` are tried. Where memory runs out it ends without an error: try what is left again.

        Raises:
            The error itself, where one alone has no room twice, or where it is another one.
        """
        if self._short:
            # Not in the handler: the traceback holds the tensors of the batch
            release_memory(self.model)
            self._short = False
        self.trying = count
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error) or (self.trying <= 1 and self._failed_at == self.done):
                raise
            self._short = True
            tried = self.doing.format(self.trying)
            if self.trying > 1:
                self.size = self.trying // 2
                message = f"edit: memory ran out {tried}; going on with {self.then.format(self.size)}"
            else:
                self.size, self._failed_at = 1, self.done
                message = f"edit: memory ran out {tried}; trying once more with all caches emptied"
            warnings.warn(message, RuntimeWarning, stacklevel=4)


def once_more(model: EditableModel, make: Callable[[], Result], doing: str) -> Result:
    """What ``make`` makes; where memory runs out, it is tried again with all caches emptied.

    Args:
        doing: what is done, for the warning.
    Raises:
        The error itself, where it runs out again.
    """
    room = Halving(model, 1, doing)
    made: list[Result] = []
    while not made:
        with room.trial(1):
            made.append(make())
    return made[0]


def release_memory(model: EditableModel) -> None:
    """Drop remembered images and kept buffers; everything dropped is made again when it is needed."""
    model.images.clear()
    model.image_features.clear()
    model.caches.clear()
    gc.collect()
    release_workspaces()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()


def peak_memory_mib(device: torch.device) -> float:
    """Peak of this run on a GPU; of the process so far on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 2**20
    # ru_maxrss is in KiB on Linux and in bytes on macOS
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
