"""Definition of ``workspace``: uninitialised memory."""

from collections.abc import Sequence

from torch import Tensor

from fastedit.reference.arguments import check_workspace


def workspace(like: Tensor, size: Sequence[int]) -> Tensor:
    """Return an uninitialised tensor of that size."""
    check_workspace(size)
    return like.new_empty(size)
