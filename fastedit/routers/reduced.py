"""Stored vectors in few dimensions, for a first pass over all of them that misses no pair.

What is left out of a vector is bounded by its length (Cauchy-Schwarz), which is kept as one more coordinate: the inner
product of two reduced vectors is at least, their distance at most, that of the whole ones. What stored vectors have in
common lies in few directions, so that little passes that should not, and a fraction of the bytes is read.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

#: Stored vectors from which on it pays: fewer are compared whole in the time that calls take.
LEAST_ROWS = 4096
#: Coordinates that are kept, that of the rest among them.
KEPT = 64
#: Vectors that the directions are taken from, and the most of their squared length that may be left out.
SAMPLE, MOST_LEFT_OUT = 4096, 0.25
#: Vectors that are reduced at a time.
AT_ONCE = 1 << 15


class Reduced:
    """Stored vectors in the directions of most of their squared length.

    Args:
        stored: (B, d), float32 or float64; the directions are those of its first rows.
        centred: of the vectors less their mean, which distances do not see and inner products do.
        dtype: that reduced vectors are kept in; what its rounding moves is for those who compare them to know.
    """

    def __init__(self, stored: Tensor, *, centred: bool = False, dtype: torch.dtype | None = None) -> None:
        sample = stored[:SAMPLE].double()
        self.mean = (sample.mean(0) if centred else torch.zeros_like(sample[0])).to(stored.dtype)
        sample = sample - self.mean
        values, vectors = torch.linalg.eigh(sample.T @ sample)
        #: Share of the squared length that reduced vectors know the length of alone.
        self.left_out = float(values[: 1 - KEPT].sum() / values.sum().clamp(min=1e-300))
        self.basis = vectors[:, 1 - KEPT :].to(stored.dtype)
        self.dtype = stored.dtype if dtype is None else dtype
        self._rows, self._known = stored.new_empty(0, KEPT, dtype=self.dtype), 0
        self._lock = threading.Lock()

    @staticmethod
    def pays(stored: Tensor) -> bool:
        """Whether so many vectors of such a width are worth it."""
        wide = stored.shape[1] >= 2 * KEPT and stored.dtype in (torch.float32, torch.float64)
        return wide and len(stored) >= LEAST_ROWS

    @property
    def is_close(self) -> bool:
        """Whether little is left out."""
        return self.left_out <= MOST_LEFT_OUT

    def of(self, vectors: Tensor) -> Tensor:
        """(R, KEPT) of vectors (R, d): coordinates, and the length of what they leave out."""
        vectors = vectors - self.mean
        low = vectors @ self.basis
        # Not from the difference of two squares, which loses what is small
        rest = torch.linalg.vector_norm(vectors - low @ self.basis.T, dim=1, keepdim=True)
        return torch.cat([low, rest], 1).to(self.dtype)

    def rows(self, stored: Tensor) -> Tensor:
        """(B, KEPT) of stored vectors that begin with those that were known; only the others are computed."""
        with self._lock:
            count = len(stored)
            if count > len(self._rows):
                grown = self._rows.new_empty(count + count // 8, KEPT)
                grown[: self._known] = self._rows[: self._known]
                self._rows = grown
            for start in range(self._known, count, AT_ONCE):
                part = stored[start : min(start + AT_ONCE, count)]
                self._rows[start : start + len(part)] = self.of(part)
            self._known = max(self._known, count)
            return self._rows[:count]


def short_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where products of it are faster than those of float32; else None."""
    if device.type == "cpu":
        return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else None
    return torch.bfloat16 if device.type == "cuda" else None
