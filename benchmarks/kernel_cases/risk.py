"""risk of labelled tokens and of tokens with references, with the penalty: double backward, torch.compile, a copy."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_cases._grouped import assert_equal
from benchmarks.kernel_cases._sized import Sized
from fastedit import ops

SEGMENTS = 32
PENALTY = 0.1
#: Planes of (T, V) of the floor: both logits, the reference and both gradients once each.
PLANES = 5


def _total(values: tuple[Tensor, ...], env_grads: tuple[Tensor, ...]) -> Tensor:
    # the risks and the total-variation penalty of ODEdit, equation (9)
    return torch.cat(values).sum() + PENALTY * torch.cat(env_grads).abs().sum().square()


def _plain_risks(z: Tensor, labels: Tensor, w: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Token risks in float32: cross-entropy (T,) of z and KL(edited || reference) (T,) of w."""
    ce = torch.nn.functional.cross_entropy(z.float(), labels, reduction="none")
    own, other = w.float().log_softmax(-1), r.float().log_softmax(-1)
    return ce, (own.exp() * (own - other)).sum(-1)


def _by_segment(risks: Tensor) -> Tensor:
    """Means (S,) of tokens (T,), the same number in every segment."""
    return risks.view(SEGMENTS, -1).mean(1)


def _closed_form(z: Tensor, labels: Tensor, w: Tensor, r: Tensor) -> Tensor:
    """The objective in plain torch, its derivatives by the scale in closed form."""
    z, w, drift = z.float(), w.float(), w.float() - r.float()
    p, q = z.softmax(-1), w.softmax(-1)
    ce_env = (p * z).sum(-1) - z.gather(1, labels[:, None])[:, 0]
    kl_env = (q * w * drift).sum(-1) - (q * w).sum(-1) * (q * drift).sum(-1)
    values = tuple(_by_segment(risk) for risk in _plain_risks(z, labels, w, w - drift))
    return _total(values, (_by_segment(ce_env), _by_segment(kl_env)))


def _closed_gradients(
    z: Tensor, labels: Tensor, w: Tensor, r: Tensor, accumulate: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Gradients of the objective by z and w in plain torch, without autograd."""
    dtype = z.dtype
    z, w, r = z.to(accumulate), w.to(accumulate), r.to(accumulate)
    share = SEGMENTS / len(z)
    p, q, drift = z.softmax(-1), w.softmax(-1), w - r
    mean, q_mean, drift_mean = ((a * b).sum(-1, keepdim=True) for a, b in ((p, z), (q, w), (q, drift)))
    on_ce = _by_segment((mean - z.gather(1, labels[:, None]))[:, 0])
    a, b = w - q_mean, drift - drift_mean
    covariance = (q * a * b).sum(-1, keepdim=True)
    on_kl = _by_segment(covariance[:, 0])
    pull = 2.0 * PENALTY * share * (on_ce.abs().sum() + on_kl.abs().sum())
    on_z, on_w = ((pull * env.sign()).repeat_interleave(len(z) // SEGMENTS)[:, None] for env in (on_ce, on_kl))
    own = torch.arange(z.shape[1], device=z.device)[None] == labels[:, None]
    by_z = p * (share + on_z * (1.0 + z - mean)) - torch.where(own, share + on_z, 0.0)
    by_w = q * (share * b + on_w * (a * b - covariance + a + b))
    return by_z.to(dtype), by_w.to(dtype)


def make_case(name: str, tokens: int, vocabulary: int, dtype: torch.dtype, device: str = "cpu") -> dict[str, Any]:
    """Return the case of T labelled tokens and T tokens with references."""

    @cache
    def inputs() -> tuple[Tensor, ...]:
        make = torch.Generator(device).manual_seed(0)

        def draw() -> Tensor:
            return torch.randn(tokens, vocabulary, generator=make, device=device)

        z = (3.0 * draw()).to(dtype).requires_grad_()
        labels = torch.randint(vocabulary, (tokens,), generator=make, device=device)
        r = (3.0 * draw()).to(dtype)
        w = (r + 0.1 * draw()).to(dtype).requires_grad_()
        segments = torch.arange(SEGMENTS, device=device).repeat_interleave(tokens // SEGMENTS)
        return z, labels, w, r, segments

    def run() -> tuple[Tensor, ...]:
        z, labels, w, r, segments = inputs()
        ce, ce_env = ops.risk(z, labels, segments, SEGMENTS, "ce")
        kl, kl_env = ops.risk(w, r, segments, SEGMENTS, "reverse_kl")
        return torch.autograd.grad(_total((ce, kl), (ce_env, kl_env)), (z, w))

    def double_backward() -> tuple[Tensor, ...]:
        z, labels, w, r, _ = inputs()
        # a scale a segment: one walk gives every environment's derivative
        scale = torch.ones(SEGMENTS, device=device, requires_grad=True)
        wide = scale.repeat_interleave(tokens // SEGMENTS)[:, None].to(dtype)
        values = tuple(_by_segment(risk) for risk in _plain_risks(wide * z, labels, wide * w, r))
        env_grads = tuple(torch.autograd.grad(value.sum(), scale, create_graph=True)[0] for value in values)
        return torch.autograd.grad(_total(values, env_grads), (z, w))

    @cache
    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, dynamic=False)

    def compiled_closed_form() -> tuple[Tensor, ...]:
        z, labels, w, r, _ = inputs()
        return torch.autograd.grad(compiled(_closed_form)(z, labels, w, r), (z, w))

    def compiled_closed_gradients() -> tuple[Tensor, ...]:
        z, labels, w, r, _ = inputs()
        by_z, by_w = compiled(_closed_gradients)(z.detach(), labels, w.detach(), r)
        return by_z, by_w

    def _no_penalty(z: Tensor, labels: Tensor, w: Tensor, r: Tensor) -> Tensor:
        ce, kl = _plain_risks(z, labels, w, r)
        return _by_segment(ce).sum() + _by_segment(kl).sum()

    def compiled_without_penalty() -> tuple[Tensor, ...]:
        z, labels, w, r, _ = inputs()
        return torch.autograd.grad(compiled(_no_penalty)(z, labels, w, r), (z, w))

    @cache
    def planes() -> tuple[Tensor, Tensor]:
        # copying n bytes moves 2 n
        count = tokens * vocabulary * PLANES // 2
        return torch.zeros(count, dtype=dtype, device=device), torch.zeros(count, dtype=dtype, device=device)

    def copy() -> tuple[Tensor, ...]:
        return (planes()[0].copy_(planes()[1]),)

    def check() -> None:
        z, labels, w, r, _ = (each.detach() for each in inputs())
        exact = _closed_gradients(z.double(), labels, w.double(), r.double(), torch.float64)
        bound = 1e-5 if dtype == torch.float32 else 2e-2
        assert_equal(run(), exact, tolerance=bound)
        # Derivatives of derivatives lose digits in float32: 1.3e-4 where torch has AVX2 alone
        for baseline in (double_backward, compiled_closed_form, compiled_closed_gradients):
            assert_equal(baseline(), exact, tolerance=max(bound, 1e-3))

    return {
        "name": name,
        "shapes": {"labelled": tokens, "referenced": tokens, "vocabulary": vocabulary},
        "dtype": str(dtype).removeprefix("torch."),
        "bytes": PLANES * tokens * vocabulary * dtype.itemsize,
        "run": run,
        "baselines": {
            "double_backward": double_backward,
            "compiled_closed_form": compiled_closed_form,
            "compiled_closed_gradients": compiled_closed_gradients,
            "compiled_without_penalty": compiled_without_penalty,
            "copy": copy,
        },
        "check": check,
    }


CASES = [
    make_case("risk", 512, 32000, torch.float32),
    make_case("risk_bf16", 256, 151_936, torch.bfloat16),
]
CUDA_CASES = [Sized(make_case, "risk_bf16", {"tokens": 4096, "vocabulary": 151_936}, {"dtype": torch.bfloat16})]
