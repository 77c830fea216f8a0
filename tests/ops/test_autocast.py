"""The ops under torch.autocast: features of different dtypes meet as they do in torch's own ops."""

import itertools

import pytest
import torch

from fastedit import ops
from fastedit.ops import _library
from fastedit.testing import (
    adam_step_inputs,
    key_value_inputs,
    low_rank_inputs,
    mmd2_inputs,
    nearest_keys_inputs,
    risk_inputs,
    topk_agreement_inputs,
)

SHORT = torch.bfloat16
_NUMBERS = itertools.count()


def _autocast(dtype=SHORT):
    return torch.autocast("cpu", dtype)


def _equal(results, goals):
    for one, goal in zip(results, goals, strict=True):
        assert one.dtype == goal.dtype
        assert torch.equal(one, goal)


def test_products_are_of_the_dtype_of_autocast():
    x, down, up, starts = low_rank_inputs((3, 2), 9, 2, 5, torch.float32)
    goal = ops.low_rank(x.to(SHORT), down.to(SHORT), up.to(SHORT), starts)
    mixed = ((x, down, up), (x.to(SHORT), down, up.to(SHORT)), (x.half(), down.to(SHORT), up))
    with _autocast():
        for one in mixed[:2]:
            _equal([ops.low_rank(*one, starts)], [goal])
        assert ops.low_rank(*mixed[2], starts).dtype == SHORT
        # as torch's own products leave float64
        assert ops.low_rank(x.double(), down.double(), up.double(), starts).dtype == torch.float64
    x, keys, bias, values, starts, gate, gate_bias = key_value_inputs((3, 2), 9, 2, 5, torch.float32, gated=True)
    short = [t.to(SHORT) for t in (x, keys, bias, values, gate, gate_bias)]
    goal = ops.key_value(*short[:4], starts, "gelu", (short[4], short[5]))
    with _autocast():
        _equal([ops.key_value(x, keys, short[2], values, starts, "gelu", (gate, short[5]))], [goal])


@pytest.mark.parametrize("inside", [True, False])
def test_gradients_have_the_dtypes_of_the_parameters(inside):
    x, down, up, starts = low_rank_inputs((3, 2), 9, 2, 5, torch.float32)
    down.requires_grad_()
    up.requires_grad_()
    goal_leaves = [t.detach().to(SHORT).requires_grad_() for t in (down, up)]
    goals = torch.autograd.grad(ops.low_rank(x.to(SHORT), *goal_leaves, starts).float().sum(), goal_leaves)
    with _autocast():
        total = ops.low_rank(x, down, up, starts).float().sum()
        if inside:
            grads = torch.autograd.grad(total, [down, up])
    if not inside:
        grads = torch.autograd.grad(total, [down, up])
    _equal(grads, [goal.float() for goal in goals])


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_risk_takes_the_wider_dtype(kind):
    logits, target, segments, n, _ = risk_inputs(6, 50, 2, kind, torch.float32)
    goal = ops.risk(logits.to(SHORT).float(), target, segments, n, kind)
    with _autocast():
        _equal(ops.risk(logits.to(SHORT), target, segments, n, kind), goal)
        # nothing is rounded where nothing disagrees
        plain = ops.risk(logits, target, segments, n, kind)
    _equal(plain, ops.risk(logits, target, segments, n, kind))


def test_the_others_take_the_wider_dtype():
    x, y, *rest = mmd2_inputs((3, 2), (2, 4), 7, torch.float32)
    goal = ops.mmd2(x, y.to(SHORT).float(), *rest)
    queries, keys = nearest_keys_inputs(3, 20, 7, torch.float32)
    nearest = ops.nearest_keys(queries.to(SHORT).float(), keys, 4)
    before, after = topk_agreement_inputs(4, 30, torch.float32)
    agreement = ops.topk_agreement(before, after.to(SHORT).float(), 5)
    with _autocast():
        _equal(ops.mmd2(x, y.to(SHORT), *rest), goal)
        _equal(ops.nearest_keys(queries.to(SHORT), keys, 4), nearest)
        _equal(ops.topk_agreement(before, after.to(SHORT), 5), agreement)


def test_what_is_stored_keeps_its_dtype():
    goal = [t.clone() for t in adam_step_inputs(3, 8, torch.float32)]
    norm = ops.adam_step_(*goal, clip=1.0)
    made = [t.clone() for t in adam_step_inputs(3, 8, torch.float32)]
    with _autocast():
        _equal([ops.adam_step_(*made, clip=1.0), *made], [norm, *goal])
        assert ops.workspace(made[0], (3, 4)).dtype == torch.float32


def test_a_kernel_in_torch_feels_no_autocast(monkeypatch):
    """A product inside of a reference, or of a launcher, would be rounded without a word."""
    monkeypatch.setattr(_library, "_TRITON", {})
    name = f"served_under_autocast_{next(_NUMBERS)}"
    _library.define(name, "(Tensor x) -> Tensor", lambda x: x @ x.T, lambda x: x.new_empty(x.shape[0], x.shape[0]))
    x = torch.randn(4, 5)
    with _autocast():
        assert (x @ x.T).dtype == SHORT
        made = getattr(torch.ops.fastedit, name)(x)
    assert made.dtype == torch.float32
    assert torch.equal(made, x @ x.T)
