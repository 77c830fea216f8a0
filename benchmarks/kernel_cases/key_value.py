"""key_value forward and backward: against one feed-forward layer per edit, and padded batched products."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from benchmarks.kernel_cases._grouped import assert_equal, padded, rows, step, unpadded
from fastedit import ops
from fastedit.testing import key_value_inputs


def make_case(name: str, lengths: tuple[int, ...], d: int, neurons: int, d_out: int, *, gated: bool) -> dict[str, Any]:
    """Return the case of these tokens per edit; relu without a gate, silu with one."""

    @cache
    def inputs() -> tuple[Any, ...]:
        made = key_value_inputs(lengths, d, neurons, d_out, torch.float32, gated=gated)
        leaves = [t.requires_grad_() for t in made if t is not None and t.is_floating_point()]
        grad = torch.randn(sum(lengths), d_out, generator=torch.Generator().manual_seed(1))
        return *made, leaves, grad

    def run() -> tuple[Tensor, ...]:
        x, keys, bias, values, offsets, gate_keys, gate_bias, leaves, grad = inputs()
        gate = (gate_keys, gate_bias) if gated else None
        activation = "silu" if gated else "relu"
        return step(lambda: ops.key_value(x, keys, bias, values, offsets, activation, gate), leaves, grad)

    def loop() -> tuple[Tensor, ...]:
        x, keys, bias, values, offsets, gate_keys, gate_bias, leaves, grad = inputs()

        def one(edit: int, tokens: Tensor) -> Tensor:
            up = torch.addmm(bias[edit], tokens, keys[edit])
            code = silu(torch.addmm(gate_bias[edit], tokens, gate_keys[edit])) * up if gated else torch.relu(up)
            return code @ values[edit]

        return step(lambda: torch.cat([one(b, x[own]) for b, own in enumerate(rows(offsets))]), leaves, grad)

    def bmm_padded() -> tuple[Tensor, ...]:
        x, keys, bias, values, offsets, gate_keys, gate_bias, leaves, grad = inputs()

        def forward() -> Tensor:
            tokens = padded(x, offsets)
            up = torch.baddbmm(bias[:, None], tokens, keys)
            code = silu(torch.baddbmm(gate_bias[:, None], tokens, gate_keys)) * up if gated else torch.relu(up)
            return unpadded(torch.bmm(code, values), offsets)

        return step(forward, leaves, grad)

    return {
        "name": name,
        "shapes": {"tokens": list(lengths), "d": d, "neurons": neurons, "d_out": d_out, "gated": gated},
        "dtype": "float32",
        "run": run,
        "baselines": {"bmm_padded": bmm_padded, "loop": loop},
        "check": lambda: assert_equal(run(), loop()),
    }


CASES = [
    make_case("key_value", (40,) * 32, 1024, 10, 1024, gated=False),
    make_case("key_value_gated", (40,) * 32, 1024, 10, 1024, gated=True),
    make_case("key_value_ragged", tuple(8 + 9 * b % 65 for b in range(32)), 1024, 10, 1024, gated=False),
]
