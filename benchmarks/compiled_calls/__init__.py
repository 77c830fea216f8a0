"""What is compiled without a GPU: one module an op, named as it, beside what its machine code must show.

Each has ``calls() -> list[Call]``, the op's launchers called as the engine calls them, on tensors without memory, and
``FORMS``, a dict from a kernel's name to the ``Form`` (or a tuple of them) it must have; one without has no bounds.
``benchmarks/compiled_form.py`` compiles them, ``tests/kernels/test_compiled_form.py`` holds them to their forms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

#: How Triton names the dtypes.
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}


@dataclass(frozen=True)
class Call:
    """One call of an op's launcher.

    Args:
        name: what is particular about it, "r=512"; with ``dtypes`` unique among the calls of an op.
        dtypes: of features and parameters, "bf16/fp32".
        run: calls the launcher; every kernel launched is compiled.
        targets: compute capabilities to compile for.
        every: compile kernels that tune themselves in every setting that they may try, else in the first.
    """

    name: str
    dtypes: str
    run: Callable[[], Any]
    targets: Sequence[int] = (80, 90)
    every: bool = False


@dataclass(frozen=True)
class Form:
    """What a kernel's machine code must show.

    Args:
        shared: bytes of shared memory at most.
        stack: bytes of local memory of a thread at most: what does not fit the registers.
        registers: of a thread at most.
        load: bytes of the widest access to global memory at least, loads and asynchronous copies. 0: not looked at.
        store: the same of stores.
        products: capability -> instruction that multiplies matrices, ``mma`` or ``wgmma``, where all calls have it.
        only: looked at in calls whose ``"name dtypes"`` holds this.
    """

    shared: int | None = 100 * 1024
    stack: int | None = 0
    registers: int | None = 255
    load: int = 0
    store: int = 0
    products: Mapping[int, str] = field(default_factory=dict)
    only: str = ""


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor that has a shape, strides and an address divisible by 16, but no memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def label(*dtypes: torch.dtype) -> str:
    """Return "bf16/fp32" of dtypes."""
    return "/".join(NAMES[dtype] for dtype in dtypes)
