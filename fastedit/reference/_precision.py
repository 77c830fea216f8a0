"""Accumulation dtypes shared by the references."""

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums over ``dtype`` are kept: float64 for itself, float32 for everything shorter."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widen(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in its accumulation dtype."""
    return tensor.to(accumulation_dtype(tensor.dtype))
