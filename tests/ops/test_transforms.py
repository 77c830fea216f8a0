"""The ops under torch.func: gradients as autograd's, a second one refused in words."""

import pytest
import torch

from fastedit import ops
from fastedit.testing import key_value_inputs, low_rank_inputs, mmd2_inputs, risk_inputs


def _functions():
    logits, target, segments, n, kind = risk_inputs(6, 20, 2, "reverse_kl", torch.float64)
    x, down, up, starts = low_rank_inputs((2, 3), 4, 2, 3, torch.float64)
    token, keys, bias, values, begins, _, _ = key_value_inputs((2, 3), 4, 2, 3, torch.float64)
    a, b, *rest = mmd2_inputs((2, 3), (3, 1), 4, torch.float64)
    return {
        "risk": (lambda z: sum(t.sin().sum() for t in ops.risk(z, target, segments, n, kind)), logits),
        "low_rank": (lambda u: ops.low_rank(x, down, u, starts).sin().sum(), up),
        "key_value": (lambda k: ops.key_value(token, k, bias, values, begins, "gelu").sin().sum(), keys),
        "mmd2": (lambda f: sum(t.sin().sum() for t in ops.mmd2(f, b, *rest)), a),
    }


NAMES = tuple(_functions())


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name):
    function, at = _functions()[name]
    leaf = at.clone().requires_grad_()
    (goal,) = torch.autograd.grad(function(leaf), leaf)
    grad, value = torch.func.grad_and_value(function)(at)
    assert torch.equal(grad, goal)
    assert torch.equal(value, function(at))
    _, pull = torch.func.vjp(function, at)
    assert torch.equal(pull(torch.tensor(2.0, dtype=at.dtype))[0], 2.0 * goal)


@pytest.mark.parametrize("name", NAMES)
def test_a_second_gradient_is_refused(name):
    function, at = _functions()[name]
    with pytest.raises(RuntimeError, match="closed forms that are not differentiable again"):
        torch.func.grad(lambda x: torch.func.grad(function)(x).square().sum())(at)


def test_a_second_gradient_past_an_op_is_none_of_its_business():
    """The outer derivative by something that the op does not see."""
    function, at = _functions()["risk"]
    scale = torch.tensor(3.0, dtype=at.dtype)
    outer = torch.func.grad(lambda s: (s * torch.func.grad(function)(at)).sum())(scale)
    assert torch.allclose(outer, torch.func.grad(function)(at).sum())


def test_arguments_are_checked():
    with pytest.raises(ValueError, match=r"risk: labels lie in \[0, V\)"):
        torch.func.grad(lambda z: ops.risk(z, torch.tensor([9, 9]), torch.tensor([0, 0]), 1)[0].sum())(torch.ones(2, 4))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", NAMES)
def test_vmap_of_a_gradient_is_that_of_each(name):
    function, at = _functions()[name]
    batch = torch.stack([at, 2 * at, -at])
    mapped = torch.func.vmap(torch.func.grad(function))(batch)
    assert torch.equal(mapped, torch.stack([torch.func.grad(function)(one) for one in batch]))
    assert torch.equal(torch.func.vmap(function)(batch), torch.stack([function(one) for one in batch]))
