"""The op low_rank: every implementation against its definition, and the definition against single edits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastedit import ops
from fastedit.reference import low_rank as reference
from fastedit.testing import assert_close, factor_rounding, low_rank_inputs, providers

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# odd, empty and size-one shapes: tokens per edit, d, r, o
SHAPES = (
    ((3, 0, 7, 1), 33, 3, 17),
    ((1,), 1, 1, 1),
    ((0, 0), 5, 2, 4),
    ((40, 17), 130, 8, 65),
    ((2,), 16, 20, 300),
    ((5, 5), 64, 16, 1),
)


def _cases(dtype, provider):
    # the interpreter is slow: it gets the shapes that cross a block in every dimension, in both layouts
    for seed, shape in enumerate(SHAPES[1:5] if "interpreted" in provider.id else SHAPES):
        yield low_rank_inputs(*shape, dtype, seed=seed)
        if dtype in (torch.bfloat16, torch.float16):
            yield low_rank_inputs(*shape, dtype, weight_dtype=torch.float32, seed=seed)
    x, down, up, starts = low_rank_inputs(*SHAPES[0], dtype)
    permuted = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in (x, down, up)]
    yield (*permuted, starts)
    # rows of a wider tensor, as a slice of a packed projection gives
    yield torch.cat([x, x], 1)[:, : x.shape[1]], down, up, starts


@pytest.mark.parametrize("provider", providers("low_rank"), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_reference(provider, dtype, available):
    available(provider)
    for inputs in _cases(dtype, provider):
        x, down, up, starts = (t.to(provider.device) for t in inputs)
        wide = (x.double(), down.double(), up.double(), starts)
        length = down.shape[1] * down.shape[2]
        y = provider.function()(x, down, up, starts)
        assert y.dtype == dtype
        assert y.is_contiguous()
        assert_close(y, reference.low_rank(*wide), length=length, name="y")
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
        layouts = (grad.t().contiguous().t(), grad[:1].expand_as(grad), grad)
        for layout in layouts[: 1 if "interpreted" in provider.id else 3]:
            got = provider.function("low_rank_backward")(layout, x, down, up, starts, [True] * 3)
            goal = reference.low_rank_backward(layout.double(), *wide, [True] * 3)
            tokens = max(int(x.shape[0]), 1)
            lengths = (up.shape[2] * down.shape[2], tokens * up.shape[2], tokens * down.shape[1])
            for name, one, other, like, n in zip(("x", "down", "up"), got, goal, (x, down, up), lengths, strict=True):
                assert one.dtype == like.dtype
                assert one.is_contiguous()
                rounding = factor_rounding(provider, dtype, down.dtype)
                assert_close(one, other, length=n, rounding=rounding, name=f"gradient of {name}")


@pytest.mark.parametrize("provider", providers("low_rank"), ids=str)
@pytest.mark.parametrize("needs", [[True, False, False], [False, True, False], [False, False, True], [False] * 3])
def test_only_needed_gradients(provider, needs, available):
    available(provider)
    x, down, up, starts = low_rank_inputs((3, 2), 5, 2, 4, torch.float32, device=provider.device)
    grad = torch.ones(5, 4, device=provider.device)
    got = provider.function("low_rank_backward")(grad, x, down, up, starts, needs)
    goal = reference.low_rank_backward(grad, x, down, up, starts, needs)
    for one, other in zip(got, goal, strict=True):
        assert one.shape == other.shape
        assert torch.allclose(one, other, atol=1e-5)


def test_gradcheck():
    x, down, up, starts = low_rank_inputs((2, 0, 3), 4, 2, 3, torch.float64)
    inputs = [t.requires_grad_() for t in (x, down, up)]
    assert torch.autograd.gradcheck(lambda *t: ops.low_rank(*t, starts), inputs)


@pytest.mark.parametrize("case", ["plain", "with grad", "permuted"])
def test_opcheck(case):
    x, down, up, starts = low_rank_inputs((3, 0, 4), 6, 2, 5, torch.float32)
    if case == "permuted":
        x, down, up = (t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in (x, down, up))
    for t in (x, down, up):
        t.requires_grad_(case == "with grad")
    torch.library.opcheck(torch.ops.fastedit.low_rank.default, (x, down, up, starts))
    plain = [t.detach() for t in (x, down, up)]
    arguments = (torch.ones(7, 5), *plain, starts, [True, False, True])
    torch.library.opcheck(torch.ops.fastedit.low_rank_backward.default, arguments)


def test_compiles_without_breaks():
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def objective(x, down, up, starts):
        return (x.sum() + ops.low_rank(x * 2.0, down, up, starts)).square().sum()

    for lengths in ((3, 2), (1, 4, 2)):
        x, down, up, starts = low_rank_inputs(lengths, 6, 2, 5, torch.float32)
        inputs = [t.requires_grad_() for t in (x, down, up)]
        grads = torch.autograd.grad(objective(*inputs, starts), inputs)
        goal = torch.autograd.grad((x.sum() + ops.low_rank(x * 2.0, down, up, starts)).square().sum(), inputs)
        for one, other in zip(grads, goal, strict=True):
            assert torch.allclose(one, other)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    d=st.integers(1, 40),
    rank=st.integers(1, 18),
    d_out=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_properties(lengths, d, rank, d_out, seed):
    x, down, up, starts = low_rank_inputs(lengths, d, rank, d_out, torch.float64, seed=seed)
    y = ops.low_rank(x, down, up, starts)
    # an edit is the plain product of its own tokens, whoever else is in the batch
    for edit in range(len(lengths)):
        rows = slice(int(starts[edit]), int(starts[edit + 1]))
        assert torch.allclose(y[rows], x[rows] @ (down[edit] @ up[edit]), atol=1e-12)
    assert torch.allclose(ops.low_rank(3.0 * x, down, up, starts), 3.0 * y, atol=1e-12)
    # a delta that starts at up = 0 adds exactly nothing
    assert (ops.low_rank(x, down, torch.zeros_like(up), starts) == 0).all()


@pytest.mark.parametrize("provider", providers("low_rank"), ids=str)
def test_nothing_leaks_between_edits(provider, available):
    available(provider)
    x, down, up, starts = low_rank_inputs((5, 6, 4), 24, 4, 20, torch.float32, device=provider.device)
    y = provider.function()(x, down, up, starts)
    bad = x.clone()
    bad[5:11] = float("nan")
    spoiled = provider.function()(bad, down, up, starts)
    others = [*range(5), *range(11, 15)]
    assert torch.equal(spoiled[others], y[others])
    assert torch.isnan(spoiled[5:11]).all()
    grads = provider.function("low_rank_backward")(torch.ones_like(y), bad, down, up, starts, [True] * 3)
    assert torch.isfinite(grads[1][[0, 2]]).all()
    assert torch.isfinite(grads[2][[0, 2]]).all()


def test_errors():
    x, down, up, starts = low_rank_inputs((2, 1), 4, 2, 3, torch.float32)
    shapes = r"low_rank: x is \(T, d\), down is \(B, d, r\), up is \(B, r, o\) \(got x=\(3, 4\), down=\(2, 3, 2\), up="
    with pytest.raises(ValueError, match=shapes):
        ops.low_rank(x, down[:, :3], up, starts)
    with pytest.raises(
        ValueError, match=r"low_rank: down and up have the dtype of x or are float32 \(got x=torch.float32"
    ):
        ops.low_rank(x, down.double(), up.double(), starts)
    with pytest.raises(ValueError, match=r"low_rank: x is float32, bfloat16, float16 or float64 \(got x=torch.int64\)"):
        ops.low_rank(x.long(), down, up, starts)
    with pytest.raises(
        ValueError, match=r"low_rank: offsets is int64 of shape \(3,\) \(got offsets=torch.int32 \(3,\)\)"
    ):
        ops.low_rank(x, down, up, starts.int())


@pytest.mark.parametrize(
    "provider", [p for p in providers("low_rank") if p.device == "cpu" and "triton" not in p.id], ids=str
)
@pytest.mark.parametrize("wrong", [[0, 2, 2], [1, 2, 3], [0, 4, 3]])
def test_offsets_out_of_range(provider, wrong, available):
    available(provider)
    x, down, up, _ = low_rank_inputs((2, 1), 4, 2, 3, torch.float32)
    message = (
        rf"low_rank: offsets rise from 0 to the number of tokens \(got offsets=\[{', '.join(map(str, wrong))}\], T=3\)"
    )
    with pytest.raises((ValueError, RuntimeError), match=message):
        provider.function()(x, down, up, torch.tensor(wrong))
    with pytest.raises((ValueError, RuntimeError), match=message):
        provider.function("low_rank_backward")(torch.ones(3, 3), x, down, up, torch.tensor(wrong), [True] * 3)
