"""Whether a delta can be held at all, asked before it is allocated."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from fastedit.deltas.base import DeltaSpec


def check_room(spec: DeltaSpec, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a delta of which one alone is larger than all the memory of its device, free or not.

    Raises:
        ValueError: names the sizes in its spec.
    """
    needed = sum(math.prod(shape) for shape in shapes) * dtype.itemsize
    if device.type == "cuda":
        total = int(torch.cuda.get_device_properties(device).total_memory)
    elif device.type == "cpu" and hasattr(os, "sysconf"):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return
    if needed > total:
        sizes = [f"{name}={value}" for name, value in spec.options.items() if type(value) is int]
        got = ", ".join([f"{needed >> 20} MiB", *sizes, f"sites={len(spec.sites)}"])
        raise ValueError(
            f"delta: one of kind {spec.kind!r} must fit into the {total >> 20} MiB of {device} (got {got})"
        )
