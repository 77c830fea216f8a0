"""The op mmd2: its definition against double backward, every implementation against its definition."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastedit import ops
from fastedit.reference import mmd2 as reference
from fastedit.testing import assert_close, mmd2_inputs, offsets, providers

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# odd, empty and size-one groups: rows of x, rows of y, features
SHAPES = (
    ((4, 7, 1), (3, 1, 5), 17),
    ((1,), (1,), 1),
    ((0, 3), (2, 0), 8),
    ((), (), 4),
    ((33, 2), (19, 40), 130),
    # beyond a tile, whole tiles, one sample of one row
    ((150, 1), (33, 140), 70),
    ((128,), (256,), 3),
)


def _written_out(x: Tensor, y: Tensor, sigma: Tensor, unbiased: bool, scale: Tensor) -> Tensor:
    """The squared MMD of one group as a textbook writes it, w on the features."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        square = (scale * a[:, None] - scale * b[None, :]).square().sum(-1)
        return torch.exp(-square[..., None] / (2 * sigma**2)).sum(-1)

    def within(a: Tensor) -> Tensor:
        if not unbiased:
            return kernel(a, a).mean()
        off = ~torch.eye(len(a), dtype=torch.bool)
        return kernel(a, a)[off].sum() / max(len(a) * (len(a) - 1), 1)

    return within(x) + within(y) - 2 * kernel(x, y).mean()


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (4, 7, 16), (32, 24, 256)])
def test_definition_equals_double_backward(unbiased, n, m, d):
    x, y, x_offsets, y_offsets, sigma = mmd2_inputs((n,), (m,), d, torch.float64)
    x.requires_grad_()
    y.requires_grad_()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    value = _written_out(x, y, sigma, unbiased, scale)
    (env,) = torch.autograd.grad(value, scale, create_graph=True)
    goal = torch.autograd.grad(value + 2.3 * env**2, (x, y))

    got_value, got_env = ops.mmd2(x, y, x_offsets, y_offsets, sigma, unbiased)
    got = torch.autograd.grad((got_value + 2.3 * got_env**2).sum(), (x, y))
    assert abs(got_value - value) < 1e-14
    assert abs(got_env - env) < 1e-14
    for one, other in zip(got, goal, strict=True):
        assert (one - other).abs().max() < 1e-14 * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("provider", providers("mmd2"), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("per_group", [False, True])
def test_equals_reference(provider, dtype, unbiased, per_group, available):
    available(provider)
    # the interpreter is slow: it gets the small shapes, in the harder layout
    interpreted = "interpreted" in provider.id
    for seed, (x_lengths, y_lengths, d) in enumerate(SHAPES[:4] if interpreted else SHAPES):
        made = mmd2_inputs(x_lengths, y_lengths, d, dtype, seed=seed, per_group=per_group, device=provider.device)
        for permuted in (True,) if interpreted else (False, True):
            inputs = [
                t.t().contiguous().t() if permuted and t.is_floating_point() and t.dim() == 2 else t for t in made
            ]
            wide = [t.double() if t.is_floating_point() else t for t in inputs]
            value, env = provider.function()(*inputs, unbiased)
            goal_value, goal_env = reference.mmd2(*wide, unbiased)
            # distances about 2 d, each a sum of d squares, then a mean over pairs of Q terms
            length = d + max((*x_lengths, *y_lengths), default=0)
            assert_close(value, goal_value, length=length, scale=5.0, name="value")
            assert_close(env, goal_env, length=length, scale=5.0, name="env_grad")
            on = [
                torch.linspace(a, b, len(x_lengths), device=provider.device).to(value) for a, b in ((1, 2), (-1, 0.5))
            ]
            grads = provider.function("mmd2_backward")(*on, *inputs, unbiased)
            goals = reference.mmd2_backward(on[0].double(), on[1].double(), *wide, unbiased)
            for grad, goal in zip(grads, goals, strict=True):
                assert grad.dtype == dtype
                assert grad.is_contiguous()
                assert_close(grad, goal, length=length, name="gradient")


@pytest.mark.parametrize("provider", providers("mmd2"), ids=str)
def test_common_mean_costs_no_digits(provider, available):
    """Features of mean 50 with near-duplicates: without centring the distances drown in rounding."""
    available(provider)
    x, y, x_offsets, y_offsets, sigma = mmd2_inputs((8,), (8,), 256, torch.float32, device=provider.device)
    y = x + 0.02 * (y - x)
    x, y, sigma = x + 50.0, y + 50.0, sigma * 0.05
    value, env = provider.function()(x, y, x_offsets, y_offsets, sigma, False)
    goal, goal_env = reference.mmd2(x.double(), y.double(), x_offsets, y_offsets, sigma.double(), False)
    assert (value - goal).abs().max() < 2e-5
    assert (env - goal_env).abs().max() < 2e-4


# variances in ratio 2 and not, out of order, one alone, from within the sample to far beyond it
SIGMA_SQUARED = (
    (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0),
    (64.0, 8.0, 33.0, 16.0, 5.0),
    (20.0,),
    (8.0, 8.0, 16.0),
    (1.0, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0, 35.0, 100.0, 1e3, 1e4, 1e5, 1e6),
)


@pytest.mark.parametrize("provider", providers("mmd2"), ids=str)
@pytest.mark.parametrize("variances", SIGMA_SQUARED, ids=len)
@pytest.mark.parametrize("n", [9, 60])
def test_any_bandwidths(provider, variances, n, available):
    available(provider)
    sigma = torch.tensor(variances).sqrt().to(provider.device)
    x, y, x_offsets, y_offsets, _ = mmd2_inputs((n,), (n - 2,), 10, torch.float32, device=provider.device)
    value, env = provider.function()(x, y, x_offsets, y_offsets, sigma, False)
    wide = (x.double(), y.double(), x_offsets, y_offsets, sigma.double(), False)
    goal, goal_env = reference.mmd2(*wide)
    assert_close(value, goal, length=10, scale=float(len(variances)), name="value")
    assert_close(env, goal_env, length=10, scale=float(len(variances)), name="env_grad")
    on = torch.ones(1, device=provider.device)
    grads = provider.function("mmd2_backward")(on, -on, x, y, x_offsets, y_offsets, sigma, False)
    for grad, goal in zip(grads, reference.mmd2_backward(on, -on, *wide), strict=True):
        assert_close(grad, goal, length=10, scale=0.01, name="gradient")


@pytest.mark.parametrize("provider", [p for p in providers("mmd2") if "reference" not in p.id], ids=str)
@pytest.mark.parametrize("n", [5, 40])
def test_weak_pairs_beside_a_row_itself(provider, n, available):
    """The kernel of a row with itself, 1, has no gradient and drowns none of pairs whose kernels are 1e-5."""
    available(provider)
    x, y, x_offsets, y_offsets, _ = mmd2_inputs((n,), (n + 3,), 10, torch.float32, device=provider.device)
    sigma = torch.tensor([0.5], device=provider.device)
    wide = (x.double(), y.double(), x_offsets, y_offsets, sigma.double(), False)
    on = torch.ones(1, device=provider.device)
    value, _ = provider.function()(x, y, x_offsets, y_offsets, sigma, False)
    assert abs(float(value) - float(reference.mmd2(*wide)[0])) < 1e-6
    grads = provider.function("mmd2_backward")(on, -on, x, y, x_offsets, y_offsets, sigma, False)
    for grad, goal in zip(grads, reference.mmd2_backward(on.double(), -on.double(), *wide), strict=True):
        # an exponent of 20 carries its rounding into the kernel
        assert (grad - goal).abs().max() < 2e-5 * goal.abs().max()


@pytest.mark.parametrize("provider", providers("mmd2"), ids=str)
@pytest.mark.parametrize("unbiased", [False, True])
def test_rounded_distances_give_no_kernel_above_one(provider, unbiased, available):
    """Bandwidths below the rounding of squared distances: a row has none to itself, other rows no negative one."""
    available(provider)
    make = torch.Generator().manual_seed(0)
    x, y = (1000.0 * torch.randn(rows, 200, generator=make).to(provider.device) for rows in (21, 18))
    starts = offsets([21], provider.device), offsets([18], provider.device)
    sigma = torch.tensor([0.05, 0.1], device=provider.device)
    on = torch.ones(1, device=provider.device)
    value, env = provider.function()(x, y, *starts, sigma, unbiased)
    goal = 0.0 if unbiased else 2.0 / 21 + 2.0 / 18
    assert abs(float(value) - goal) < 1e-6
    assert float(env) == 0.0
    for grad in provider.function("mmd2_backward")(on, on, x, y, *starts, sigma, unbiased):
        assert not grad.any()
    # rows that x and y share: their distance is rounding, of either sign before it is cut off
    y[:9] = x[:9]
    value, env = provider.function()(x, y, *starts, sigma, unbiased)
    # at most two kernels of 1 a pair; 2 D beta exp(-D beta) is at most 2 / e
    assert abs(float(value)) <= 4.0
    assert abs(float(env)) <= 6.0


@pytest.mark.parametrize("provider", [p for p in providers("mmd2") if "csrc" in p.id], ids=str)
def test_more_rows_than_weights_are_kept(provider, available):
    """Beyond some rows the weights of all pairs are made band by band: the gradients are the same."""
    available(provider)
    x, y, x_offsets, y_offsets, sigma = mmd2_inputs((1500,), (1450,), 2, torch.float64, scales=2)
    on = torch.ones(1, dtype=torch.float64)
    grads = provider.function("mmd2_backward")(on, 2 * on, x, y, x_offsets, y_offsets, sigma, True)
    goals = reference.mmd2_backward(on, 2 * on, x, y, x_offsets, y_offsets, sigma, True)
    for grad, goal in zip(grads, goals, strict=True):
        assert (grad - goal).abs().max() < 1e-12 * goal.abs().max()


@pytest.mark.parametrize("provider", providers("mmd2"), ids=str)
@pytest.mark.parametrize("n", [5, 50])
def test_nothing_leaks_between_groups(provider, n, available):
    available(provider)
    lengths = (n, n + 1, n)
    x, y, x_offsets, y_offsets, sigma = mmd2_inputs(lengths, lengths, 20, torch.float32, device=provider.device)
    bad = x.clone()
    bad[n + 1] = float("nan")
    on = torch.ones(3, device=provider.device)
    value, env = provider.function()(x, y, x_offsets, y_offsets, sigma, True)
    spoiled = provider.function()(bad, y, x_offsets, y_offsets, sigma, True)
    grads = provider.function("mmd2_backward")(on, on, bad, y, x_offsets, y_offsets, sigma, True)
    for one, other in zip(spoiled, (value, env), strict=True):
        assert torch.equal(one[[0, 2]], other[[0, 2]])
        assert torch.isnan(one[1])
    for grad in grads:
        assert torch.isfinite(grad[:n]).all()
        assert torch.isfinite(grad[-n:]).all()
        assert torch.isnan(grad[n : 2 * n + 1]).any(1).all()


@pytest.mark.parametrize("provider", [p for p in providers("mmd2") if p.device == "cpu"], ids=str)
def test_equals_geomloss(provider, available):
    """geomloss computes half the biased squared MMD of one bandwidth with its own distances."""
    geomloss = pytest.importorskip("geomloss", reason="geomloss is not installed")
    available(provider)
    x, y, x_offsets, y_offsets, _ = mmd2_inputs((21,), (34,), 12, torch.float64)
    sigma = torch.tensor([4.0], dtype=torch.float64)
    value, _ = provider.function()(x, y, x_offsets, y_offsets, sigma, False)
    x.requires_grad_()
    goal = 2 * geomloss.SamplesLoss("gaussian", blur=4.0, backend="tensorized")(x, y)
    assert abs(value - goal) < 1e-12
    (by_x,) = torch.autograd.grad(goal, x)
    on = torch.ones(1, dtype=torch.float64)
    grad, _ = provider.function("mmd2_backward")(on, 0 * on, x.detach(), y, x_offsets, y_offsets, sigma, False)
    assert (grad - by_x).abs().max() < 1e-13


@pytest.mark.parametrize("unbiased", [False, True])
def test_gradcheck(unbiased):
    x, y, x_offsets, y_offsets, sigma = mmd2_inputs((2, 0, 1), (3, 2, 1), 3, torch.float64)
    x.requires_grad_()
    y.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: ops.mmd2(a, b, x_offsets, y_offsets, sigma, unbiased), (x, y))


@pytest.mark.parametrize("case", ["plain", "with grad", "permuted"])
def test_opcheck(case):
    x, y, x_offsets, y_offsets, sigma = mmd2_inputs((3, 2), (1, 4), 5, torch.float32)
    if case == "permuted":
        x = x.t().contiguous().t()
    x.requires_grad_(case == "with grad")
    y.requires_grad_(case == "with grad")
    torch.library.opcheck(torch.ops.fastedit.mmd2.default, (x, y, x_offsets, y_offsets, sigma, True))
    arguments = (torch.ones(2), torch.ones(2), x.detach(), y.detach(), x_offsets, y_offsets, sigma, True)
    torch.library.opcheck(torch.ops.fastedit.mmd2_backward.default, arguments)


def test_compiles_without_breaks():
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def objective(x, y, x_offsets, y_offsets, sigma):
        value, env = ops.mmd2(x * 1.5, y, x_offsets, y_offsets, sigma, True)
        return (value + env.square()).sum()

    for lengths in ((3, 2), (5, 1, 4)):
        x, y, x_offsets, y_offsets, sigma = mmd2_inputs(lengths, lengths, 6, torch.float32)
        x.requires_grad_()
        (grad,) = torch.autograd.grad(objective(x, y, x_offsets, y_offsets, sigma), x)
        value, env = ops.mmd2(x * 1.5, y, x_offsets, y_offsets, sigma, True)
        (goal,) = torch.autograd.grad((value + env.square()).sum(), x)
        assert torch.allclose(grad, goal)


@settings(max_examples=30, deadline=None)
@given(
    x_lengths=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    extra=st.lists(st.integers(0, 5), min_size=4, max_size=4),
    d=st.integers(1, 20),
    unbiased=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_properties(x_lengths, extra, d, unbiased, seed):
    y_lengths = extra[: len(x_lengths)]
    x, y, x_offsets, y_offsets, sigma = mmd2_inputs(x_lengths, y_lengths, d, torch.float64, seed=seed)
    x.requires_grad_()
    y.requires_grad_()
    value, env = ops.mmd2(x, y, x_offsets, y_offsets, sigma, unbiased)
    by_x, by_y = torch.autograd.grad(value.sum(), (x, y))
    # Euler: the derivative by the common scale is the inner product of features and gradients
    assert abs((x * by_x).sum() + (y * by_y).sum() - env.sum()) < 1e-11
    # a shift of all features changes nothing, x and y have the same part
    shifted = ops.mmd2(x + 3.0, y + 3.0, x_offsets, y_offsets, sigma, unbiased)
    swapped = ops.mmd2(y, x, y_offsets, x_offsets, sigma, unbiased)
    for other in (shifted, swapped):
        assert torch.allclose(other[0], value, atol=1e-11)
        assert torch.allclose(other[1], env, atol=1e-11)
    if not unbiased:
        assert (value > -1e-12).all()
    # a batch equals its groups one by one
    for g, (n, m) in enumerate(zip(x_lengths, y_lengths, strict=True)):
        rows_x, rows_y = (
            slice(int(x_offsets[g]), int(x_offsets[g + 1])),
            slice(int(y_offsets[g]), int(y_offsets[g + 1])),
        )
        alone, alone_env = ops.mmd2(x[rows_x], y[rows_y], offsets([n]), offsets([m]), sigma, unbiased)
        assert torch.allclose(alone[0], value[g], atol=1e-13)
        assert torch.allclose(alone_env[0], env[g], atol=1e-13)


def test_same_samples_have_no_discrepancy():
    x, _, x_offsets, _, sigma = mmd2_inputs((6, 3), (6, 3), 12, torch.float64)
    value, env = ops.mmd2(x, x.clone(), x_offsets, x_offsets, sigma)
    assert value.abs().max() < 1e-14
    assert env.abs().max() < 1e-14


def test_errors():
    x, y, x_offsets, y_offsets, sigma = mmd2_inputs((2, 1), (1, 1), 3, torch.float32)
    with pytest.raises(ValueError, match=r"mmd2: x is \(N, d\) and y is \(M, d\) \(got x=\(3, 3\), y=\(2, 2\)\)"):
        ops.mmd2(x, y[:, :2], x_offsets, y_offsets, sigma)
    with pytest.raises(
        ValueError, match=r"mmd2: x and y have the same dtype and device \(got x=torch.float32 cpu, y=torch.f"
    ):
        ops.mmd2(x, y.double(), x_offsets, y_offsets, sigma)
    with pytest.raises(
        ValueError, match=r"mmd2: y_offsets is int64 of shape \(3,\) \(got y_offsets=torch.int64 \(2,\)\)"
    ):
        ops.mmd2(x, y, x_offsets, y_offsets[:2], sigma)
    with pytest.raises(ValueError, match=r"mmd2: bandwidths is \(Q,\) or \(G, Q\) \(got bandwidths=\(3, 5\), G=2\)"):
        ops.mmd2(x, y, x_offsets, y_offsets, sigma.expand(3, -1))
    with pytest.raises(ValueError, match=r"mmd2: bandwidths are constants: detach them"):
        ops.mmd2(x, y, x_offsets, y_offsets, sigma.clone().requires_grad_())
    with pytest.raises(
        ValueError, match=r"mmd2: x_offsets rise from 0 to the rows of x \(got x_offsets=\[0, 2, 2\], rows=3\)"
    ):
        ops.mmd2(x, y, torch.tensor([0, 2, 2]), y_offsets, sigma)


def _interpreted_rows(monkeypatch, available):
    """Return the module of the Triton launcher and that of its rows, interpreted."""
    available(next(p for p in providers("mmd2") if p.id == "triton:interpreted"))
    kernels = importlib.import_module("fastedit.kernels.mmd2")
    return kernels, importlib.import_module("fastedit.kernels._mmd2_rows")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weights", [2**26, 1], ids=["whole", "bands"])
def test_tiles_of_pairs(dtype, weights, monkeypatch, available):
    """Whole tiles, several a row, in halves; tiles of a row by several programs; weights at once and band by band."""
    kernels, rows = _interpreted_rows(monkeypatch, available)
    monkeypatch.setattr(kernels, "WEIGHTS", weights)
    monkeypatch.setattr(rows, "processors", lambda device: 2)
    groups = (70, 3), (60, 90)
    inputs = mmd2_inputs(*groups, 20, dtype)
    tile = rows.Prepared(*inputs).settings
    assert tile["HALVES"] == 2
    assert tile["BLOCK_T"] == (64 if dtype == torch.float32 else 128)
    wide = [t.double() if t.is_floating_point() else t for t in inputs]
    length = 20 + max(*groups[0], *groups[1])
    for unbiased in (False, True):
        value, env = kernels.mmd2(*inputs, unbiased)
        goal_value, goal_env = reference.mmd2(*wide, unbiased)
        assert_close(value, goal_value, length=length, scale=5.0, name="value")
        assert_close(env, goal_env, length=length, scale=5.0, name="env_grad")
    on = torch.linspace(1, 2, len(groups[0])), torch.linspace(-1, 0.5, len(groups[0]))
    grads = kernels.mmd2_backward(*on, *inputs, False)
    goals = reference.mmd2_backward(*(one.double() for one in on), *wide, False)
    for grad, goal in zip(grads, goals, strict=True):
        assert_close(grad, goal, length=length, name="gradient")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_centre_of_16_bits_costs_no_digits(dtype, monkeypatch, available):
    """Features of a large mean lose it, those of any sign or with an outlier do not; what is left is exact."""
    kernels, rows = _interpreted_rows(monkeypatch, available)
    x, y, x_offsets, y_offsets, sigma = mmd2_inputs((9,), (7,), 64, torch.float32)
    shift = torch.cat([torch.full((30,), 50.0), torch.full((30,), -300.0), torch.zeros(4)])
    x, y = (x + shift).to(dtype), (y + shift).to(dtype)
    # one row far from the mean of its feature
    x[3, 5] = 1.0
    prepared = rows.Prepared(x, y, x_offsets, y_offsets, sigma)
    both = torch.cat([x, y]).double()
    centre = both - prepared.z[:, :64].double()
    assert (centre == centre[:1]).all()
    moved = torch.ones(64, dtype=torch.bool)
    moved[[5, 60, 61, 62, 63]] = False
    assert torch.equal(centre[0] != 0.0, moved)
    assert (centre[0] - shift)[moved].abs().max() < 3.0
    value, env = kernels.mmd2(x, y, x_offsets, y_offsets, sigma, False)
    goal, goal_env = reference.mmd2(x.double(), y.double(), x_offsets, y_offsets, sigma.double(), False)
    assert (value - goal).abs().max() < 2e-6
    assert (env - goal_env).abs().max() < 2e-6
