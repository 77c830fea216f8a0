"""``workspace``: large buffers whose memory is used again once they are dropped."""

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from fastedit import _native
from fastedit.ops._library import define
from fastedit.reference import workspace as reference
from fastedit.reference._checks import fail

MALLOC = "FASTEDIT_MALLOC"

define("workspace", "(Tensor like, SymInt[] size) -> Tensor", reference.workspace, reference.workspace)


def workspace(like: Tensor, size: Sequence[int]) -> Tensor:
    """Return an uninitialised contiguous tensor with dtype and device of another.

    On the CPU it lies on huge pages where the system has them, and the memory of a large one is kept when the tensor is
    dropped, for the next of about its size: the first touch of fresh pages costs more than most of what is written
    there. At most 1 GiB is kept; ``release_workspaces`` gives it back. A GPU's memory is kept by torch itself.

    Args:
        like: any tensor.
        size: the shape.
    Raises:
        ValueError: a negative size.
    """
    made: Tensor = torch.ops.fastedit.workspace.default(like, list(size))
    return made


def release_workspaces() -> int:
    """Give the memory kept on the CPU back to the system, the C library's too; return the bytes of dropped buffers."""
    return _native.release_kept_memory()


def keep_freed_memory(limit_bytes: int = 1 << 30) -> bool:
    """Let torch take large blocks on the CPU from those freed before; return whether it does from now on.

    A C library gives freed blocks of some MiB back to the system, or cuts small ones out of them, and every page of the
    next large one is a fault: activations are freed and taken again at every step of a fit. This holds for the whole
    process and cannot be taken back; ``release_workspaces`` gives what is kept at the time back. The environment
    variable ``FASTEDIT_MALLOC=system`` leaves all to the C library.

    Args:
        limit_bytes: most that is kept free.
    Returns:
        False where the variable says so, or there is no compiled library.
    Raises:
        ValueError: a limit that is not positive, or another value of the variable.
    """
    if limit_bytes < 1:
        fail("keep_freed_memory", "limit_bytes is positive", limit_bytes=limit_bytes)
    wanted = os.environ.get(MALLOC, "") or "keep"
    if wanted not in ("keep", "system"):
        fail("keep_freed_memory", f"{MALLOC} is keep or system", FASTEDIT_MALLOC=wanted)
    return wanted == "keep" and _native.keep_freed_memory(limit_bytes)
