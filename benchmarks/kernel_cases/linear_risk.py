"""linear_risk with the penalty on env_grad: against its bare matrix products, kept logits, and the double backward."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_cases._grouped import assert_equal
from fastedit import ops
from fastedit.testing import linear_risk_inputs


def _objective(value: Tensor, env_grad: Tensor) -> Tensor:
    # the risks and the total-variation penalty of ODEdit, equation (9)
    return value.sum() + 0.1 * env_grad.abs().sum().square()


def make_case(name: str, tokens: int, d: int, vocabulary: int, kind: str) -> dict[str, Any]:
    """Return the case; the reference of a KL kind is hidden states of the same head."""

    @cache
    def inputs() -> tuple[Any, ...]:
        hidden, weight, _, target, *_, segments, n_segments, _, _ = linear_risk_inputs(
            tokens, d, vocabulary, 8, kind, torch.float32
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
        out = kept.new_empty(len(kept), 2048)
        for _ in range(2):
            for part in weight.split(2048):
                for rows in (kept, *others):
                    torch.mm(rows, part.T, out=out[:, : len(part)])
        for part in weight.split(2048):
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
        logits = scale * (hidden @ weight.T)
        if kind == "ce":
            lost = torch.nn.functional.cross_entropy(logits, target.clamp(min=0), reduction="none")
        else:
            ours, theirs = logits.log_softmax(-1), (target @ weight.T).log_softmax(-1)
            first, second = (theirs, ours) if kind == "forward_kl" else (ours, theirs)
            lost = (first.exp() * (first - second)).sum(-1)
        masks = segments[None] == torch.arange(n_segments)[:, None]
        value = (masks * lost).sum(1) / masks.sum(1).clamp(min=1)
        env_grad = torch.stack([torch.autograd.grad(v, scale, create_graph=True)[0] for v in value])
        (grad,) = torch.autograd.grad(_objective(value, env_grad), [hidden])
        return value.detach(), env_grad.detach(), grad

    return {
        "name": name,
        "shapes": {"tokens": tokens, "d": d, "vocabulary": vocabulary, "kind": kind},
        "dtype": "float32",
        "run": run,
        "baselines": {
            "matrix_products": matrix_products,
            "risk_of_logits": risk_of_logits,
            "double_backward": double_backward,
        },
        "check": lambda: assert_equal(run(), double_backward(), tolerance=1e-3),
    }


CASES = [
    make_case("linear_risk_ce", 256, 1024, 32000, "ce"),
    make_case("linear_risk_reverse_kl", 256, 1024, 32000, "reverse_kl"),
]
