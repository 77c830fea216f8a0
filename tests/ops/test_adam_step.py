"""The op adam_step_: every implementation against its definition, the definition against torch.optim.AdamW."""

import importlib
import mmap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastedit import ops
from fastedit.reference import adam_step as reference
from fastedit.testing import adam_step_inputs, assert_close, providers

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# odd, empty and size-one shapes: rows, size; the last spans several blocks of work
SHAPES = ((3, 33), (1, 1), (0, 7), (4, 0), (5, 1000), (2, 70_001))
# the interpreter is slow: two programs a row, of several blocks
SHORT_SHAPES = (*SHAPES[:4], (2, 9001))


def _run(function, inputs, **kwargs):
    """Call the op on copies; return its norms and everything it wrote."""
    settings = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "clip": None, "radius": None, **kwargs}
    params, grads, first, second, step, lr, active = inputs
    copies = [params.clone(), grads, first.clone(), second.clone(), step.clone(), lr, active]
    norm = function(*copies, *settings.values())
    return norm, copies[0], copies[2], copies[3], copies[4]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("clip", [None, 0.5, 1e6])
def test_equals_torch_adamw(weight_decay, clip):
    rows, size = 3, 50
    make = torch.Generator().manual_seed(0)
    params = torch.randn(rows, size, dtype=torch.float64, generator=make)
    first, second = torch.zeros_like(params), torch.zeros_like(params)
    step, active = torch.zeros(rows, dtype=torch.int64), torch.tensor([True, True, False])
    lr = torch.tensor([0.01, 0.1, 0.5], dtype=torch.float64)
    single = [torch.nn.Parameter(row.clone()) for row in params]
    optimisers = [
        torch.optim.AdamW([p], lr=float(r), weight_decay=weight_decay, betas=(0.8, 0.95), eps=1e-6)
        for p, r in zip(single, lr, strict=True)
    ]
    for iteration in range(12):
        grads = torch.randn(rows, size, dtype=torch.float64, generator=make)
        active[1] = iteration < 5
        norm = ops.adam_step_(
            params,
            grads,
            first,
            second,
            step,
            lr,
            active,
            betas=(0.8, 0.95),
            eps=1e-6,
            weight_decay=weight_decay,
            clip=clip,
        )
        for row in active.nonzero()[:, 0].tolist():
            single[row].grad = grads[row].clone()
            total = torch.nn.utils.clip_grad_norm_([single[row]], float("inf") if clip is None else clip)
            assert abs(total - norm[row]) < 1e-12
            optimisers[row].step()
    assert (params - torch.stack([p.detach() for p in single])).abs().max() < 1e-14
    assert step.tolist() == [12, 5, 0]


@pytest.mark.parametrize("provider", providers("adam_step_"), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "settings_",
    [{}, {"clip": 0.3}, {"clip": 100.0, "radius": 0.5}, {"weight_decay": 0.0, "eps": 1e-3, "beta1": 0.0}],
    ids=str,
)
def test_equals_reference(provider, dtype, settings_, available):
    available(provider)
    for seed, shape in enumerate(SHORT_SHAPES if "interpreted" in provider.id else SHAPES):
        inputs = adam_step_inputs(*shape, dtype, seed=seed, device=provider.device)
        for grads in {t.dtype: t for t in (inputs[1], inputs[1].to(inputs[2].dtype))}.values():
            given_ = (inputs[0], grads, *inputs[2:])
            norm, *written = _run(provider.function(), given_, **settings_)
            wide = tuple(t.double() if t.is_floating_point() else t for t in given_)
            goal_norm, *goals = _run(reference.adam_step_, wide, **settings_)
            assert norm.dtype == inputs[2].dtype
            assert_close(norm, goal_norm, length=shape[1], name="norm")
            for name, one, other in zip(("params", "exp_avg", "exp_avg_sq"), written, goals, strict=False):
                assert_close(one, other, length=1, scale=1.0, name=name)
            assert torch.equal(written[3], goals[3])


@pytest.mark.parametrize("provider", providers("adam_step_"), ids=str)
def test_second_moments_of_any_size(provider, available):
    available(provider)
    params, grads, first, second, *rest = adam_step_inputs(2, 64, torch.float32, device=provider.device)
    sizes = torch.tensor([0.0, 1e-45, 1e-40, 2e-38, 1e-30, 1e-16, 1.0, 1e20, 1e38, 3.3e38]).to(second.device)
    second[:, :60] = sizes.repeat_interleave(6)
    grads[:, :60:2] = 0.0
    inputs = (params, grads, first, second, *rest)
    written = _run(provider.function(), inputs)[1:]
    goals = _run(reference.adam_step_, [t.double() if t.is_floating_point() else t for t in inputs])[1:]
    for name, one, other in zip(("params", "exp_avg", "exp_avg_sq"), written, goals, strict=False):
        assert one.isfinite().all()
        relative = (one.double() - other).abs() / other.abs().clamp(min=1e-37)
        assert relative.max() < 4e-6, name


@pytest.mark.parametrize("provider", providers("adam_step_"), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_at_rest_keep_every_bit(provider, dtype, available):
    available(provider)
    inputs = adam_step_inputs(6, 77, dtype, device=provider.device)
    inputs[1][2] = float("nan")
    norm, *written = _run(provider.function(), inputs, clip=1.0, radius=0.1)
    rest = ~inputs[6]
    assert rest.sum() == 2
    for one, before in zip(written, (inputs[0], inputs[2], inputs[3], inputs[4]), strict=True):
        assert torch.equal(one[rest], before[rest])
        assert not torch.equal(one[~rest], before[~rest])
    assert (norm[rest] == 0).all()


@pytest.mark.parametrize("provider", providers("adam_step_"), ids=str)
def test_a_batch_equals_its_rows(provider, available):
    available(provider)
    inputs = adam_step_inputs(5, 3001, torch.float32, device=provider.device)
    norm, *batch = _run(provider.function(), inputs, clip=0.2)
    for row in range(5):
        one_norm, *one = _run(provider.function(), [t[row : row + 1] for t in inputs], clip=0.2)
        assert torch.equal(one_norm[0], norm[row])
        for single, whole in zip(one, batch, strict=True):
            assert torch.equal(single[0], whole[row])


@pytest.mark.parametrize("provider", providers("adam_step_"), ids=str)
def test_rows_of_a_wider_buffer(provider, available):
    """Strided rows are updated in place, and nothing beside them."""
    available(provider)
    params, grads, first, second, step, lr, active = adam_step_inputs(4, 40, torch.float32, device=provider.device)
    goal = _run(provider.function(), (params, grads, first, second, step, lr, active))
    buffer = torch.full((4, 60), 7.0, device=provider.device)
    buffer[:, 10:50] = params
    provider.function()(buffer[:, 10:50], grads, first, second, step, lr, active, 0.9, 0.999, 1e-8, 0.01, None, None)
    assert torch.equal(buffer[:, 10:50], goal[1])
    assert (buffer[:, :10] == 7.0).all()
    assert (buffer[:, 50:] == 7.0).all()


@pytest.mark.parametrize("provider", [p for p in providers("adam_step_") if p.id.startswith("triton")], ids=str)
def test_parts_of_a_row(provider, available, monkeypatch):
    """However a row is cut."""
    available(provider)
    module = importlib.import_module("fastedit.kernels.adam_step")
    inputs = adam_step_inputs(2, 1000, torch.float32, device=provider.device)
    goals = _run(reference.adam_step_, [t.double() if t.is_floating_point() else t for t in inputs], clip=0.3)
    for tile, part, most, parts in ((2048, 8192, 1024, 1), (64, 64, 1024, 16), (64, 64, 3, 3)):
        for name, number in (("TILE", tile), ("PART", part), ("MOST", most)):
            monkeypatch.setattr(module, name, number)
        assert module._parts(1000)[0] == parts
        norm, *written = _run(provider.function(), inputs, clip=0.3)
        assert_close(norm, goals[0], length=1000, name="norm")
        for one, other in zip(written[:3], goals[1:4], strict=True):
            assert_close(one, other, length=1, scale=1.0)
        assert torch.equal(_run(provider.function(), inputs)[0], norm)


@pytest.mark.parametrize("provider", providers("adam_step_"), ids=str)
@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("spoiled", ["nan", "inf", "opposite", "overflow"])
def test_a_row_without_a_finite_norm_keeps_every_bit(provider, clip, spoiled, available):
    """Its norm says so; the others make their step."""
    available(provider)
    inputs = adam_step_inputs(3, 5000, torch.float32, device=provider.device)
    inputs[6][:] = True
    goal = _run(provider.function(), inputs, clip=clip, radius=0.5)
    grads = inputs[1][1]
    if spoiled == "overflow":
        # Finite numbers whose squares are not
        grads[4100] = 1e30
    else:
        grads[4100] = float("nan" if spoiled == "nan" else "inf")
        grads[7] = -grads[4100] if spoiled == "opposite" else grads[7]
    got = _run(provider.function(), inputs, clip=clip, radius=0.5)
    assert got[0].isfinite().tolist() == [True, False, True]
    for one, before, other in zip(got[1:], (inputs[0], *inputs[2:5]), goal[1:], strict=True):
        assert torch.equal(one[1], before[1])
        assert torch.equal(one[[0, 2]], other[[0, 2]])


@pytest.mark.parametrize("provider", providers("adam_step_"), ids=str)
@pytest.mark.parametrize("clip", [None, 0.3])
def test_two_calls_are_equal(provider, clip, available):
    available(provider)
    inputs = adam_step_inputs(3, 9001, torch.bfloat16, device=provider.device)
    calls = [_run(provider.function(), inputs, clip=clip) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*calls, strict=True))


@pytest.mark.parametrize("provider", providers("adam_step_"), ids=str)
def test_vectors_with_strides(provider, available):
    """step, lr and active need not lie side by side."""
    available(provider)
    params, grads, first, second, step, lr, active = adam_step_inputs(3, 40, torch.float32, device=provider.device)
    goal = _run(provider.function(), (params, grads, first, second, step, lr[:1].repeat(3), active))
    wide_step, wide_active = step.repeat_interleave(2), active.repeat_interleave(2)
    given_ = (params, grads, first, second, wide_step[::2], lr[:1].expand(3), wide_active[::2])
    norm = provider.function()(*given_, 0.9, 0.999, 1e-8, 0.01, None, None)
    for one, other in zip((norm, params, first, second, wide_step[::2]), goal, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(wide_step[1::2], step)


@pytest.mark.parametrize("provider", [p for p in providers("adam_step_") if p.device == "cpu"], ids=str)
@pytest.mark.parametrize("clip", [None, 0.3])
def test_rows_further_apart_than_two_to_the_31(provider, clip, available):
    available(provider)
    # memory that nobody touches takes no room
    room = mmap.mmap(-1, 2 * (2**31 + 2**13), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    inputs = list(adam_step_inputs(3, 30, torch.float16))
    inputs[6] = torch.ones(3, dtype=torch.bool)
    goal = _run(provider.function(), inputs, clip=clip)
    space = torch.frombuffer(room, dtype=torch.float16)
    for at, place in enumerate((0, 100)):
        far = space[place:].as_strided((3, 30), (2**30 + 64, 1))
        inputs[at] = far.copy_(inputs[at])
    norm = provider.function()(*inputs, 0.9, 0.999, 1e-8, 0.01, clip, None)
    for one, other in zip((norm, inputs[0], *inputs[2:5]), goal, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("case", ["plain", "strided"])
def test_opcheck(case):
    params, grads, first, second, step, lr, active = adam_step_inputs(4, 9, torch.float32)
    if case == "strided":
        params, grads = torch.cat([params, params], 1)[:, :9], torch.cat([grads, grads], 1)[:, 9:]
    arguments = (params, grads, first, second, step, lr, active, 0.9, 0.999, 1e-8, 0.01, 1.0, None)
    torch.library.opcheck(torch.ops.fastedit.adam_step_.default, arguments)


def test_compiles_without_breaks():
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def update(params, grads, first, second, step, active):
        norm = ops.adam_step_(params, grads * 2.0, first, second, step, 0.01, active, clip=1.0)
        return norm + params.sum(1)

    for size in (5, 9):
        params, grads, first, second, step, _, active = adam_step_inputs(3, size, torch.float32)
        goal = [t.clone() for t in (params, first, second, step)]
        norm = ops.adam_step_(goal[0], grads * 2.0, goal[1], goal[2], goal[3], 0.01, active, clip=1.0)
        got = update(params, grads, first, second, step, active)
        assert torch.allclose(got, norm + goal[0].sum(1))
        for one, other in zip((params, first, second, step), goal, strict=True):
            assert torch.equal(one, other)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 4),
    size=st.integers(1, 40),
    clip=st.sampled_from([None, 1e-3, 1.0]),
    radius=st.sampled_from([None, 0.05]),
    seed=st.integers(0, 1000),
)
def test_properties(rows, size, clip, radius, seed):
    inputs = adam_step_inputs(rows, size, torch.float64, seed=seed)
    run = {"clip": clip, "radius": radius, "weight_decay": 0.0, "eps": 0.0}
    norm, params, *_ = _run(torch.ops.fastedit.adam_step_.default, inputs, **run)
    active = inputs[6]
    assert torch.allclose(norm[active], inputs[1].norm(dim=1)[active])
    if radius is not None:
        assert params[active].abs().max() <= radius
    # from fresh moments the first step has size lr in every entry, whatever the scale of the gradient
    fresh = (inputs[0], inputs[1], inputs[2] * 0, inputs[3] * 0, inputs[4] * 0, inputs[5], inputs[6])
    _, params, *_ = _run(torch.ops.fastedit.adam_step_.default, fresh, **{**run, "radius": None})
    moved = (params - inputs[0]).abs() / inputs[5][:, None]
    assert torch.allclose(moved[active], torch.ones_like(moved[active]), rtol=1e-6)


def test_parameters_that_require_a_gradient():
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    zeros = torch.zeros(2, 3)
    grads, step, active = torch.ones(2, 3), torch.zeros(2).long(), torch.ones(2).bool()
    ops.adam_step_(parameter, grads, zeros.clone(), zeros.clone(), step, 0.5, active)
    assert torch.allclose(parameter.detach(), torch.full((2, 3), 0.5))
    assert parameter.requires_grad


def test_errors():
    params, grads, first, second, step, lr, active = adam_step_inputs(3, 4, torch.bfloat16)
    with pytest.raises(ValueError, match=r"adam_step_: exp_avg is torch.float32 \(got exp_avg=torch.bfloat16\)"):
        ops.adam_step_(params, grads, first.bfloat16(), second, step, 0.1, active)
    with pytest.raises(
        ValueError, match=r"adam_step_: grads has the shape of params \(got grads=\(3, 3\), params=\(3, 4\)\)"
    ):
        ops.adam_step_(params, grads[:, :3], first, second, step, 0.1, active)
    with pytest.raises(ValueError, match=r"adam_step_: params has unit stride along P \(got params=\(1, 3\)\)"):
        ops.adam_step_(params.t().contiguous().t(), grads, first, second, step, 0.1, active)
    with pytest.raises(
        ValueError, match=r"adam_step_: step is torch.int64 of shape \(3,\) beside params \(got step=torch.int32"
    ):
        ops.adam_step_(params, grads, first, second, step.int(), 0.1, active)
    with pytest.raises(
        ValueError, match=r"adam_step_: lr is a number or of shape \(3,\) beside params \(got lr=\(2,\) cpu\)"
    ):
        ops.adam_step_(params, grads, first, second, step, lr[:2], active)
    with pytest.raises(ValueError, match=r"adam_step_: betas lie in \[0, 1\) \(got betas=\(0.9, 1.0\)\)"):
        ops.adam_step_(params, grads, first, second, step, 0.1, active, betas=(0.9, 1.0))
    with pytest.raises(ValueError, match=r"adam_step_: clip is not negative \(got clip=-1.0\)"):
        ops.adam_step_(params, grads, first, second, step, 0.1, active, clip=-1.0)
