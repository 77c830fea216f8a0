"""The op adam_step_outer_: every implementation against its definition, the definition against adam_step_."""

import pytest
import torch

from fastedit import ops
from fastedit.reference import adam_step_outer as reference
from fastedit.testing import adam_step_outer_inputs, assert_close, providers

DTYPES = (torch.float32, torch.float64)
# per part a token count for every edit, per part (o, i): odd, empty and size-one shapes; few tokens and many
SHAPES = (
    (((3, 0, 2), (1, 5, 0)), ((7, 33), (5, 4))),
    (((1,),), ((1, 1),)),
    (((),), ((3, 2),)),
    (((2, 2),), ((0, 3),)),
    (((0, 0),), ((40, 9),)),
    (((40, 3, 90, 35),), ((150, 70),)),
    (((200, 17), (33, 32)), ((130, 65), (16, 300))),
)
SETTINGS = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "clip": None, "radius": None}


def _copied(argument):
    return [t.clone() for t in argument] if isinstance(argument, list) else argument.clone()


def _run(function, inputs, **kwargs):
    """Call the op on copies; return its norms and everything it wrote."""
    copies = [_copied(argument) for argument in inputs]
    norm = function(*copies, *{**SETTINGS, **kwargs}.values())
    return norm, *copies[0], *copies[4], *copies[5], copies[6]


def _flat(inputs):
    """The same step as arguments of adam_step_."""
    params, x, y, ends, first, second, *rest = inputs
    dense = [reference.outer_products(b, a, len(p), e) for p, a, b, e in zip(params, x, y, ends, strict=True)]
    return [torch.cat([t.flatten(1) for t in parts], 1) for parts in (params, dense, first, second)], rest


def _wide(inputs):
    def widened(t):
        return t.double() if t.is_floating_point() else t

    return [[widened(t) for t in each] if isinstance(each, list) else widened(each) for each in inputs]


@pytest.mark.parametrize("provider", providers("adam_step_outer_"), ids=str)
@pytest.mark.parametrize("clip", [None, 0.3, 1e6])
@pytest.mark.parametrize("radius", [None, 0.5])
def test_equals_adam_step_of_the_dense_gradient(provider, clip, radius, available):
    available(provider)
    for seed, (lengths, shapes) in enumerate(SHAPES):
        inputs = adam_step_outer_inputs(lengths, shapes, torch.float64, seed=seed, device=provider.device)
        (params, dense, first, second), (step, lr, active) = _flat(inputs)
        step = step.clone()
        limits = {"clip": clip, "radius": radius}
        goal = ops.adam_step_(params, dense, first, second, step, lr, active, weight_decay=0.01, **limits)
        norm, *written, taken = _run(provider.function(), inputs, **limits)
        assert torch.equal(taken, step)
        assert torch.allclose(norm, goal, rtol=1e-12, atol=1e-14)
        parts = [written[k : k + len(shapes)] for k in (0, len(shapes), 2 * len(shapes))]
        for tensors, row in zip(parts, (params, first, second), strict=True):
            flat = torch.cat([t.flatten(1) for t in tensors], 1)
            assert torch.allclose(flat, row, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("provider", providers("adam_step_outer_"), ids=str)
@pytest.mark.parametrize(
    "settings_",
    [{}, {"clip": 0.3}, {"clip": 100.0, "radius": 0.5}, {"weight_decay": 0.0, "eps": 1e-3, "beta1": 0.0}],
    ids=str,
)
def test_equals_reference(provider, settings_, available):
    available(provider)
    for seed, (lengths, shapes) in enumerate(SHAPES):
        inputs = adam_step_outer_inputs(lengths, shapes, torch.float32, seed=seed, device=provider.device)
        norm, *written, taken = _run(provider.function(), inputs, **settings_)
        goal_norm, *goals, goal_taken = _run(reference.adam_step_outer_, _wide(inputs), **settings_)
        longest = max((max(counts, default=1) for counts in lengths), default=1)
        assert norm.dtype == torch.float32
        assert_close(norm, goal_norm, length=max(o * i for o, i in shapes), name="norm")
        for one, other in zip(written, goals, strict=True):
            assert_close(one, other, length=max(longest, 1), scale=1.0)
        assert torch.equal(taken, goal_taken)


@pytest.mark.parametrize("provider", providers("adam_step_outer_"), ids=str)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_edits_at_rest_and_broken_ones_keep_every_bit(provider, wrong, available):
    available(provider)
    inputs = adam_step_outer_inputs(((2, 3, 1, 4, 2),), ((20, 37),), torch.float32, device=provider.device)
    inputs[2][0][10:] = wrong  # edit 4
    inputs[1][0][5] = wrong  # edit 2, which is done
    norm, *written = _run(provider.function(), inputs, clip=1.0)
    before = (*inputs[0], *inputs[4], *inputs[5], inputs[6])
    for one, old in zip(written, before, strict=True):
        for edit in (2, 4):
            assert torch.equal(one[edit], old[edit])
        for edit in (0, 1, 3):
            assert not torch.equal(one[edit], old[edit])
    assert norm[2] == 0
    assert norm.isfinite().tolist() == [True, True, True, True, False]


@pytest.mark.parametrize("provider", providers("adam_step_outer_"), ids=str)
def test_a_batch_equals_its_edits(provider, available):
    available(provider)
    lengths, shapes = ((4, 9, 0, 70), (1, 2, 3, 4)), ((65, 40), (33, 17))
    inputs = adam_step_outer_inputs(lengths, shapes, torch.float32, device=provider.device)
    norm, *batch = _run(provider.function(), inputs, clip=0.2)
    params, x, y, ends, first, second, *rest = inputs
    for edit in range(4):
        spans = [slice(int(e[edit]), int(e[edit + 1])) for e in ends]

        def of(tensors, spans=spans):
            return [t[s] for t, s in zip(tensors, spans, strict=True)]

        def row(tensors, edit=edit):
            return [t[edit : edit + 1] for t in tensors]

        own = [torch.tensor([0, s.stop - s.start], device=provider.device) for s in spans]
        alone = [row(params), of(x), of(y), own, row(first), row(second), *row(rest)]
        one_norm, *one = _run(provider.function(), alone, clip=0.2)
        assert torch.equal(one_norm[0], norm[edit])
        for single, whole in zip(one, batch, strict=True):
            assert torch.equal(single[0], whole[edit])


@pytest.mark.parametrize("provider", providers("adam_step_outer_"), ids=str)
def test_matrices_within_wider_rows(provider, available):
    """Parts of one flat row are updated in place, and nothing beside them."""
    available(provider)
    inputs = adam_step_outer_inputs(((3, 2), (1, 4)), ((6, 5), (4, 3)), torch.float32, device=provider.device)
    goal = _run(provider.function(), inputs, clip=0.1)
    buffers = []
    for place in (0, 4, 5):
        row = torch.full((2, 60), 7.0, device=provider.device)
        views = [row[:, 10:40].view(2, 6, 5), row[:, 45:57].view(2, 4, 3)]
        for view, values in zip(views, inputs[place], strict=True):
            view.copy_(values)
        inputs[place] = views
        buffers.append(row)
    norm = provider.function()(*inputs, *{**SETTINGS, "clip": 0.1}.values())
    assert torch.equal(norm, goal[0])
    for one, other in zip((*inputs[0], *inputs[4], *inputs[5]), goal[1:-1], strict=True):
        assert torch.equal(one, other)
    for row in buffers:
        assert (row[:, [*range(10), *range(40, 45), 57, 58, 59]] == 7.0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    inputs = adam_step_outer_inputs(((3, 2), (1, 4)), ((6, 5), (4, 3)), dtype)
    torch.library.opcheck(torch.ops.fastedit.adam_step_outer_.default, (*inputs, *SETTINGS.values()))


def test_errors():
    inputs = adam_step_outer_inputs(((3, 2),), ((6, 5),), torch.float32)

    def call(place, value, **kwargs):
        ops.adam_step_outer_(*[*inputs[:place], value, *inputs[place + 1 :]], **kwargs)

    with pytest.raises(ValueError, match=r"at least one part, and every list .* \(got params=0, inputs=1"):
        call(0, [])
    with pytest.raises(ValueError, match=r"params are \(B, o, i\) \(got params=\(2, 30\)\)"):
        call(0, [inputs[0][0].flatten(1)])
    with pytest.raises(ValueError, match=r"inputs \(T, i\), grads .* \(got params=\(2, 6, 5\), inputs=\(5, 4\)"):
        call(1, [inputs[1][0][:, :4]])
    with pytest.raises(ValueError, match=r"all are float64, offsets int64 \(got params=torch.float32"):
        call(2, [inputs[2][0].double()])
    with pytest.raises(ValueError, match=r"offsets rise from 0 to .* \(got offsets=\[0, 3, 4\], T=5\)"):
        call(3, [torch.tensor([0, 3, 4])])
    with pytest.raises(ValueError, match="matrices of exp_avg are contiguous and do not share memory"):
        call(4, [inputs[4][0].transpose(1, 2).contiguous().transpose(1, 2)])
    with pytest.raises(ValueError, match="params, exp_avg and exp_avg_sq do not share memory"):
        call(5, inputs[4])
    with pytest.raises(ValueError, match=r"lr is a number or of shape \(2,\)"):
        call(7, torch.ones(3))
    with pytest.raises(ValueError, match=r"betas lie in \[0, 1\)"):
        call(0, inputs[0], betas=(1.0, 0.9))
