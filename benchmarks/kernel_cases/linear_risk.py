"""linear_risk with the penalty on env_grad: against its bare matrix products, kept logits, and the double backward."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_cases._grouped import assert_equal
from benchmarks.kernel_cases._sized import Sized
from fastedit import ops
from fastedit.testing import linear_risk_inputs

SEGMENTS = 8


def _objective(value: Tensor, env_grad: Tensor) -> Tensor:
    # the risks and the total-variation penalty of ODEdit, equation (9)
    return value.sum() + 0.1 * env_grad.abs().sum().square()


def _token_risks(logits: Tensor, target: Tensor, kind: str) -> Tensor:
    """Return risks (T,) of labels (T,) or of reference logits (T, V)."""
    if kind == "ce":
        return torch.nn.functional.cross_entropy(logits, target.clamp(min=0), reduction="none")
    ours, theirs = logits.log_softmax(-1), target.log_softmax(-1)
    first, second = (theirs, ours) if kind == "forward_kl" else (ours, theirs)
    return (first.exp() * (first - second)).sum(-1)


def _drawn(
    tokens: int, d: int, vocabulary: int, kind: str, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Return hidden states, head, target and segments drawn on the device, no token ignored."""
    make = torch.Generator(device).manual_seed(0)
    hidden, drift = (torch.randn(tokens, d, generator=make, device=device) for _ in range(2))
    weight = torch.randn(vocabulary, d, generator=make, device=device).mul_(2.0 / d**0.5)
    labels = torch.randint(vocabulary, (tokens,), generator=make, device=device)
    target = labels if kind == "ce" else (hidden + 0.1 * drift).to(dtype)
    segments = torch.arange(tokens, device=device) % SEGMENTS
    return hidden.to(dtype).requires_grad_(), weight.to(dtype), target, segments, SEGMENTS


def make_case(
    name: str,
    tokens: int,
    d: int,
    vocabulary: int,
    kind: str,
    dtype: torch.dtype = torch.float32,
    device: str | None = None,
) -> dict[str, Any]:
    """Return the case; the reference of a KL kind is hidden states of the same head. Drawn on the device if named."""
    chunk = 2048 if device is None else 16_384

    @cache
    def inputs() -> tuple[Any, ...]:
        if device is not None:
            return _drawn(tokens, d, vocabulary, kind, dtype, device)
        hidden, weight, _, target, *_, segments, n_segments, _, _ = linear_risk_inputs(
            tokens, d, vocabulary, SEGMENTS, kind, dtype
        )
        return hidden.requires_grad_(), weight, target, segments, n_segments

    def run() -> tuple[Tensor, ...]:
        hidden, weight, target, segments, n_segments = inputs()
        own = target if kind == "ce" else (target, weight)
        value, env_grad = ops.linear_risk(hidden, weight, own, segments, n_segments, kind)
        (grad,) = torch.autograd.grad(_objective(value, env_grad), [hidden])
        return value.detach(), env_grad.detach(), grad

    def matrix_products() -> tuple[Tensor, ...]:
        # logits twice and the gradient once; with a reference, its logits twice more. Ignored tokens are left out.
        hidden, weight, target, segments, _ = inputs()
        kept = hidden.detach()[segments >= 0]
        others = [] if kind == "ce" else [target[segments >= 0]]
        grad = torch.zeros_like(kept)
        out = kept.new_empty(len(kept), chunk)
        for _ in range(2):
            for part in weight.split(chunk):
                for rows in (kept, *others):
                    torch.mm(rows, part.T, out=out[:, : len(part)])
        for part in weight.split(chunk):
            grad.addmm_(out[:, : len(part)], part)
        return (grad,)

    def risk_of_logits() -> tuple[Tensor, ...]:
        hidden, weight, target, segments, n_segments = inputs()
        own = target if kind == "ce" else target @ weight.T
        value, env_grad = ops.risk(hidden @ weight.T, own, segments, n_segments, kind)
        (grad,) = torch.autograd.grad(_objective(value, env_grad), [hidden])
        return value.detach(), env_grad.detach(), grad

    def double_backward() -> tuple[Tensor, ...]:
        hidden, weight, target, segments, n_segments = inputs()
        scale = torch.ones((), requires_grad=True)
        lost = _token_risks(scale * (hidden @ weight.T), target if kind == "ce" else target @ weight.T, kind)
        masks = segments[None] == torch.arange(n_segments)[:, None]
        value = (masks * lost).sum(1) / masks.sum(1).clamp(min=1)
        env_grad = torch.stack([torch.autograd.grad(v, scale, create_graph=True)[0] for v in value])
        (grad,) = torch.autograd.grad(_objective(value, env_grad), [hidden])
        return value.detach(), env_grad.detach(), grad

    def one_walk(wide: torch.dtype = dtype) -> tuple[Tensor, ...]:
        # a scale a segment: one walk gives every segment's derivative, where a walk each would not fit a GPU
        hidden, weight, target, segments, _ = inputs()
        hidden, weight = hidden.detach().to(wide).requires_grad_(), weight.to(wide)
        scale = torch.ones(SEGMENTS, device=device, requires_grad=True)
        own = target if kind == "ce" else (target.to(wide) @ weight.T).float()
        lost = _token_risks(scale[segments][:, None] * (hidden @ weight.T).float(), own, kind)
        count = torch.bincount(segments, minlength=SEGMENTS).clamp(min=1)
        value = lost.new_zeros(SEGMENTS).index_add(0, segments, lost) / count
        (env_grad,) = torch.autograd.grad(value.sum(), scale, create_graph=True)
        (grad,) = torch.autograd.grad(_objective(value, env_grad), [hidden])
        return value.detach(), env_grad.detach(), grad

    def check() -> None:
        if device is None:
            assert_equal(run(), double_backward(), tolerance=1e-3)
        else:
            # the op does not round logits to the dtype of hidden
            assert_equal(run(), one_walk(torch.float32), tolerance=1e-3 if dtype == torch.float32 else 2e-2)

    return {
        "name": name,
        "shapes": {"tokens": tokens, "d": d, "vocabulary": vocabulary, "kind": kind},
        "dtype": str(dtype).removeprefix("torch."),
        # every product once: logits, the gradient, the reference's logits
        "flops": 2 * tokens * d * vocabulary * (2 if kind == "ce" else 3),
        "run": run,
        "baselines": {
            "matrix_products": matrix_products,
            "risk_of_logits": risk_of_logits,
            "double_backward": double_backward if device is None else one_walk,
        },
        "check": check,
    }


CASES = [
    make_case("linear_risk_ce", 256, 1024, 32000, "ce"),
    make_case("linear_risk_reverse_kl", 256, 1024, 32000, "reverse_kl"),
]
CUDA_CASES = [
    Sized(
        make_case,
        f"linear_risk_{kind}_bf16",
        {"tokens": 4096, "d": 4096, "vocabulary": 151_936},
        {"kind": kind, "dtype": torch.bfloat16},
    )
    for kind in ("ce", "reverse_kl")
]
