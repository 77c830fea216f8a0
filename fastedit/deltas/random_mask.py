"""Random binary masks that are computed where they are used and stored nowhere.

Whether an entry is kept follows from (key, number of the entry) alone: Philox4x32-10 (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011, section 3.3) turns a counter under a 64-bit key into four 32-bit words, and every
word serves two entries with 16 bits each. All arithmetic is on integers, so every machine, device and batch makes the
same mask, and a mask of any size costs no memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

#: Entries that one counter decides: four words of two halves.
LANES = 8
# Largest number of counters in work at once, over all rows: temporaries of a MiB stay in a core's cache
_COUNTERS = 1 << 17
_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def mask_key(seed: int, name: str) -> tuple[float, float, float, float]:
    """The key of a mask as four numbers of 16 bits, which any floating dtype of 24 bits or more holds exactly."""
    digest = hashlib.blake2b(f"{seed}|{name}".encode(), digest_size=8).digest()
    words = [int.from_bytes(digest[start : start + 2], "little") for start in range(0, 8, 2)]
    return float(words[0]), float(words[1]), float(words[2]), float(words[3])


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of every counter under its key, Philox4x32-10.

    Args:
        counter: four tensors of one shape, int64 with values below 2^32.
        key: two tensors, likewise; their shape broadcasts to the counter's.
    Returns:
        Four tensors, int64 with values below 2^32.
    """
    a, b, c, d = counter
    first, second = key
    for number in range(_ROUNDS):
        if number:
            first, second = (first + _WEYL[0]) & _WORD, (second + _WEYL[1]) & _WORD
        # Products of two words wrap around in int64; their bits are those of the unsigned product. Of b and d only the
        # lower word counts, so that they need not be cut
        left, right = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a = (right >> 32).bitwise_xor_(b).bitwise_xor_(first).bitwise_and_(_WORD)
        c = (left >> 32).bitwise_xor_(d).bitwise_xor_(second).bitwise_and_(_WORD)
        b, d = right, left
    return a, b & _WORD, c, d & _WORD


@torch.no_grad()
def apply_mask_(values: Tensor, keys: Tensor, keep: float) -> None:
    """Set the entries to zero that the mask of their row does not keep.

    Args:
        values: (B, P), any floating dtype, changed in place.
        keys: (B, 4), a row's key, see ``mask_key``.
        keep: share of the entries that stay, in steps of 2^-16.
    Raises:
        ValueError: shapes that do not belong together, or a share outside of [0, 1].
    """
    if values.dim() != 2 or keys.shape != (values.shape[0], 4):
        got = f"values={tuple(values.shape)}, keys={tuple(keys.shape)}"
        raise ValueError(f"mask: values are (B, P) and keys (B, 4) (got {got})")
    for start, part in _parts(keys, values.shape[1], keep):
        values[:, start : start + part.shape[1]].masked_fill_(part, 0.0)


@torch.no_grad()
def dropped_entries(keys: Tensor, width: int, keep: float) -> Tensor:
    """(B, P) bool, the entries that the masks of so many entries do not keep; arguments as of ``apply_mask_``."""
    found = torch.zeros(len(keys), width, dtype=torch.bool, device=keys.device)
    for start, part in _parts(keys, width, keep):
        found[:, start : start + part.shape[1]] = part
    return found


def _parts(keys: Tensor, width: int, keep: float) -> Iterator[tuple[int, Tensor]]:
    """Where a part of the rows begins, and which of its entries are dropped; nothing where all are kept."""
    if not 0 <= keep <= 1:
        raise ValueError(f"mask: keep lies in 0 to 1 (got keep={keep!r})")
    # Halves are compared as signed numbers, which are as evenly spread
    limit = round(keep * 2**16) - 2**15
    if limit == 2**15:
        return
    parts = keys.to(torch.int64)
    key = (parts[:, 0, None] | parts[:, 1, None] << 16, parts[:, 2, None] | parts[:, 3, None] << 16)
    at_once = max(1, _COUNTERS // max(len(keys), 1))
    for start in range(0, -(-width // LANES), at_once):
        end = min(start + at_once, -(-width // LANES))
        low = torch.arange(start, end, device=keys.device).repeat(len(keys), 1)
        zero = torch.zeros_like(low)
        # A matrix of more than 2^35 entries does not occur: the counter's other words are free
        a, b, c, d = philox((low, zero, zero, zero), key)
        pairs = torch.stack([a.bitwise_or_(b << 32), c.bitwise_or_(d << 32)], -1)
        yield start * LANES, (pairs.view(torch.int16).flatten(1) >= limit)[:, : width - start * LANES]
