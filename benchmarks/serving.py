"""Who serves an op on a device, who else could, and letting that one do it for a while."""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastedit import ops

NAMESPACE = "fastedit"


def server(stem: str, device: str) -> str:
    """Return who serves the op of this stem: ``csrc``, ``triton`` or ``reference``."""
    served = ops.implementations()
    return served[stem if stem in served else f"{stem}_"][device]


def others(stem: str, device: str) -> list[str]:
    """Return who else could: Triton, where the op has such a kernel and another serves. On a CPU, interpreted."""
    known = importlib.util.find_spec("triton") and importlib.util.find_spec(f"fastedit.kernels.{stem}")
    runs = device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return ["triton"] if known and runs and server(stem, device) != "triton" else []


@contextmanager
def served_by_triton(stem: str, device: str) -> Iterator[None]:
    """Let Triton serve an op and its gradient inside the block."""
    module = importlib.import_module(f"fastedit.kernels.{stem}")
    names = [name for name in (stem, f"{stem}_", f"{stem}_backward") if hasattr(module, name)]
    with torch.library._scoped_library(NAMESPACE, "IMPL") as library, warnings.catch_warnings():
        # torch warns that a kernel is overridden, which is the point
        warnings.simplefilter("ignore", UserWarning)
        for name in names:
            library.impl(name, getattr(module, name), device.upper(), allow_override=True)
        yield
