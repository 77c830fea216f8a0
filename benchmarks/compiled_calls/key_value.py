"""key_value as `unike` (10 neurons an edit) and `tpatcher` (5) pass it: parameters in float32 for any tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks.compiled_calls import Call, Form, empty, label

D, D_OUT, EDITS, TOKENS = 4096, 4096, 16, 640


def _step(dtype: torch.dtype, neurons: int, activation: str, gated: bool) -> None:
    from fastedit.kernels.key_value import key_value, key_value_backward

    x, grad = empty(TOKENS, D, dtype=dtype), empty(TOKENS, D_OUT, dtype=dtype)
    keys, values, bias = empty(EDITS, D, neurons), empty(EDITS, neurons, D_OUT), empty(EDITS, neurons)
    gate, gate_bias = (empty(EDITS, D, neurons), empty(EDITS, neurons)) if gated else (None, None)
    offsets = empty(EDITS + 1, dtype=torch.int64)
    _, entering = key_value(x, keys, bias, values, offsets, activation, gate, gate_bias)
    needs = [True, True, True, True, gated, gated]
    key_value_backward(grad, x, keys, values, offsets, entering, activation, gate, needs)


def calls() -> list[Call]:
    """Return a step in every dtype, with and without a gate, of one edit and of a sequence."""
    table = (
        (torch.bfloat16, 10, "silu", True, (80, 90)),
        (torch.bfloat16, 5, "relu", False, (90,)),
        (torch.bfloat16, 512, "silu", True, (90,)),
        (torch.float32, 10, "gelu", False, (90,)),
        (torch.float32, 512, "silu", True, (90,)),
    )
    return [
        Call(
            f"n={neurons} {activation}{' gated' if gated else ''}",
            label(dtype, torch.float32),
            partial(_step, dtype, neurons, activation, gated),
            targets,
        )
        for dtype, neurons, activation, gated, targets in table
    ]


PRODUCTS = {80: "mma", 90: "wgmma"}
FORMS: dict[str, Any] = {
    "_code_kernel": (
        # tokens, and codes whose rows begin at multiples of 16
        Form(load=16),
        *(Form(products={80: "mma", 90: "mma"}, only=f"n={neurons} ") for neurons in (5, 10)),
        Form(products=PRODUCTS, store=16, only="n=512 "),
    ),
    "_neuron_kernel": (Form(shared=4096), Form(load=16, store=16, only="n=512 ")),
    "_expand_kernel": (Form(store=16, products=PRODUCTS), Form(load=16, only="n=512 ")),
    "_slope_kernel": (Form(shared=4096), Form(load=16, store=16, only="n=512 ")),
    "_weight_kernel": Form(load=16, products=PRODUCTS),
    "_bias_kernel": (Form(shared=4096), Form(load=16, only="n=512 ")),
}
