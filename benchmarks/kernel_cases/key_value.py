"""key_value forward and backward: against one feed-forward layer per edit, and padded batched products."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from benchmarks.kernel_cases._grouped import assert_equal, padded, rows, step, touched, unpadded
from benchmarks.kernel_cases._sized import Sized
from fastedit import ops
from fastedit.testing import key_value_inputs

TOKENS = 40


def _off_the_edge(x: Tensor, keys: Tensor, bias: Tensor, offsets: Tensor) -> Tensor:
    """Return the tokens, those with a neuron so near to relu's edge that rounding decides its gradient being 0."""
    up = unpadded(torch.baddbmm(bias[:, None], padded(x, offsets), keys), offsets)
    return x.masked_fill((up.abs() < 1e-4).any(-1, keepdim=True), 0.0)


def make_case(
    name: str, lengths: tuple[int, ...], d: int, neurons: int, d_out: int, *, gated: bool, device: str | None = None
) -> dict[str, Any]:
    """Return the case of these tokens per edit; relu without a gate, silu with one."""
    place = device or "cpu"

    @cache
    def inputs() -> tuple[Any, ...]:
        made = key_value_inputs(lengths, d, neurons, d_out, torch.float32, gated=gated, device=place)
        if device is not None and not gated:
            made = (_off_the_edge(made[0], made[1], made[2], made[4]), *made[1:])
        leaves = [t.requires_grad_() for t in made if t is not None and t.is_floating_point()]
        grad = torch.randn(sum(lengths), d_out, generator=torch.Generator().manual_seed(1)).to(place)
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
        "bytes": touched(sum(lengths), len(lengths), d, d_out, neurons * (d * (1 + gated) + d_out)),
        "inputs": inputs,
        "run": run,
        "baselines": {"bmm_padded": bmm_padded, "loop": loop},
        "check": lambda: assert_equal(run(), loop()),
    }


def make_even(name: str, edits: int, d: int, gated: bool, device: str) -> dict[str, Any]:
    """Return the case of 40 tokens and 10 neurons an edit, where batched products need no padding."""
    made = make_case(name, (TOKENS,) * edits, d, 10, d, gated=gated, device=device)

    def bmm() -> tuple[Tensor, ...]:
        x, keys, bias, values, _, gate_keys, gate_bias, leaves, grad = made["inputs"]()

        def forward() -> Tensor:
            tokens = x.view(edits, TOKENS, d)
            up = torch.baddbmm(bias[:, None], tokens, keys)
            code = silu(torch.baddbmm(gate_bias[:, None], tokens, gate_keys)) * up if gated else torch.relu(up)
            return torch.bmm(code, values).view(-1, d)

        return step(forward, leaves, grad)

    return {**made, "baselines": {"bmm": bmm, "loop": made["baselines"]["loop"]}}


CASES = [
    make_case("key_value", (40,) * 32, 1024, 10, 1024, gated=False),
    make_case("key_value_gated", (40,) * 32, 1024, 10, 1024, gated=True),
    make_case("key_value_ragged", tuple(8 + 9 * b % 65 for b in range(32)), 1024, 10, 1024, gated=False),
]
CUDA_CASES = [
    Sized(make_even, "key_value", {"edits": 256, "d": 4096}, {"gated": False}),
    Sized(make_even, "key_value_gated", {"edits": 256, "d": 4096}, {"gated": True}),
]
