"""Triton on a GPU, where nobody looks at offsets, segments and labels first: kernels stay within their tensors."""

import importlib

import pytest
import torch

from fastedit.testing import (
    key_value_inputs,
    low_rank_inputs,
    mmd2_inputs,
    providers,
    risk_inputs,
)

INTERPRETED = [p for p in providers("low_rank") if p.id == "triton:interpreted"]
OFFSETS = ([0, 2, 9], [0, 3, 1], [-5, 2, 3], [2**40, -(2**40), 3], [0, 2**62, 2**62])


@pytest.fixture(autouse=True)
def _interpreter(available):
    if not INTERPRETED:
        pytest.skip("triton is not installed")
    available(INTERPRETED[0])


def _module(name, monkeypatch, *checks):
    """Import a launcher's module without its look at values, which a GPU does not get."""
    module = importlib.import_module(f"fastedit.kernels.{name}")
    for check in checks:
        monkeypatch.setattr(module, check, lambda *arguments, **named: None)
    return module


def _among_nan(x):
    """Return the same numbers with NaN in memory before and behind them."""
    room = torch.full((x.shape[0] + 64, *x.shape[1:]), float("nan"), dtype=x.dtype)
    room[32:-32] = x
    return room[32:-32]


@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
def test_low_rank(offsets, monkeypatch):
    _module("_grouped", monkeypatch, "offsets_of")
    module = _module("low_rank", monkeypatch)
    x, down, up, _ = low_rank_inputs((2, 1), 9, 2, 5, torch.float32)
    x, starts = _among_nan(x), torch.tensor(offsets)
    module.low_rank(x, down, up, starts)
    grads = module.low_rank_backward(_among_nan(torch.ones(3, 5)), x, down, up, starts, [False, True, True])
    assert all(torch.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
def test_key_value(offsets, monkeypatch):
    _module("_grouped", monkeypatch, "offsets_of")
    module = _module("key_value", monkeypatch)
    x, keys, bias, values, _, gate, gate_bias = key_value_inputs((2, 1), 9, 2, 5, torch.float32, gated=True)
    x, starts = _among_nan(x), torch.tensor(offsets)
    module.key_value(x, keys, bias, values, starts, "silu", gate, gate_bias)
    entering, grad = _among_nan(torch.ones(3, 4)), _among_nan(torch.ones(3, 5))
    # gradients of tokens that no edit has are not written, so not read either
    grads = module.key_value_backward(grad, x, keys, values, starts, entering, "silu", gate, [False] + [True] * 5)
    assert all(torch.isfinite(one).all() for one in grads)


@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
def test_mmd2(offsets, monkeypatch):
    _module("_mmd2_rows", monkeypatch, "mmd2_offsets")
    module = _module("mmd2", monkeypatch)
    x, y, _, y_offsets, bandwidths = mmd2_inputs((2, 1), (2, 2), 5, torch.float32)
    x, y, starts = _among_nan(x), _among_nan(y), torch.tensor(offsets)
    for one in ((x, y, starts, y_offsets), (y, x, y_offsets, starts)):
        value, env = module.mmd2(*one, bandwidths, False)
        assert value.shape == env.shape == (2,)
        module.mmd2_backward(torch.ones(2), torch.ones(2), *one, bandwidths, False)


def test_labels_and_segments(monkeypatch):
    """A label outside of the vocabulary gives NaN, a segment that does not exist is ignored like a negative one."""
    module = _module("risk", monkeypatch, "check_labels", "check_segments")
    labels, own = torch.tensor([3, 40, -1, 2, 2**40]), torch.tensor([0, 1, 2, 7, 2**40])
    logits = _among_nan(risk_inputs(5, 40, 1, "ce", torch.float32)[0])
    value, env, stats = module.risk(logits, labels, own, 3, "ce")
    assert value.isnan().tolist() == env.isnan().tolist() == [False, True, True]
    grad = module.risk_backward(torch.ones(3), torch.ones(3), logits, labels, own, stats, "ce")
    assert torch.isfinite(grad[0]).all()
    assert (grad[3:] == 0).all()
