"""Products of a full delta: edit by edit through oneDNN, or by torch; the same numbers in every ragged layout."""

import pytest
import torch

from fastedit.backbone import Site
from fastedit.deltas import DeltaSpec, Rows, full
from fastedit.testing import assert_close

WAYS = [full._Torch, full._OneDnn]
OFFSETS = ([0, 4, 8, 12], [0, 1, 1, 9], [0, 0, 0, 3], [0, 0, 0, 0])


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
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


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
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
