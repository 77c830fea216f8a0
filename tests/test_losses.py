"""Loss modules: torch's cross-entropy, the definitions by double backward, and what training loops do to a loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fastedit.losses import FusedLinearRisk, InvariantRisk, RiskLoss, TripartiteRisk

B, T, V, D = 3, 5, 11, 7


def drawn(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels with ignored tokens, reference logits."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, T, V, generator=generator, dtype=torch.float64)
    labels = torch.randint(V, (B, T), generator=generator)
    labels[0, :3] = labels[2, 4] = -100
    return logits, labels, torch.randn(B, T, V, generator=generator, dtype=torch.float64)


def with_gradient(loss: Any, logits: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    value = loss(leaf, *rest)
    (grad,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), grad


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_is_torch_s(reduction: Any) -> None:
    logits, labels, _ = drawn()
    torch_s = nn.CrossEntropyLoss(reduction=reduction)
    value, grad = with_gradient(RiskLoss(reduction=reduction), logits, labels)
    goal, goal_grad = with_gradient(lambda z, y: torch_s(z.transpose(1, 2), y), logits, labels)
    torch.testing.assert_close(value, goal)
    torch.testing.assert_close(grad, goal_grad)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_divergences_are_torch_s(kind: Any) -> None:
    logits, labels, reference = drawn()
    counted = labels != -100

    def by_torch(z: Tensor, _labels: Tensor, r: Tensor) -> Tensor:
        ours, kept = z.log_softmax(-1), r.log_softmax(-1)
        first, second = (kept, ours) if kind == "forward_kl" else (ours, kept)
        return functional.kl_div(second, first, log_target=True, reduction="none").sum(-1)[counted].mean()

    for got, goal in zip(
        with_gradient(RiskLoss(kind), logits, labels, reference),
        with_gradient(by_torch, logits, labels, reference),
        strict=True,
    ):
        torch.testing.assert_close(got, goal)


def test_shifted_labels_are_those_of_a_causal_model() -> None:
    logits, labels, reference = drawn()
    value, grad = with_gradient(RiskLoss(shift=True), logits, labels)
    goal, goal_grad = with_gradient(lambda z, y: RiskLoss()(z[:, :-1], y[:, 1:]), logits, labels)
    assert torch.equal(value, goal)
    assert torch.equal(grad, goal_grad)
    kept = RiskLoss("reverse_kl", shift=True)(logits, labels, reference)
    assert torch.equal(kept, RiskLoss("reverse_kl")(logits[:, :-1], labels[:, 1:], reference[:, :-1]))


def test_no_counted_token_is_a_loss_of_zero() -> None:
    logits, labels, _ = drawn()
    value, grad = with_gradient(RiskLoss(), logits, torch.full_like(labels, -100))
    assert value == 0
    assert not grad.any()
    head = nn.Linear(D, V, dtype=torch.float64)
    hidden = torch.randn(B, T, D, dtype=torch.float64)
    value, grad = with_gradient(FusedLinearRisk(head), hidden, torch.full_like(labels, -100))
    assert value == 0
    assert not grad.any()


@pytest.mark.parametrize("kind", ["ce", "forward_kl", "reverse_kl"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk", [1, 4, None])
def test_fused_is_the_head_and_then_the_risk(kind: Any, reduction: Any, chunk: int | None) -> None:
    _, labels, reference = drawn()
    head = nn.Linear(D, V, dtype=torch.float64)
    hidden = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    rest = (labels,) if kind == "ce" else (labels, reference)
    whole = RiskLoss(kind, reduction=reduction)(head(hidden), *rest)
    fused = FusedLinearRisk(head, kind, reduction=reduction, chunk=chunk)
    parts = fused(hidden, *rest)
    torch.testing.assert_close(parts, whole)
    leaves = (hidden, *head.parameters())
    for got, goal in zip(
        torch.autograd.grad(parts.sum(), leaves), torch.autograd.grad(whole.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(got, goal)
    assert not list(fused.parameters()), "the head's are the model's"


def test_fused_holds_one_chunk_of_logits() -> None:
    widths: list[int] = []

    class Head(nn.Linear):
        def forward(self, states: Tensor) -> Tensor:
            widths.append(states.shape[0])
            return super().forward(states)

    _, labels, _ = drawn()
    hidden = torch.randn(B, T, D, requires_grad=True)
    FusedLinearRisk(Head(D, V), chunk=4)(hidden, labels).backward()
    count = int((labels != -100).sum())
    assert count == 11
    assert sorted(widths) == [3, 3, 4, 4, 4, 4], "forward, and again in the backward; ignored tokens never"


def slope_by_autograd(logits: Tensor, labels: Tensor, chosen: Tensor) -> Tensor:
    w = torch.ones((), dtype=logits.dtype, requires_grad=True)
    value = functional.cross_entropy((w * logits)[chosen], labels[chosen])
    return torch.autograd.grad(value, w, create_graph=True)[0]


def test_invariant_risk_is_its_definition() -> None:
    logits, labels, _ = drawn()
    environment = torch.tensor([0, 2, 0])  # 1 is absent
    loss = InvariantRisk(3, multiplier=0.7)

    def defined(z: Tensor, y: Tensor, e: Tensor) -> Tensor:
        risks, slopes = [], []
        for number in (0, 2):
            chosen = (e == number)[:, None] & (y != -100)
            risks.append(functional.cross_entropy(z[chosen], y[chosen]))
            slopes.append(slope_by_autograd(z, y, chosen))
        return torch.stack(risks).mean() + 0.7 * torch.stack(slopes).abs().mean().square()

    for got, goal in zip(
        with_gradient(loss, logits, labels, environment),
        with_gradient(defined, logits, labels, environment),
        strict=True,
    ):
        torch.testing.assert_close(got, goal)
    assert loss.risks.isnan().tolist() == [False, True, False]
    assert loss.penalty > 0
    by_token = environment[:, None].expand(labels.shape).contiguous()
    assert torch.equal(loss(logits, labels, by_token), loss(logits, labels, environment))
    shifted = InvariantRisk(3, multiplier=0.7, shift=True)(logits, labels, environment)
    torch.testing.assert_close(shifted, loss(logits[:, :-1], labels[:, 1:], environment))


def test_tripartite_risk_is_its_three_parts() -> None:
    logits, labels, reference = drawn()
    asked, reworded = torch.randn(4, D, dtype=torch.float64), torch.randn(6, D, dtype=torch.float64)
    loss = TripartiteRisk((1.0, 2.0, 3.0))
    value = loss((logits, labels), (logits, labels, reference), (asked, reworded))
    pooled = torch.cat([asked, reworded])
    distances = torch.cdist(pooled, pooled).square()
    mean = distances.sum() / (10 * 9)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        squared = torch.cdist(a, b).square()
        return torch.stack([torch.exp(-squared / (2 * mean * scale)) for scale in loss.SCALES]).sum(0)

    mmd = kernel(asked, asked).mean() + kernel(reworded, reworded).mean() - 2 * kernel(asked, reworded).mean()
    parts = [RiskLoss()(logits, labels), RiskLoss("reverse_kl")(logits, labels, reference), mmd]
    torch.testing.assert_close(loss.parts, torch.stack(parts))
    torch.testing.assert_close(value, parts[0] + 2 * parts[1] + 3 * parts[2])
    assert torch.equal(loss((logits, labels)), parts[0])


def test_autocast_checkpointing_and_compile_change_nothing_but_rounding() -> None:
    _, labels, _ = drawn()
    head = nn.Linear(D, V)
    hidden = torch.randn(B, T, D)
    environment = torch.tensor([0, 1, 1])
    loss = InvariantRisk(2)

    def plain(states: Tensor) -> Tensor:
        value: Tensor = loss(head(states), labels, environment)
        return value

    goal = with_gradient(plain, hidden)
    kept = with_gradient(lambda states: checkpoint(plain, states, use_reentrant=False), hidden)
    compiled = with_gradient(torch.compile(plain, backend="aot_eager"), hidden)
    with torch.autocast("cpu", torch.bfloat16):
        lower = with_gradient(plain, hidden)
    for got, tolerance in ((kept, 0.0), (compiled, 1e-6), (lower, 3e-2)):
        torch.testing.assert_close(got[0], goal[0], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(got[1], goal[1], rtol=tolerance, atol=tolerance)
    assert lower[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z, y, r: RiskLoss("kl"), "RiskLoss: kind must be one of ce, forward_kl, reverse_kl"),
        (lambda z, y, r: RiskLoss(reduction="max"), "RiskLoss: reduction must be one of mean, sum, none"),
        (lambda z, y, r: RiskLoss()(z, y[:, 1:]), "RiskLoss: labels must have the shape of the logits"),
        (lambda z, y, r: RiskLoss()(z, y, r), "kind 'ce' takes no reference logits"),
        (lambda z, y, r: RiskLoss("reverse_kl")(z, y), "kind 'reverse_kl' needs reference logits"),
        (lambda z, y, r: FusedLinearRisk(nn.Identity(), chunk=0), "FusedLinearRisk: chunk must be positive"),
        (lambda z, y, r: FusedLinearRisk(nn.Identity())(z, y[:1]), "FusedLinearRisk: labels must have the shape"),
        (lambda z, y, r: InvariantRisk(0), "InvariantRisk: environments must be positive"),
        (lambda z, y, r: InvariantRisk(2, multiplier=-1), "InvariantRisk: multiplier must not be negative"),
        (lambda z, y, r: InvariantRisk(2)(z, y, y[0]), "InvariantRisk: environment must have one entry a row or"),
    ],
)
def test_what_cannot_be_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(*drawn())
