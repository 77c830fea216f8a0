"""Products of a full delta: edit by edit through oneDNN, or by torch; the same numbers in every ragged layout."""

from itertools import accumulate

import pytest
import torch

from fastedit.backbone import Site
from fastedit.deltas import DeltaSpec, Rows, full
from fastedit.engine.profiling.dispatches import Dispatches
from fastedit.reference.adam_step_outer import outer_products
from fastedit.testing import assert_close

WAYS = [full._Torch, full._OneDnn, full.Padded()]
NAMES = ["torch", "oneDNN", "padded"]
OFFSETS = ([0, 4, 8, 12], [0, 1, 1, 9], [0, 0, 0, 3], [0, 0, 0, 0])


@pytest.mark.parametrize("way", WAYS, ids=NAMES)
@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
def test_products_equal_the_loop_in_float64(way, offsets):
    if way is full._OneDnn and not torch.backends.mkldnn.is_available():
        pytest.skip("torch has no oneDNN")
    make = torch.Generator().manual_seed(1)
    tokens = offsets[-1]
    matrices = torch.randn(3, 21, 34, generator=make)
    x, y = torch.randn(tokens, 34, generator=make), torch.randn(tokens, 21, generator=make)
    owner = torch.repeat_interleave(torch.arange(3), torch.tensor(offsets).diff())
    wide = matrices.double()[owner]
    assert_close(way.outputs(x, matrices, offsets), torch.einsum("toi,ti->to", wide, x.double()), length=34)
    assert_close(way.inputs(y, matrices, offsets), torch.einsum("toi,to->ti", wide, y.double()), length=21)

    outer = torch.zeros(3, 21, 34, dtype=torch.float64).index_add_(
        0, owner, y.double()[:, :, None] * x.double()[:, None]
    )
    out = torch.full((3, 21, 34), float("nan"))
    way.outer(y, x, offsets, out, add=False)
    assert_close(out, outer, length=9)
    way.outer(y, x, offsets, out, add=True)
    assert_close(out, 2 * outer, length=18)


def test_padded_products_launch_as_much_for_many_edits_as_for_two():
    """And read nothing back; what a layout needs is sent once."""
    counts = []
    for edits in (2, 40):
        sizes = [1 + edit % 5 for edit in range(edits)]
        offsets = [0, *accumulate(sizes)]
        x, y, matrices = torch.randn(offsets[-1], 3), torch.randn(offsets[-1], 2), torch.randn(edits, 2, 3)
        way, out = full.Padded(), torch.zeros(edits, 2, 3)
        way.outputs(x, matrices, offsets)
        with Dispatches() as counted:
            way.outputs(x, matrices, offsets)
            way.inputs(y, matrices, offsets)
            way.outer(y, x, offsets, out, add=False)
        assert not counted.waits
        assert not counted.uploads
        counts.append(counted.count(""))
    assert counts[0] == counts[1]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("way", WAYS, ids=NAMES)
def test_gradients_pass_through_a_delta_that_does_not_learn(way):
    """As through the edits committed earlier, in a sequence."""
    if way is full._OneDnn and not torch.backends.mkldnn.is_available():
        pytest.skip("torch has no oneDNN")
    make = torch.Generator().manual_seed(1)
    spec = DeltaSpec("full", (Site(0, "up", "up", 34, 21),))
    fixed = full.FullDelta(spec, 2, dtype=torch.float32, device="cpu", trainable=False)
    fixed.products = way
    fixed.flat.copy_(torch.randn(fixed.flat.shape, generator=make))
    x = torch.randn(9, 34, generator=make, requires_grad=True)
    up = torch.randn(9, 21, generator=make)
    (grad,) = torch.autograd.grad(fixed.delta(0, x, Rows((1, 2))), x, up)
    matrices = fixed.parts["0.up:delta"].double()[[0] * 3 + [1] * 6]
    assert_close(grad, torch.einsum("toi,to->ti", matrices, up.double()), length=21)


def _learning():
    sites = (Site(0, "up", "up", 34, 21), Site(0, "down", "down", 21, 34))
    return full.FullDelta(DeltaSpec("full", sites), 3, dtype=torch.float64, device="cpu", trainable=True)


def _step(stacked, uses, *, outer):
    """Run one step through the sites ``uses``, in this order; the gradient (B, P) of all parts."""
    make = torch.Generator().manual_seed(2)
    stacked.begin_step(outer=outer)
    loss = 0.0
    for site in uses:
        x = torch.randn(6, stacked.spec.sites[site].d_in, generator=make, dtype=torch.float64)
        change = stacked.delta(site, x, Rows((1, 2, 0)))
        loss = loss + (change * torch.randn(change.shape, generator=make, dtype=torch.float64)).sum()
    loss.backward()
    stacked.end_step()
    factored = stacked.factored()
    if factored is None:
        return stacked.grad.clone()
    dense = zip(factored.grads, factored.inputs, factored.offsets, strict=True)
    return torch.cat([outer_products(y, x, 3, ends).flatten(1) for y, x, ends in dense], 1)


@pytest.mark.parametrize("uses", [(0, 1), (0,), (0, 1, 0), (1, 1), ()], ids=str)
def test_outer_products_are_the_gradient(uses):
    stacked = _learning()
    if not stacked._keeps:
        pytest.skip("adam_step_outer_: only the reference serves it here")
    if not uses:
        stacked.begin_step(outer=True)
        stacked.end_step()
        assert stacked.factored() is None
        assert not stacked.grad.any()
        return
    stacked.grad.fill_(float("nan"))
    goal = _step(stacked, uses, outer=False)
    assert stacked.factored() is None
    stacked.grad.fill_(float("nan"))
    assert torch.allclose(_step(stacked, uses, outer=True), goal, rtol=1e-13, atol=1e-13)
    # a site used twice has a gradient that is added up, and then all are
    assert (stacked.factored() is not None) == (len(set(uses)) == len(uses))


def test_a_gradient_for_whole_rows_adds_up_all():
    stacked = _learning()
    make = torch.Generator().manual_seed(3)
    x = torch.randn(6, 34, generator=make, dtype=torch.float64)

    def gradient(outer):
        stacked.begin_step(outer=outer)
        (stacked.delta(0, x, Rows((1, 2, 0))).sum() + stacked.parameters_as_input().square().sum()).backward()
        stacked.end_step()
        assert stacked.factored() is None
        return stacked.grad.clone()

    stacked.flat.copy_(torch.randn(stacked.flat.shape, generator=make, dtype=torch.float64))
    assert torch.equal(gradient(True), gradient(False))


def test_views_of_a_row_are_its_parts():
    stacked = _learning()
    stacked.flat.copy_(torch.randn(stacked.flat.shape, dtype=torch.float64))
    factored = full.Factored([torch.empty(0, 34), torch.empty(0, 21)], [torch.empty(0, 21), torch.empty(0, 34)], [])
    for view, part in zip(factored.matrices(stacked.flat), stacked.parts.values(), strict=True):
        assert view.data_ptr() == part.data_ptr()
        assert torch.equal(view, part)
