"""The op key_value: every implementation against its definition, and the definition against single edits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastedit import ops
from fastedit.reference import key_value as reference
from fastedit.testing import assert_close, factor_rounding, key_value_inputs, providers

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# odd, empty and size-one shapes: tokens per edit, d, n, o
SHAPES = (
    ((3, 0, 7, 1), 33, 3, 17),
    ((1,), 1, 1, 1),
    ((0, 0), 5, 2, 4),
    ((40, 17), 130, 8, 65),
    ((2,), 16, 21, 300),
    ((5, 5), 64, 10, 1),
)
# every activation, with and without a gate and biases
KINDS = (
    ("relu", False, True),
    ("gelu", False, False),
    ("silu", True, True),
    ("gelu", True, True),
    ("silu", True, False),
)
NAMES = ("x", "keys", "bias", "values", "gate keys", "gate bias")


def _wide(inputs):
    return tuple(t.double() if t is not None and t.is_floating_point() else t for t in inputs)


def _call(function, inputs, activation):
    x, keys, bias, values, starts, gate_keys, gate_bias = inputs
    return function(x, keys, bias, values, starts, activation, gate_keys, gate_bias)


def _call_backward(function, grad, inputs, entering, activation, needs):
    x, keys, _, values, starts, gate_keys, _ = inputs
    return function(grad, x, keys, values, starts, entering, activation, gate_keys, needs)


def _public(inputs, activation):
    x, keys, bias, values, starts, gate_keys, gate_bias = inputs
    gate = None if gate_keys is None else (gate_keys, gate_bias)
    return ops.key_value(x, keys, bias, values, starts, activation, gate)


def _needs(inputs):
    # places of x, keys, bias, values, gate keys, gate bias among the inputs
    return [inputs[place] is not None for place in (0, 1, 2, 3, 5, 6)]


def _cases(dtype, provider):
    # the interpreter is slow: it gets the shapes that cross a block in every dimension, in both layouts
    interpreted = "interpreted" in provider.id
    for seed, shape in enumerate(SHAPES[1:5] if interpreted else SHAPES):
        # one kind a shape, and all of them in the shape of several blocks
        few = interpreted and shape != SHAPES[3]
        for activation, gated, bias in KINDS[seed % 5 : seed % 5 + 1] if few else KINDS:
            yield key_value_inputs(*shape, dtype, gated=gated, bias=bias, seed=seed), activation
    if dtype in (torch.bfloat16, torch.float16):
        yield key_value_inputs(*SHAPES[3], dtype, gated=True, weight_dtype=torch.float32), "silu"
    inputs = key_value_inputs(*SHAPES[0], dtype, gated=True)
    permuted = [t if t is None or t.dim() == 1 else t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in inputs]
    yield tuple(permuted), "silu"
    # a bias of the gate alone, laid out otherwise
    yield (*inputs[:2], None, *inputs[3:6], inputs[6].t().contiguous().t()), "gelu"
    # rows of a wider tensor, as a slice of a packed projection gives
    yield (torch.cat([inputs[0], inputs[0]], 1)[:, : inputs[0].shape[1]], *inputs[1:]), "gelu"


@pytest.mark.parametrize("provider", providers("key_value"), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_reference(provider, dtype, available):
    available(provider)
    for inputs, activation in _cases(dtype, provider):
        inputs = tuple(t if t is None else t.to(provider.device) for t in inputs)
        x, keys, values = inputs[0], inputs[1], inputs[3]
        (_, d, n), o, tokens = keys.shape, values.shape[2], max(int(x.shape[0]), 1)
        y, entering = _call(provider.function(), inputs, activation)
        goal, goal_entering = _call(reference.key_value, _wide(inputs), activation)
        assert y.dtype == dtype
        assert y.is_contiguous()
        assert_close(y, goal, length=d * n, name="y")
        rounding = factor_rounding(provider, dtype, keys.dtype)
        assert_close(entering, goal_entering, length=d, rounding=rounding, name="entering")
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
        needs = _needs(inputs)
        # relu's slope at what rounding moved across 0 is not compared: both backwards get the same entering values
        goals = _call_backward(
            reference.key_value_backward, grad.double(), _wide(inputs), entering.double(), activation, needs
        )
        layouts = (grad, grad.t().contiguous().t())
        for layout in layouts[: 1 if "interpreted" in provider.id else 2]:
            got = _call_backward(provider.function("key_value_backward"), layout, inputs, entering, activation, needs)
            lengths = (o * n, tokens * o, tokens * o, tokens * d, tokens * o, tokens * o)
            likes = (x, keys, keys, values, keys, keys)
            for name, one, other, like, length in zip(NAMES, got, goals, likes, lengths, strict=True):
                assert one.dtype == like.dtype, name
                assert one.is_contiguous(), name
                assert_close(one, other, length=length, rounding=rounding, name=f"gradient of {name}")


@pytest.mark.parametrize("provider", providers("key_value"), ids=str)
@pytest.mark.parametrize("wanted", range(7))
def test_only_needed_gradients(provider, wanted, available):
    available(provider)
    inputs = key_value_inputs((3, 2), 5, 2, 4, torch.float32, gated=True, device=provider.device)
    needs = [place == wanted for place in range(6)]
    entering = _call(reference.key_value, inputs, "silu")[1]
    grad = torch.ones(5, 4, device=provider.device)
    got = _call_backward(provider.function("key_value_backward"), grad, inputs, entering, "silu", needs)
    goal = _call_backward(reference.key_value_backward, grad, inputs, entering, "silu", needs)
    for one, other in zip(got, goal, strict=True):
        assert one.shape == other.shape
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(("activation", "gated", "bias"), KINDS)
def test_definition_by_autograd(activation, gated, bias):
    """One edit alone is the feed-forward layer that the papers write, and so are its gradients."""
    inputs = key_value_inputs((6,), 7, 4, 5, torch.float64, gated=gated, bias=bias)
    x, keys, own_bias, values, _, gate_keys, gate_bias = leaves = [
        t.requires_grad_() if t is not None and t.is_floating_point() else t for t in inputs
    ]
    function = {"relu": torch.relu, "gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu}[activation]
    up = x @ keys[0] + (own_bias[0] if bias else 0.0)
    if gated:
        up = function(x @ gate_keys[0] + (gate_bias[0] if bias else 0.0)) * up
    else:
        up = function(up)
    goal = up @ values[0]
    y = _public(leaves, activation)
    assert torch.allclose(y, goal, atol=1e-12)
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    grads = torch.autograd.grad(y.square().sum(), wanted)
    for one, other in zip(grads, torch.autograd.grad(goal.square().sum(), wanted), strict=True):
        assert torch.allclose(one, other, atol=1e-12)


@pytest.mark.parametrize(("activation", "gated", "bias"), KINDS)
def test_gradcheck(activation, gated, bias):
    inputs = key_value_inputs((2, 0, 3), 4, 2, 3, torch.float64, gated=gated, bias=bias)
    leaves = [t.requires_grad_() for t in inputs if t is not None and t.is_floating_point()]
    assert torch.autograd.gradcheck(lambda *_: _public(inputs, activation), leaves)


@pytest.mark.parametrize("case", ["plain", "with grad", "permuted"])
def test_opcheck(case):
    inputs = key_value_inputs((3, 0, 4), 6, 2, 5, torch.float32, gated=True)
    if case == "permuted":
        inputs = [t if t.dim() == 1 else t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in inputs]
    for t in inputs:
        t.requires_grad_(case == "with grad" and t.is_floating_point())
    x, keys, bias, values, starts, gate_keys, gate_bias = inputs
    torch.library.opcheck(
        torch.ops.fastedit.key_value.default, (x, keys, bias, values, starts, "silu", gate_keys, gate_bias)
    )
    torch.library.opcheck(torch.ops.fastedit.key_value.default, (x, keys, None, values, starts, "relu", None, None))
    x, keys, values, gate_keys = (t.detach() for t in (x, keys, values, gate_keys))
    arguments = (torch.ones(7, 5), x, keys, values, starts, torch.ones(7, 4), "silu", gate_keys, [True, False] * 3)
    torch.library.opcheck(torch.ops.fastedit.key_value_backward.default, arguments)


def test_compiles_without_breaks():
    def plain(inputs):
        x, *others = inputs
        return (x.sum() + _public((x * 2.0, *others), "silu")).square().sum()

    objective = torch.compile(plain, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ((3, 2), (1, 4, 2)):
        inputs = key_value_inputs(lengths, 6, 2, 5, torch.float32, gated=True)
        leaves = [t.requires_grad_() for t in inputs if t.is_floating_point()]
        grads = torch.autograd.grad(objective(inputs), leaves)
        for one, other in zip(grads, torch.autograd.grad(plain(inputs), leaves), strict=True):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    d=st.integers(1, 40),
    neurons=st.integers(1, 18),
    d_out=st.integers(1, 40),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 1000),
)
def test_properties(lengths, d, neurons, d_out, kind, seed):
    activation, gated, bias = kind
    inputs = key_value_inputs(lengths, d, neurons, d_out, torch.float32, gated=gated, bias=bias, seed=seed)
    x, keys, own_bias, values, starts, gate_keys, gate_bias = inputs
    y = _public(inputs, activation)
    # a batch has the bits of its edits one by one
    for edit in range(len(lengths)):
        rows = slice(int(starts[edit]), int(starts[edit + 1]))
        single = [t if t is None else t[edit : edit + 1] for t in (keys, own_bias, values, gate_keys, gate_bias)]
        alone = (x[rows], *single[:3], torch.tensor([0, lengths[edit]]), *single[3:])
        assert torch.equal(y[rows], _public(alone, activation))
    # values of 0 add exactly nothing, and half the neurons twice over are the neurons
    assert (_public((x, keys, own_bias, torch.zeros_like(values), *inputs[4:]), activation) == 0).all()
    doubled = [t if t is None else torch.cat([t, t], -1) for t in (keys, own_bias, gate_keys, gate_bias)]
    twice = (x, doubled[0], doubled[1], torch.cat([values, values], 1) / 2, starts, doubled[2], doubled[3])
    assert torch.allclose(_public(twice, activation), y, atol=1e-5)


@pytest.mark.parametrize("provider", providers("key_value"), ids=str)
def test_nothing_leaks_between_edits(provider, available):
    available(provider)
    inputs = key_value_inputs((5, 6, 4), 24, 4, 20, torch.float32, gated=True, device=provider.device)
    y, _ = _call(provider.function(), inputs, "silu")
    bad = inputs[0].clone()
    bad[5:11] = float("nan")
    spoiled_inputs = (bad, *inputs[1:])
    spoiled, entering = _call(provider.function(), spoiled_inputs, "silu")
    others = [*range(5), *range(11, 15)]
    assert torch.equal(spoiled[others], y[others])
    assert torch.isnan(spoiled[5:11]).all()
    grads = _call_backward(
        provider.function("key_value_backward"), torch.ones_like(y), spoiled_inputs, entering, "silu", [True] * 6
    )
    for grad in grads[1:]:
        assert torch.isfinite(grad[[0, 2]]).all()
        assert torch.isnan(grad[1]).any()


@pytest.mark.parametrize("provider", providers("key_value"), ids=str)
def test_relu_is_flat_at_zero(provider, available):
    """Tokens of zeros enter as exactly 0, where the slope is 0; beside them one that enters above."""
    available(provider)
    inputs = key_value_inputs((3,), 4, 2, 5, torch.float32, bias=False, device=provider.device)
    inputs[0][:2] = 0.0
    inputs[1][:] = inputs[1].abs()
    inputs[0][2] = inputs[0][2].abs()
    _, entering = _call(provider.function(), inputs, "relu")
    assert (entering[:2] == 0).all()
    assert (entering[2] > 0).all()
    grad = torch.ones(3, 5, device=provider.device)
    needs = [True, True, True, True, False, False]
    # entering values as rows of a wider tensor
    wider = torch.cat([entering, entering], 1)[:, :2]
    got = _call_backward(provider.function("key_value_backward"), grad, inputs, wider, "relu", needs)
    goal = _call_backward(reference.key_value_backward, grad, inputs, entering, "relu", needs)
    assert not got[0][:2].any()
    assert got[0][2].any()
    for one, other in zip(got, goal, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("provider", providers("key_value"), ids=str)
def test_relu_keeps_nan(provider, available):
    available(provider)
    inputs = key_value_inputs((2,), 4, 3, 5, torch.float32, device=provider.device)
    inputs[0][1, 0] = float("nan")
    y, _ = _call(provider.function(), inputs, "relu")
    assert torch.isfinite(y[0]).all()
    assert torch.isnan(y[1]).all()


def test_errors():
    x, keys, bias, values, starts, gate_keys, gate_bias = key_value_inputs((2, 1), 4, 2, 3, torch.float32, gated=True)
    shapes = r"key_value: x is \(T, d\), keys and gate_keys are \(B, d, n\).* \(got x=\(3, 4\), keys=\(2, 3, 2\), bias="
    with pytest.raises(ValueError, match=shapes):
        ops.key_value(x, keys[:, :3], bias, values, starts)
    for wrong in ((gate_keys[:1], None), (gate_keys, gate_bias[:, :1])):
        with pytest.raises(ValueError, match=r"key_value: x is \(T, d\)"):
            ops.key_value(x, keys, bias, values, starts, gate=wrong)
    with pytest.raises(ValueError, match=r"key_value: activation is one of relu, gelu, silu \(got activation=tanh\)"):
        ops.key_value(x, keys, bias, values, starts, "tanh")
    with pytest.raises(ValueError, match=r"key_value: the parameters have the dtype of x or are float32 \(got x="):
        ops.key_value(x, keys, bias.double(), values, starts)
    with pytest.raises(ValueError, match=r"key_value: x is float32, .* \(got x=torch.int64\)"):
        ops.key_value(x.long(), keys, bias, values, starts)
    with pytest.raises(
        ValueError, match=r"key_value: offsets is int64 of shape \(3,\) \(got offsets=torch.int32 \(3,\)\)"
    ):
        ops.key_value(x, keys, bias, values, starts.int())


@pytest.mark.parametrize(
    "provider", [p for p in providers("key_value") if p.device == "cpu" and "triton" not in p.id], ids=str
)
@pytest.mark.parametrize("wrong", [[0, 2, 2], [1, 2, 3], [0, 4, 3]])
def test_offsets_out_of_range(provider, wrong, available):
    available(provider)
    inputs = list(key_value_inputs((2, 1), 4, 2, 3, torch.float32))
    inputs[4] = torch.tensor(wrong)
    message = (
        rf"key_value: offsets rise from 0 to the number of tokens \(got offsets=\[{', '.join(map(str, wrong))}\], T=3\)"
    )
    with pytest.raises((ValueError, RuntimeError), match=message):
        _call(provider.function(), inputs, "relu")
    grad, entering = torch.ones(3, 3), torch.ones(3, 2)
    with pytest.raises((ValueError, RuntimeError), match=message):
        _call_backward(provider.function("key_value_backward"), grad, inputs, entering, "relu", [True] * 6)
