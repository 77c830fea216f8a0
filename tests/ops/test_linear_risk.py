"""The op linear_risk: every implementation against risk of the logits written out, with chunks of every size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastedit import ops
from fastedit.reference import linear_risk as reference
from fastedit.testing import assert_close, linear_risk_inputs, providers

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KINDS = ("ce", "forward_kl", "reverse_kl")
# tokens, d, V, segments: odd, empty and size-one shapes, and a vocabulary of several chunks with a ragged end
SHAPES = ((7, 33, 501, 3), (1, 1, 1, 1), (0, 5, 9, 2), (5, 12, 4999, 4))
SMALL = 4096  # bytes: less than one row of anything, so that chunks are the smallest there are
NEEDS = [True, True, True]


def _wide(inputs):
    return tuple(t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in inputs)


def _cases(dtype, provider):
    shapes = SHAPES[:3] if "interpreted" in provider.id else SHAPES
    for seed, shape in enumerate(shapes):
        for kind in KINDS:
            for form in ("logits", "hidden") if kind != "ce" else ("labels",):
                yield linear_risk_inputs(*shape, kind, dtype, form=form, bias=seed % 2 == 0, budget=SMALL, seed=seed)
    hidden, weight, *others = linear_risk_inputs(*SHAPES[0], "reverse_kl", dtype, form="logits")
    yield hidden.t().contiguous().t(), weight.t().contiguous().t(), *others
    # head and reference of another width
    yield linear_risk_inputs(*SHAPES[0], "forward_kl", dtype, form="wider", budget=SMALL)


@pytest.mark.parametrize("provider", providers("linear_risk"), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_reference(provider, dtype, available):
    available(provider)
    for case in _cases(dtype, provider):
        inputs = tuple(t.to(provider.device) if isinstance(t, torch.Tensor) else t for t in case)
        hidden, weight, _, _, _, _, segments, n_segments, kind, budget = inputs
        (tokens, d), vocabulary = hidden.shape, weight.shape[0]
        value, env_grad, stats = provider.function()(*inputs)
        goal_value, goal_env, goal_stats = reference.linear_risk(*_wide(inputs))
        assert value.dtype == env_grad.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        # the terms that a risk is the difference of are logits, of size scale
        logits = hidden.double() @ weight.double().T
        scale = float(logits.abs().max()) if logits.numel() else 0.0
        length = d + 64
        assert_close(value, goal_value, length=length, scale=scale, name=f"{kind} value")
        assert_close(env_grad, goal_env, length=length, scale=max(scale, scale**2), name=f"{kind} env_grad")
        make = torch.Generator().manual_seed(3)
        ups = [torch.randn(n_segments, generator=make).to(value) for _ in range(2)]
        stored = (*inputs[:7], stats, kind, budget, NEEDS)
        got = provider.function("linear_risk_backward")(*ups, *stored)
        wide = (*_wide(inputs)[:7], goal_stats, kind, budget, NEEDS)
        goals = reference.linear_risk_backward(*(up.double() for up in ups), *wide)
        # an error of a logit moves a gradient by as much: terms of scale^2 in env_grad's
        lengths = (vocabulary + d, tokens + d, tokens + d)
        for name, one, other, n in zip(("hidden", "weight", "bias"), got, goals, lengths, strict=True):
            assert one.dtype == dtype
            assert one.is_contiguous()
            size = float(other.abs().max()) * max(1.0, scale) if other.numel() else 0.0
            assert_close(one, other, length=n, scale=size, name=f"{kind} gradient of {name}")
        assert not got[0][segments < 0].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [SMALL, 2**16, 2**25])
def test_equals_risk_of_the_logits(kind, budget):
    inputs = linear_risk_inputs(9, 16, 700, 3, kind, torch.float64, form="logits", bias=True, budget=budget)
    hidden, weight, bias, target, _, _, segments, n_segments, _, _ = inputs
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    risks = (
        ops.linear_risk(hidden, weight, target, segments, n_segments, kind, bias=bias, budget=budget),
        ops.risk(hidden @ weight.T + bias, target, segments, n_segments, kind),
    )
    grads = [torch.autograd.grad(v.sum() + 0.3 * e.abs().sum().square(), leaves) for v, e in risks]
    for one, other in zip(*risks, strict=True):
        assert torch.allclose(one, other, atol=1e-12)
    for one, other in zip(*grads, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


@pytest.mark.parametrize("provider", providers("linear_risk"), ids=str)
@pytest.mark.parametrize("needs", [[True, False, False], [False, True, False], [False, False, True], [False] * 3])
def test_only_needed_gradients(provider, needs, available):
    available(provider)
    inputs = linear_risk_inputs(4, 6, 50, 2, "ce", torch.float32, bias=True, device=provider.device)
    stats = provider.function()(*inputs)[2]
    ups = [torch.ones(2, device=provider.device)] * 2
    stored = (*ups, *inputs[:7], stats, *inputs[8:])
    got = provider.function("linear_risk_backward")(*stored, needs)
    full = provider.function("linear_risk_backward")(*stored, NEEDS)
    for one, other, need in zip(got, full, needs, strict=True):
        assert torch.allclose(one, other, atol=1e-6) if need else one.numel() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    inputs = linear_risk_inputs(5, 4, 300, 3, kind, torch.float64, bias=True, budget=SMALL)
    hidden, weight, bias, target, *_, segments, n_segments, _, _ = inputs
    target = target if kind == "ce" else (target, inputs[4], inputs[5])
    leaves = [t.requires_grad_() for t in (hidden, bias)]

    def call(hidden, bias):
        return ops.linear_risk(hidden, weight, target, segments, n_segments, kind, bias=bias, budget=SMALL)

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("case", ["plain", "with grad", "permuted"])
@pytest.mark.parametrize("kind", ["ce", "reverse_kl"])
def test_opcheck(case, kind):
    inputs = list(linear_risk_inputs(5, 6, 40, 3, kind, torch.float32, bias=True))
    if case == "permuted":
        inputs[:2] = [t.t().contiguous().t() for t in inputs[:2]]
    for t in inputs[:3]:
        t.requires_grad_(case == "with grad")
    torch.library.opcheck(torch.ops.fastedit.linear_risk.default, tuple(inputs))
    plain = [t.detach() if isinstance(t, torch.Tensor) else t for t in inputs]
    stats = torch.ops.fastedit.linear_risk.default(*plain)[2]
    arguments = (torch.ones(3), torch.ones(3), *plain[:7], stats, kind, plain[9], [True, False, True])
    torch.library.opcheck(torch.ops.fastedit.linear_risk_backward.default, arguments)


def test_compiles_without_breaks():
    def plain(hidden, weight, target, segments):
        value, env_grad = ops.linear_risk(hidden * 1.5, weight, target, segments, 3)
        return value.sum() + env_grad.abs().sum().square()

    objective = torch.compile(plain, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (4, 9):
        inputs = linear_risk_inputs(tokens, 6, 40, 3, "ce", torch.float32)
        hidden, weight, target, segments = inputs[0].requires_grad_(), inputs[1], inputs[3], inputs[6]
        (one,) = torch.autograd.grad(objective(hidden, weight, target, segments), [hidden])
        (other,) = torch.autograd.grad(plain(hidden, weight, target, segments), [hidden])
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(0, 8),
    d=st.integers(1, 20),
    vocabulary=st.integers(1, 600),
    kind=st.sampled_from(KINDS),
    budget=st.sampled_from([1, SMALL, 2**20]),
    seed=st.integers(0, 1000),
)
def test_properties(tokens, d, vocabulary, kind, budget, seed):
    inputs = linear_risk_inputs(tokens, d, vocabulary, 3, kind, torch.float64, budget=budget, seed=seed)
    hidden, weight, _, target, target_weight, _, segments, _, _, _ = inputs
    target = target if kind == "ce" else (target, target_weight)
    value, env_grad = ops.linear_risk(hidden, weight, target, segments, 3, kind, budget=budget)
    # a bias that is the same for every logit moves neither
    shift = torch.full((vocabulary,), 1.7, dtype=torch.float64)
    moved = ops.linear_risk(hidden, weight, target, segments, 3, kind, bias=shift, budget=budget)
    assert torch.allclose(moved[0], value, atol=1e-10)
    assert torch.allclose(moved[1], env_grad, atol=1e-9)
    # tokens alone, averaged, are the segment
    for segment in range(3):
        rows = (segments == segment).nonzero()[:, 0]
        if not len(rows):
            assert value[segment] == env_grad[segment] == 0
            continue
        own = target[rows] if kind == "ce" else (target[0][rows], target[1])
        alone = ops.linear_risk(hidden[rows], weight, own, torch.arange(len(rows)), len(rows), kind, budget=budget)
        assert torch.allclose(alone[0].mean(), value[segment], atol=1e-10)
        assert torch.allclose(alone[1].mean(), env_grad[segment], atol=1e-10)


@pytest.mark.parametrize("provider", providers("linear_risk"), ids=str)
def test_equal_references_give_zero(provider, available):
    """An unchanged model: no divergence, no derivative, no gradient of the divergence, whatever the chunks."""
    available(provider)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = linear_risk_inputs(6, 24, 900, 1, "reverse_kl", dtype, device=provider.device, budget=SMALL)
        hidden, weight, segments = inputs[0], inputs[1], inputs[6]
        arguments = (hidden, weight, None, hidden, weight, None, segments, 1, "reverse_kl", SMALL)
        value, env_grad, stats = provider.function()(*arguments)
        assert abs(float(value)) < 1e-6
        assert abs(float(env_grad)) < 1e-5
        one, zero = torch.ones(1, device=provider.device), torch.zeros(1, device=provider.device)
        stored = (*arguments[:7], stats, "reverse_kl", SMALL, [True, False, False])
        grad = provider.function("linear_risk_backward")(one, zero, *stored)[0]
        assert float(grad.abs().max()) < 1e-5


@pytest.mark.parametrize("provider", providers("linear_risk"), ids=str)
def test_small_drift_is_accurate(provider, available):
    """A divergence of 1e-7 keeps four digits in float32, where the difference of two log-sum-exps has none."""
    available(provider)
    for kind in ("forward_kl", "reverse_kl"):
        inputs = list(linear_risk_inputs(8, 24, 900, 1, kind, torch.float32, form="hidden", budget=SMALL))
        inputs[3] = inputs[0] + 1e-4 * torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(5))
        inputs = [t.to(provider.device) if isinstance(t, torch.Tensor) else t for t in inputs]
        value = float(provider.function()(*inputs)[0])
        goal = float(reference.linear_risk(*_wide(inputs))[0])
        assert 1e-9 < goal < 1e-6
        assert abs(value - goal) < 0.02 * goal


@pytest.mark.parametrize("provider", providers("linear_risk"), ids=str)
@pytest.mark.parametrize("kind", KINDS[1:])
def test_far_reference(provider, kind, available):
    """Drifts whose exponentials overflow or leave nothing, in the first chunk and in later ones."""
    available(provider)
    inputs = list(linear_risk_inputs(8, 12, 700, 1, kind, torch.float32, form="logits", budget=SMALL))
    z = inputs[0] @ inputs[1].T
    drift = 0.1 * torch.randn(z.shape, generator=torch.Generator().manual_seed(4))
    drift[0, 3] += 200.0
    drift[1, 400] += 150.0
    drift[2] *= 800.0
    drift[3] += 300.0
    drift[4] -= 300.0
    drift[4, 650] += 500.0
    drift[5, 500] -= 200.0
    # one side's mass lies in a later chunk, where the other one has little
    best = z[6:, 256:].argmax(1) + 256
    drift[[6, 7], best] += torch.tensor([-25.0, 25.0])
    # a segment a token
    inputs[3], inputs[6], inputs[7] = z + drift, torch.arange(8), 8
    goals = reference.linear_risk(*_wide(inputs))
    on = torch.linspace(0.5, 1.5, 8), torch.linspace(-1.0, 1.0, 8)
    stored = (*_wide(inputs)[:7], goals[2], kind, SMALL, [True, False, False])
    goal = reference.linear_risk_backward(*(t.double() for t in on), *stored)[0]
    inputs = [t.to(provider.device) if isinstance(t, torch.Tensor) else t for t in inputs]
    value, env_grad, stats = provider.function()(*inputs)
    # every token by the size of its own terms
    size = 20.0 + drift.abs().amax(1).double()
    assert ((value.cpu() - goals[0]).abs() < 5e-7 * size).all()
    assert ((env_grad.cpu() - goals[1]).abs() < 5e-7 * size).all()
    stored = (*inputs[:7], stats, kind, SMALL, [True, False, False])
    got = provider.function("linear_risk_backward")(*(t.to(provider.device) for t in on), *stored)[0]
    assert ((got.cpu() - goal).abs().amax(1) < 5e-7 * size).all()


@pytest.mark.parametrize("provider", providers("linear_risk"), ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_impossible_tokens(provider, kind, available):
    """Biases of -inf: single logits, a chunk, and the whole first chunk."""
    available(provider)
    inputs = list(linear_risk_inputs(7, 12, 1500, 2, kind, torch.float32, bias=True, budget=SMALL))
    closed = torch.zeros(1500, dtype=torch.bool)
    closed[[700, 1499]] = closed[300:600] = True
    first = torch.arange(1500) < 200
    infinite = torch.tensor(-float("inf"))
    # what the model that weighs has no probability for, the other one may have
    inputs[2] = torch.where(closed if kind == "forward_kl" else closed | first, infinite, inputs[2])
    if kind == "ce":
        inputs[3] = torch.full_like(inputs[3], 250)
    else:
        inputs[5] = torch.where(closed | first if kind == "forward_kl" else closed, infinite, inputs[5])
    goals = reference.linear_risk(*_wide(inputs))
    on = torch.ones(2)
    goal_grads = reference.linear_risk_backward(
        on.double(), on.double(), *_wide(inputs)[:7], goals[2], kind, SMALL, NEEDS
    )
    inputs = [t.to(provider.device) if isinstance(t, torch.Tensor) else t for t in inputs]
    on = on.to(provider.device)
    value, env_grad, stats = provider.function()(*inputs)
    assert 0.01 < float(goals[0][0]) < 50
    for one, goal in zip((value, env_grad), goals, strict=False):
        assert_close(one, goal, length=64, scale=10.0, name=kind)
    grads = provider.function("linear_risk_backward")(on, on, *inputs[:7], stats, kind, SMALL, NEEDS)
    for grad, goal in zip(grads, goal_grads, strict=True):
        assert_close(grad, goal, length=1500, scale=1.0, name=f"{kind} gradient")
    assert not grads[2][closed].any()


@pytest.mark.parametrize("provider", providers("linear_risk"), ids=str)
def test_impossible_labels(provider, available):
    """A label whose bias is -inf has an infinite risk, as in cross_entropy, and the gradient of any other."""
    available(provider)
    inputs = list(linear_risk_inputs(6, 12, 700, 6, "ce", torch.float32, bias=True, budget=SMALL))
    inputs[2][[5, 600]] = -float("inf")
    inputs[3], inputs[6] = torch.tensor([5, 7, 600, 3, 2, 1]), torch.arange(6)
    inputs = [t.to(provider.device) if isinstance(t, torch.Tensor) else t for t in inputs]
    hidden, weight, bias = inputs[:3]
    value, env_grad, stats = provider.function()(*inputs)
    leaf = hidden.double().requires_grad_()
    goal = torch.nn.functional.cross_entropy(leaf @ weight.double().T + bias.double(), inputs[3], reduction="none")
    assert torch.allclose(value.double(), goal, rtol=1e-5)
    assert value.isinf().tolist() == env_grad.isinf().tolist() == [True, False, True, False, False, False]
    on = torch.ones(6, device=provider.device), torch.zeros(6, device=provider.device)
    grad = provider.function("linear_risk_backward")(*on, *inputs[:7], stats, *inputs[8:], [True, False, False])[0]
    (wanted,) = torch.autograd.grad(goal.sum(), leaf)
    assert_close(grad, wanted, length=700, name="gradient")


@pytest.mark.parametrize("provider", providers("linear_risk"), ids=str)
def test_ignored_tokens_touch_nothing(provider, available):
    available(provider)
    inputs = linear_risk_inputs(40, 12, 300, 2, "ce", torch.float32, device=provider.device, budget=SMALL)
    hidden, segments = inputs[0], inputs[6]
    ignored = segments < 0
    assert ignored.any()
    bad = torch.where(ignored[:, None], float("nan"), hidden)
    for one, other in zip(provider.function()(*inputs)[:2], provider.function()(bad, *inputs[1:])[:2], strict=True):
        assert torch.allclose(one, other)
    stats = provider.function()(bad, *inputs[1:])[2]
    ups = [torch.ones(2, device=provider.device)] * 2
    needs = [True, True, False]
    on_hidden, on_weight, _ = provider.function("linear_risk_backward")(
        *ups, bad, *inputs[1:7], stats, *inputs[8:], needs
    )
    assert torch.isfinite(on_weight).all()
    assert not on_hidden[ignored].any()


def test_errors():
    hidden, weight, _, target, _, _, segments, *_ = linear_risk_inputs(4, 6, 10, 2, "ce", torch.float32)
    logits = torch.zeros(4, 10)
    with pytest.raises(ValueError, match=r"linear_risk: kind is one of .* \(got kind=kl\)"):
        ops.linear_risk(hidden, weight, target, segments, 2, "kl")
    with pytest.raises(
        ValueError, match=r"linear_risk: hidden is \(T, d\), weight is \(V, d\).* \(got hidden=\(4, 6\), w"
    ):
        ops.linear_risk(hidden, weight[:, :5], target, segments, 2)
    with pytest.raises(ValueError, match=r"linear_risk: hidden is \(T, d\), .*bias=\(9,\)\)"):
        ops.linear_risk(hidden, weight, target, segments, 2, bias=torch.zeros(9))
    with pytest.raises(ValueError, match=r"linear_risk: hidden states, head and bias have one dtype \(got hidden="):
        ops.linear_risk(hidden, weight.half(), target, segments, 2)
    with pytest.raises(
        ValueError, match=r"linear_risk: a reference gives logits \(T, 10\) and has the dtype of hidden"
    ):
        ops.linear_risk(hidden, weight, logits[:, :9], segments, 2, "reverse_kl")
    with pytest.raises(ValueError, match=r"linear_risk: a reference gives logits \(T, 10\)"):
        ops.linear_risk(hidden, weight, (hidden[:3], weight), segments, 2, "reverse_kl")
    with pytest.raises(ValueError, match=r"linear_risk: target of ce is labels \(T,\)"):
        ops.linear_risk(hidden, weight, (hidden, weight), segments, 2)
    with pytest.raises(
        ValueError, match=r"linear_risk: n_segments is not negative and budget positive \(got .*budget=0"
    ):
        ops.linear_risk(hidden, weight, target, segments, 2, budget=0)
    with pytest.raises(
        (ValueError, RuntimeError), match=r"risk: labels lie in \[0, V\) where segments >= 0 \(got min=10"
    ):
        ops.linear_risk(hidden, weight, torch.full((4,), 10), torch.zeros(4, dtype=torch.int64), 2)
    with pytest.raises(
        (ValueError, RuntimeError), match=r"risk: segments are below n_segments \(got max=2, n_segments=2"
    ):
        ops.linear_risk(hidden, weight, torch.zeros(4, dtype=torch.int64), torch.full((4,), 2), 2)
