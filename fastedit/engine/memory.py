"""When memory runs out: tell it from other errors, and give back what is only kept for speed."""

from __future__ import annotations

import gc
import resource
import sys

import torch

from fastedit.backbone import EditableModel
from fastedit.ops import release_workspaces

# What torch's allocator on the CPU and the C++ library say; a GPU has an exception of its own.
_SAID = ("can't allocate memory", "not enough memory", "bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _SAID)


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
