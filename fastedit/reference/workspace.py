"""Definition of ``workspace``: uninitialised memory."""

from collections.abc import Sequence

from torch import Tensor


def workspace(like: Tensor, size: Sequence[int]) -> Tensor:
    """Return an uninitialised tensor of that size."""
    return like.new_empty(size)
