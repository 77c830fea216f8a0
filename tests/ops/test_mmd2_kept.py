"""The op mmd2_kept: mmd2 of one group whose forward keeps what its pairs weigh."""

import importlib

import pytest
import torch

from fastedit import ops
from fastedit.reference import mmd2 as plain
from fastedit.reference import mmd2_kept as reference
from fastedit.testing import assert_close, mmd2_inputs, providers

# a row alone, one empty sample, odd, beyond a tile, whole tiles
SHAPES = ((1, 1, 1), (0, 3, 4), (9, 20, 17), (150, 33, 70), (128, 256, 3))


@pytest.mark.parametrize("provider", providers("mmd2_kept"), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
def test_equals_reference(provider, dtype, unbiased, n, m, d, available):
    available(provider)
    inputs = mmd2_inputs((n,), (m,), d, dtype)
    wide = [t.double() if t.is_floating_point() else t for t in inputs]
    goals = reference.mmd2_kept(*wide, unbiased)
    outputs = provider.function()(*inputs, unbiased)
    for name, got, goal in zip(("value", "env_grad", "pairs"), outputs, goals, strict=True):
        assert_close(got, goal, length=d + max(n, m), scale=5.0, name=name)
    on, bent = torch.full_like(outputs[0], 1.5), torch.full_like(outputs[0], -0.7)
    grads = provider.function("mmd2_kept_backward")(on, bent, *inputs, outputs[2], unbiased)
    goals = plain.mmd2_backward(on.double(), bent.double(), *wide, unbiased)
    for grad, goal in zip(grads, goals, strict=True):
        assert grad.dtype == dtype
        assert grad.is_contiguous()
        assert_close(grad, goal, length=d + max(n, m), name="gradient")


@pytest.mark.parametrize("provider", [p for p in providers("mmd2_kept") if "csrc" in p.id], ids=str)
def test_the_same_numbers_as_without(provider, available):
    """Whether a gradient is wanted changes no bit of what the forward returns."""
    available(provider)
    inputs = mmd2_inputs((150,), (140,), 33, torch.float32)
    (alone,) = [p for p in providers("mmd2") if p.id == provider.id]
    for got, goal in zip(provider.function()(*inputs, True), alone.function()(*inputs, True), strict=False):
        assert torch.equal(got, goal)


@pytest.mark.parametrize("rows", [6, 90])
def test_opcheck(rows):
    x, y, *rest = mmd2_inputs((rows,), (rows + 3,), 5, torch.float32)
    pairs = torch.ops.fastedit.mmd2_kept(x, y, *rest, True)[2]
    arguments = (torch.ones(1), torch.ones(1), x, y, *rest, pairs, True)
    torch.library.opcheck(torch.ops.fastedit.mmd2_kept_backward.default, arguments)
    torch.library.opcheck(torch.ops.fastedit.mmd2_kept.default, (x.requires_grad_(), y, *rest, True))


def test_who_keeps(monkeypatch):
    """One group of enough rows and not too many, where a gradient is wanted; the gradients are the same."""
    module = importlib.import_module("fastedit.ops.mmd2")
    called = []

    def call(name, *arguments):
        called.append(name)
        return ops_call(name, *arguments)

    ops_call = module.call
    monkeypatch.setattr(module, "call", call)
    monkeypatch.setattr(module, "_COMPILED", True)
    x, y, *rest = mmd2_inputs((80,), (70,), 5, torch.float64)
    x.requires_grad_()

    def gradient():
        value, env = ops.mmd2(x, y, *rest)
        return torch.autograd.grad((value + env.square()).sum(), x)[0]

    kept = gradient()
    assert called == ["mmd2_kept", "mmd2_kept_backward"]
    with torch.no_grad():
        ops.mmd2(x, y, *rest)
    ops.mmd2(x.detach(), y, *rest)
    monkeypatch.setattr(module, "KEPT_MOST", 149)
    assert (gradient() - kept).abs().max() < 1e-13
    monkeypatch.setattr(module, "KEPT_MOST", 150)
    monkeypatch.setattr(module, "KEPT_LEAST", 151)
    gradient()
    groups = mmd2_inputs((80, 1), (70, 1), 5, torch.float64)
    ops.mmd2(groups[0].requires_grad_(), *groups[1:])
    assert called[2:] == ["mmd2"] * 3 + ["mmd2_backward", "mmd2", "mmd2_backward", "mmd2"]


def test_composes_with_torch_func():
    x, y, *rest = mmd2_inputs((80,), (70,), 5, torch.float64)
    got = torch.func.grad(lambda one: sum(t.sum() for t in ops.mmd2(one, y, *rest)))(x)
    on = torch.ones(1, dtype=x.dtype)
    assert (got - plain.mmd2_backward(on, on, x, y, *rest, False)[0]).abs().max() < 1e-13


def test_one_group():
    x, y, *rest = mmd2_inputs((2, 3), (1, 2), 5, torch.float32)
    with pytest.raises(ValueError, match=r"pairs are kept of one group \(got G=2\)"):
        torch.ops.fastedit.mmd2_kept(x, y, *rest, True)
