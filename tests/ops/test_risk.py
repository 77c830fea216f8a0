"""The op risk: its definition against double backward, every implementation against its definition."""

import importlib
import math
import mmap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastedit import ops
from fastedit.ops.risk import KINDS
from fastedit.reference import risk as reference
from fastedit.testing import assert_close, providers, risk_inputs

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# odd, empty and size-one shapes: tokens, vocabulary, segments; the last is longer than a block and no multiple of 16
SHAPES = ((7, 33, 3), (1, 1, 1), (0, 5, 2), (3, 16, 1), (2, 1, 2), (5, 5003, 4))


def _means(values: Tensor, segments: Tensor, n_segments: int) -> Tensor:
    keep = segments >= 0
    count = torch.bincount(segments[keep], minlength=n_segments).clamp(min=1)
    return values.new_zeros(n_segments).index_add(0, segments[keep], values[keep]) / count


def _written_out(logits: Tensor, target: Tensor, kind: str, scale: Tensor) -> Tensor:
    """Token risks (T,) as a textbook writes them, w on the logits."""
    log_p = torch.log_softmax(scale * logits, -1)
    if kind == "ce":
        return -log_p.gather(1, target.clamp(min=0)[:, None])[:, 0]
    log_q = torch.log_softmax(target, -1)
    return (log_q.exp() * (log_q - log_p)).sum(-1) if kind == "forward_kl" else (log_p.exp() * (log_p - log_q)).sum(-1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spread", [1.0, 8.0])
@pytest.mark.parametrize(("tokens", "vocabulary", "segments"), [(6, 5, 2), (64, 1000, 4)])
def test_definition_equals_double_backward(kind, spread, tokens, vocabulary, segments):
    logits, target, own, n, _ = risk_inputs(tokens, vocabulary, segments, kind, torch.float64, spread=spread)
    logits.requires_grad_()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    value = _means(_written_out(logits, target, kind, scale), own, n)
    env = torch.stack([torch.autograd.grad(v, scale, create_graph=True)[0] for v in value])
    (grad,) = torch.autograd.grad(value.sum() + 3.7 * env.abs().sum() ** 2, logits)

    got_value, got_env = ops.risk(logits, target, own, n, kind)
    (got_grad,) = torch.autograd.grad(got_value.sum() + 3.7 * got_env.abs().sum() ** 2, logits)
    assert (got_value - value).abs().max() < 1e-13
    assert (got_env - env).abs().max() < 1e-12
    assert (got_grad - grad).abs().max() < 1e-12 * max(1.0, float(grad.abs().max()))


@pytest.mark.parametrize("provider", providers("risk"), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_reference(provider, dtype, kind, available):
    available(provider)
    for seed, shape in enumerate(SHAPES):
        logits, target, own, n, _ = risk_inputs(*shape, kind, dtype, seed=seed)
        # non-contiguous: every second row of a larger block, and a transposed one; the interpreter is slow: one a shape
        layouts = ("plain", "strided", "transposed")
        for layout in layouts[(2 - seed) % 3 :][:1] if "interpreted" in provider.id else layouts:
            z, t = (_laid_out(x, layout, provider.device) for x in (logits, target))
            own_there = own.to(provider.device)
            value, env, stats = provider.function()(z, t, own_there, n, kind)
            wide = t.double() if kind != "ce" else t
            goal_value, goal_env, goal_stats = reference.risk(z.double(), wide, own_there, n, kind)
            size = float(logits.double().abs().max()) if logits.numel() else 0.0
            assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert_close(value, goal_value, length=shape[1], scale=size, name="value")
            assert_close(env, goal_env, length=shape[1], scale=size**2, name="env_grad")

            on_value = torch.linspace(-1, 2, n, dtype=value.dtype, device=provider.device)
            on_env = torch.linspace(1, -0.5, n, dtype=value.dtype, device=provider.device)
            grad = provider.function("risk_backward")(on_value, on_env, z, t, own_there, stats, kind)
            goal = reference.risk_backward(
                on_value.double(), on_env.double(), z.double(), wide, own_there, goal_stats, kind
            )
            assert grad.dtype == dtype
            assert grad.is_contiguous()
            assert_close(grad, goal, length=shape[1], name="gradient")


def _laid_out(x: Tensor, layout: str, device: str) -> Tensor:
    x = x.to(device)
    if layout == "strided":
        return torch.stack([x, torch.zeros_like(x)], 1).flatten(0, 1)[::2]
    if layout == "transposed" and x.dim() == 2:
        return x.t().contiguous().t()
    return x


@pytest.mark.parametrize("provider", providers("risk"), ids=str)
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("drift", [3e-1, 3e-2, 3e-3])
def test_small_drift_keeps_its_digits(provider, kind, drift, available):
    available(provider)
    tokens = 3 if "interpreted" in provider.id else 8
    logits, target, own, n, _ = risk_inputs(tokens, 50_272, 3, kind, torch.float32, drift=drift, device=provider.device)
    value, env, _ = provider.function()(logits, target + 25.0, own, n, kind)
    goal, goal_env, _ = reference.risk(logits.double(), (target + 25.0).double(), own, n, kind)
    # the goal shares the bits that the shift by 25 costs the target; two log-sum-exps would be off by 1e-6 at any drift
    assert (value - goal).abs().max() < 3e-7 * drift
    assert (env - goal_env).abs().max() < 5e-7


@pytest.mark.parametrize("provider", providers("risk"), ids=str)
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_far_reference(provider, kind, available):
    """Logits that have nothing to do with their reference: exponents of the drift overflow, two log-sum-exps do not."""
    available(provider)
    logits, target, own, n, _ = risk_inputs(
        6, 2500, 2, kind, torch.float32, spread=20.0, drift=60.0, device=provider.device
    )
    assert (logits - target).abs().max() > 200
    value, env, stats = provider.function()(logits, target, own, n, kind)
    goal_value, goal_env, goal_stats = reference.risk(logits.double(), target.double(), own, n, kind)
    assert_close(value, goal_value, length=2500, name="value")
    assert_close(env, goal_env, length=2500, scale=float(logits.abs().max()) ** 2, name="env_grad")
    ones = torch.ones(n, device=provider.device)
    grad = provider.function("risk_backward")(ones, ones, logits, target, own, stats, kind)
    wide = (ones.double(), ones.double(), logits.double(), target.double(), own, goal_stats, kind)
    assert_close(grad, reference.risk_backward(*wide), length=2500, name="gradient")


@pytest.mark.parametrize("provider", [p for p in providers("risk") if "csrc" in p.id], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_large_gradients(provider, dtype, kind, available):
    """Beyond the caches gradients are written another way; rows of odd length start anywhere in a vector."""
    available(provider)
    logits, target, own, n, _ = risk_inputs(75, 60_001, 5, kind, dtype, device=provider.device)
    assert logits.nbytes > 8 << 20
    stats = provider.function()(logits, target, own, n, kind)[2]
    on = torch.linspace(-1, 1, n), torch.linspace(0.5, 2, n)
    grad = provider.function("risk_backward")(*on, logits, target, own, stats, kind)
    few = [0, 1, 2, 73, 74, *(own < 0).nonzero()[:2, 0].tolist()]
    picked = target[few] if kind == "ce" else target[few].double()
    # a few rows alone, with the weights they have among all
    count = torch.bincount(own[own >= 0], minlength=n).clamp(min=1).double()
    alone = torch.arange(len(few)).where(own[few] >= 0, torch.tensor(-1))
    weight = [(w.double() / count)[own[few].clamp(min=0)] for w in on]
    goal_stats = reference.risk(logits[few].double(), picked, alone, len(few), kind)[2]
    goal = reference.risk_backward(*weight, logits[few].double(), picked, alone, goal_stats, kind)
    for row, wanted in zip(few, goal, strict=True):
        assert_close(grad[row], wanted, length=60_001, name=f"gradient of token {row}")


@pytest.mark.parametrize("provider", providers("risk"), ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits(provider, kind, available):
    """Huge and -inf logits, a far reference, and garbage in ignored rows."""
    available(provider)
    inf = float("inf")
    logits = torch.tensor([[90.0, -90.0, 0.0, -inf], [1e4, -1e4, 5.0, 0.0], [0.5, 1.0, -inf, -inf], [float("nan")] * 4])
    far = torch.tensor([[-90.0, 90.0, 0.0, -inf], [-1e4, 1e4, 5.0, 0.0], [1.0, 0.5, -inf, -inf], [inf] * 4])
    target = torch.tensor([0, 1, 1, 999]) if kind == "ce" else far
    own = torch.tensor([0, 1, 2, -7])
    there = [t.to(provider.device) for t in (logits, target, own)]
    value, env, stats = provider.function()(*there, 3, kind)
    z = logits[:3].clamp(min=-1e30).double()
    t = target[:3] if kind == "ce" else target[:3].clamp(min=-1e30).double()
    goal = _written_out(z, t, kind, torch.ones((), dtype=torch.float64))
    assert torch.allclose(value.cpu().double(), goal, rtol=1e-5, atol=1e-6)
    assert torch.isfinite(env).all()
    ones = torch.ones(3, device=provider.device)
    grad = provider.function("risk_backward")(ones, ones, *there, stats, kind).cpu()
    assert torch.isfinite(grad).all()
    assert (grad[3] == 0).all()
    assert grad[0, 3] == 0
    assert (grad[2, 2:] == 0).all()


@pytest.mark.parametrize("provider", providers("risk"), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("width", [5, 3001])
def test_impossible_labels(provider, dtype, width, available):
    """A label at -inf has an infinite risk and a gradient like any other, as in cross_entropy; so has one far below."""
    available(provider)
    inf, nan = float("inf"), float("nan")
    logits = torch.linspace(-2, 3, width).repeat(5, 1).to(dtype)
    logits[0, 3] = logits[3, 1] = -inf
    logits[1, 2] = -1e20
    logits[2] = -inf
    logits[3, 4] = nan
    labels, own = torch.tensor([3, 2, 4, 1, 0]), torch.arange(5)
    logits, labels, own = (t.to(provider.device) for t in (logits, labels, own))
    value, env, stats = provider.function()(logits, labels, own, 5, "ce")
    leaf = logits.double().requires_grad_()
    goal = torch.nn.functional.cross_entropy(leaf, labels, reduction="none")
    usual = [0, 1, 3, 4]
    assert torch.allclose(value[usual].double(), goal[usual], rtol=1e-3, equal_nan=True)
    assert value[0] == env[0] == inf
    assert value[3].isnan()
    assert env[3].isnan()
    # of a row of nothing but -inf all logits are alike
    assert value[2] == pytest.approx(math.log(width), rel=1e-6)
    assert env[2] == 0
    assert torch.isfinite(stats[[0, 1, 2, 4]]).all()
    ones, none = (torch.full((5,), fill, dtype=value.dtype, device=provider.device) for fill in (1.0, 0.0))
    grad = provider.function("risk_backward")(ones, none, logits, labels, own, stats, "ce")
    (wanted,) = torch.autograd.grad(goal[[0, 1, 4]].sum(), leaf)
    assert torch.allclose(grad[[0, 1, 4]].double(), wanted[[0, 1, 4]], atol=4e-3, rtol=1e-2)
    assert grad[0, 3] == -1
    assert torch.isfinite(grad[2]).all()
    assert grad[3].isnan().all()


@pytest.mark.parametrize("provider", providers("risk"), ids=str)
def test_equal_logits(provider, available):
    """At r = z both divergences and their derivatives vanish, and dh/dz = p (z - E_p[z])."""
    available(provider)
    logits, _, own, n, _ = risk_inputs(9, 301, 2, "reverse_kl", torch.float32, device=provider.device)
    zero, one = torch.zeros(n, device=provider.device), torch.ones(n, device=provider.device)
    for kind in ("forward_kl", "reverse_kl"):
        value, env, stats = provider.function()(logits, logits.clone(), own, n, kind)
        assert (value.abs() < 1e-7).all()
        assert (env.abs() < 1e-6).all()
        grad = provider.function("risk_backward")(one, zero, logits, logits.clone(), own, stats, kind)
        assert grad.abs().max() < 1e-7
        grad = provider.function("risk_backward")(zero, one, logits, logits.clone(), own, stats, kind)
        p = torch.softmax(logits.double(), -1)
        weight = torch.where(own >= 0, 1.0 / (own >= 0).sum(), 0.0)[:, None]
        goal = weight * p * (logits.double() - (p * logits).sum(-1, keepdim=True))
        assert_close(grad, goal, length=301)


@pytest.mark.parametrize("provider", [p for p in providers("risk") if p.id.startswith("triton")], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_the_vocabulary(provider, kind, available, monkeypatch):
    """Few tokens are cut into parts: one that is all -inf, one with a far logit; nobody's maximum is in the first."""
    available(provider)
    module = importlib.import_module("fastedit.kernels.risk")
    logits, target, _, _, _ = risk_inputs(3, 20_001, 1, kind, torch.float32, seed=1, device=provider.device)
    own = torch.arange(3, device=provider.device)
    logits[1, :12_500] = -float("inf")
    logits[:, 15_000] = 12.0
    logits[2, 19_999] = -130.0
    if kind == "ce":
        target = torch.tensor([20_000, 19_000, 3], device=provider.device)
    else:
        target[1, :12_500] = -float("inf")
        target[:, 15_000] = 12.1
    goal_target = target if kind == "ce" else target.double()
    goals = reference.risk(logits.double(), goal_target, own, 3, kind)
    ones = torch.ones(3, device=provider.device)
    wide = (ones.double(), ones.double(), logits.double(), goal_target, own, goals[2], kind)
    goal = reference.risk_backward(*wide)
    found = []
    for processors in (0, 1000):
        monkeypatch.setattr(module, "processors", lambda device, count=processors: count)
        value, env, stats = provider.function()(logits, target, own, 3, kind)
        assert_close(value, goals[0], length=20_001, name="value")
        assert_close(env, goals[1], length=20_001, scale=12.0**2, name="env_grad")
        grad = provider.function("risk_backward")(ones, ones, logits, target, own, stats, kind)
        assert_close(grad, goal, length=20_001, name="gradient")
        found.append(module._parts(3, 20_001, processors, 4096)[0])
    assert found == [1, 2]


@pytest.mark.parametrize("provider", providers("risk"), ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_nan(provider, kind, available):
    """In its segment and its row of the gradient, wherever in the vocabulary it is, and nowhere else."""
    available(provider)
    logits, target, _, _, _ = risk_inputs(4, 5003, 1, kind, torch.float32, device=provider.device)
    own = torch.tensor([0, 1, 1, 2], device=provider.device)
    logits[0, 0] = logits[2, 5002] = float("nan")
    if kind != "ce":
        target[3, 4097] = float("nan")
    value, env, stats = provider.function()(logits, target, own, 3, kind)
    broken = [True, True, kind != "ce"]
    assert value.isnan().tolist() == env.isnan().tolist() == broken
    ones = torch.ones(3, device=provider.device)
    grad = provider.function("risk_backward")(ones, ones, logits, target, own, stats, kind)
    assert grad.isnan().any(1).tolist() == [True, False, True, kind != "ce"]


@pytest.mark.parametrize("provider", providers("risk"), ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_two_calls_are_equal(provider, kind, available):
    available(provider)
    logits, target, own, n, _ = risk_inputs(7, 700, 3, kind, torch.bfloat16, device=provider.device)
    ones = torch.ones(n, device=provider.device)
    calls = []
    for _ in range(2):
        value, env, stats = provider.function()(logits, target, own, n, kind)
        grad = provider.function("risk_backward")(ones, ones, logits, target, own, stats, kind)
        calls.append((value, env, stats, grad))
    assert all(torch.equal(one, other) for one, other in zip(*calls, strict=True))


@pytest.mark.parametrize("provider", providers("risk"), ids=str)
def test_no_segments(provider, available):
    available(provider)
    for tokens in (0, 3):
        logits, own = torch.randn(tokens, 5, device=provider.device), torch.full((tokens,), -1, device=provider.device)
        value, env, stats = provider.function()(logits, logits, own, 0, "reverse_kl")
        assert value.shape == env.shape == (0,)
        grad = provider.function("risk_backward")(value, env, logits, logits, own, stats, "reverse_kl")
        assert torch.equal(grad, torch.zeros_like(logits))


@pytest.mark.parametrize("provider", [p for p in providers("risk") if p.device == "cpu"], ids=str)
@pytest.mark.parametrize("kind", ["ce", "reverse_kl"])
@pytest.mark.parametrize("layout", ["tokens", "vocabulary"])
def test_logits_further_apart_than_two_to_the_31(provider, kind, layout, available):
    available(provider)
    # memory that nobody touches takes no room
    room = mmap.mmap(-1, 2 * (2**31 + 2**13), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    space = torch.frombuffer(room, dtype=torch.float16)
    shape = (3, 30) if layout == "tokens" else (4, 3)
    strides = (2**30 + 64, 1) if layout == "tokens" else (1, 2**30 + 64)
    logits, target, own, n, _ = risk_inputs(*shape, 2, kind, torch.float16)
    own[:] = 0
    there = space.as_strided(shape, strides)
    there.copy_(logits)
    far_target = target
    if kind != "ce":
        far_target = space[100:].as_strided(shape, strides)
        far_target.copy_(target)
    else:
        target.clamp_(min=0)
    value, env, stats = provider.function()(there, far_target, own, n, kind)
    goal_value, goal_env, goal_stats = provider.function()(logits, target, own, n, kind)
    assert torch.equal(value, goal_value)
    assert torch.equal(env, goal_env)
    ones = torch.ones(n)
    grad = provider.function("risk_backward")(ones, ones, there, far_target, own, stats, kind)
    goal = provider.function("risk_backward")(ones, ones, logits, target, own, goal_stats, kind)
    assert torch.equal(grad, goal)


@pytest.mark.parametrize("provider", [p for p in providers("risk") if p.id.startswith("triton")], ids=str)
def test_labels_out_of_range_read_nothing(provider, available, monkeypatch):
    """A GPU is not asked whether labels are in range: such a token's segment is NaN."""
    available(provider)
    # The launcher asks a CPU, where that costs nothing
    monkeypatch.setitem(provider.function().__globals__, "_check_values", lambda *_arguments: None)
    logits = torch.randn(4, 9, device=provider.device)
    labels = torch.tensor([8, 9, -1, 2**40], device=provider.device)
    value, env, _ = provider.function()(logits, labels, torch.arange(4, device=provider.device), 4, "ce")
    assert value.isnan().tolist() == env.isnan().tolist() == [False, True, True, True]


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    logits, target, own, n, _ = risk_inputs(5, 7, 3, kind, torch.float64)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: ops.risk(z, target, own, n, kind), logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["plain", "with grad", "permuted"])
def test_opcheck(kind, case):
    logits, target, own, n, _ = risk_inputs(6, 11, 3, kind, torch.float32)
    if case == "permuted":
        logits = _laid_out(logits, "transposed", "cpu")
    logits.requires_grad_(case == "with grad")
    torch.library.opcheck(torch.ops.fastedit.risk.default, (logits, target, own, n, kind))
    stats = torch.ops.fastedit.risk.default(logits.detach(), target, own, n, kind)[2]
    ones = torch.ones(n)
    arguments = (ones, ones, logits.detach(), target, own, stats, kind)
    torch.library.opcheck(torch.ops.fastedit.risk_backward.default, arguments)


def test_compiles_without_breaks():
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def objective(logits, target, own, n):
        value, env = ops.risk(logits * 1.5, target, own, n, "ce")
        return value.sum() + env.abs().sum() ** 2

    for tokens in (5, 9):
        logits, target, own, n, _ = risk_inputs(tokens, 13, 3, "ce", torch.float32)
        logits.requires_grad_()
        (grad,) = torch.autograd.grad(objective(logits, target, own, n), logits)
        value, env = ops.risk(logits * 1.5, target, own, n, "ce")
        (goal,) = torch.autograd.grad(value.sum() + env.abs().sum() ** 2, logits)
        assert torch.allclose(grad, goal)


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(0, 9),
    vocabulary=st.integers(1, 70),
    segments=st.integers(1, 4),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 1000),
)
def test_properties(tokens, vocabulary, segments, kind, seed):
    logits, target, own, n, _ = risk_inputs(tokens, vocabulary, segments, kind, torch.float64, seed=seed)
    logits.requires_grad_()
    value, env = ops.risk(logits, target, own, n, kind)
    for output in (value, env):
        (grad,) = torch.autograd.grad(output.sum(), logits, retain_graph=True)
        # a shift of one token's logits changes nothing: gradients sum to zero
        assert grad.sum(-1).abs().max() < 1e-10 if tokens else grad.numel() == 0
        assert (grad[own < 0] == 0).all()
    shift = torch.linspace(-5, 5, tokens, dtype=torch.float64)[:, None]
    assert torch.allclose(ops.risk(logits + shift, target, own, n, kind)[0], value, atol=1e-10)
    if kind != "ce":
        assert (value > -1e-12).all()
    empty = torch.bincount(own[own >= 0], minlength=n) == 0
    assert (value[empty] == 0).all()
    assert (env[empty] == 0).all()
    # tokens do not feel each other: every one alone gives the same, and env_grad is the derivative of value
    labels = target.clamp(min=0) if kind == "ce" else target
    alone = [ops.risk(logits[i : i + 1], labels[i : i + 1], torch.zeros(1).long(), 1, kind) for i in range(tokens)]
    for output, picked in ((value, 0), (env, 1)):
        single = torch.stack([pair[picked][0] for pair in alone]) if tokens else value.new_zeros(0)
        assert torch.allclose(_means(single, own, n), output, atol=1e-12)
    up, down = (ops.risk(logits * w, target, own, n, kind)[0] for w in (1 + 1e-5, 1 - 1e-5))
    assert torch.allclose((up - down) / 2e-5, env, rtol=1e-4, atol=1e-5)


def test_only_once_differentiable():
    logits, target, own, n, _ = risk_inputs(3, 5, 1, "ce", torch.float64)
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(ops.risk(logits, target, own, n)[0].sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="not differentiable again"):
        torch.autograd.grad(grad.square().sum(), logits)


def test_errors():
    z, labels, own = torch.zeros(3, 5), torch.zeros(3).long(), torch.zeros(3).long()
    with pytest.raises(ValueError, match=r"risk: kind is one of ce, forward_kl, reverse_kl \(got kind=kl\)"):
        ops.risk(z, labels, own, 1, "kl")
    with pytest.raises(ValueError, match=r"risk: logits are \(T, V\) with V > 0 \(got logits=\(3, 0\)\)"):
        ops.risk(z[:, :0], labels, own, 1)
    with pytest.raises(ValueError, match=r"risk: logits is float32"):
        ops.risk(z.long(), labels, own, 1)
    with pytest.raises(
        ValueError, match=r"risk: segments is int64 of shape \(3,\) \(got segments=torch.int64 \(2,\)\)"
    ):
        ops.risk(z, labels, own[:2], 1)
    with pytest.raises(ValueError, match=r"risk: target is int64 of shape \(3,\) \(got target=torch.float32 \(3,\)\)"):
        ops.risk(z, labels.float(), own, 1)
    with pytest.raises(
        ValueError, match=r"target of forward_kl has the shape and dtype of logits \(got target=.*\(3, 4\)"
    ):
        ops.risk(z, z[:, :4], own, 1, "forward_kl")
    with pytest.raises(ValueError, match=r"n_segments is not negative \(got n_segments=-1\)"):
        ops.risk(z, labels, own, -1)


@pytest.mark.parametrize(
    "provider", [p for p in providers("risk") if p.device == "cpu" and "triton" not in p.id], ids=str
)
def test_values_out_of_range(provider, available):
    available(provider)
    z, labels, own = torch.zeros(3, 5), torch.tensor([0, 5, 1]), torch.zeros(3).long()
    with pytest.raises((ValueError, RuntimeError), match=r"labels lie in \[0, V\) where segments >= 0 \(got"):
        provider.function()(z, labels, own, 1, "ce")
    with pytest.raises((ValueError, RuntimeError), match=r"segments are below n_segments \(got max=1, n_segments=1\)"):
        provider.function()(z, labels.clamp(max=4), own + 1, 1, "ce")
