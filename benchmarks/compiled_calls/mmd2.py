"""mmd2 as `tripartite` passes it: states of a few views an edit, and one large group."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.compiled_calls import Call, Form, empty, label

#: Groups, rows of x and of y in each, features.
SIZES = {"large group": (1, 4096, 4096), "groups of 16": (32, 8, 4096)}


def _step(dtype: torch.dtype, groups: int, rows: int, features: int) -> None:
    from fastedit.kernels.mmd2 import mmd2, mmd2_backward

    x, y = (empty(groups * rows, features, dtype=dtype) for _ in range(2))
    offsets = [empty(groups + 1, dtype=torch.int64) for _ in range(2)]
    bandwidths = empty(groups, 5)
    on = [empty(groups) for _ in range(2)]
    mmd2(x, y, *offsets, bandwidths, True)
    mmd2_backward(*on, x, y, *offsets, bandwidths, True)


def calls() -> list[Call]:
    """Return a call for every dtype, and one of small groups in that of most models, in every setting."""
    large, small = SIZES.items()
    cases = (
        (large, torch.bfloat16, (80, 90)),
        (small, torch.bfloat16, (90,)),
        (large, torch.float16, (90,)),
        (large, torch.float32, (90,)),
    )
    return [
        Call(name, label(dtype), partial(_step, dtype, *sizes), targets, every=targets == (90,))
        for (name, sizes), dtype, targets in cases
    ]


_PRODUCTS = (Form(load=16, products={80: "mma"}), Form(products={90: "wgmma"}, only="large group"))
FORMS = {
    "_centre_kernel": Form(load=16),
    "_shift_kernel": Form(load=16, store=16),
    "_sums_kernel": _PRODUCTS,
    "_weights_kernel": _PRODUCTS,
    "_gradient_kernel": (*_PRODUCTS, Form(store=16)),
    "_group_kernel": Form(),
}
