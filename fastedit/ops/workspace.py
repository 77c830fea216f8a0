"""``workspace``: large buffers whose memory is used again once they are dropped."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastedit import _native
from fastedit.ops._library import define, fail
from fastedit.reference import workspace as reference

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
    if any(length < 0 for length in size):
        fail("workspace", "sizes are not negative", size=tuple(size))
    made: Tensor = torch.ops.fastedit.workspace.default(like, list(size))
    return made


def release_workspaces() -> int:
    """Give the memory kept on the CPU back to the system; return its bytes."""
    return _native.release_kept_memory()
