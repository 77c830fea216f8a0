"""The op workspace: memory of dropped buffers serves later ones, and never two at once."""

import pytest
import torch

from fastedit import ops
from fastedit.testing import providers

SHAPES = ((3, 5), (0,), (0, 7), (), (1, 1), (1000, 3001))


@pytest.mark.parametrize("provider", providers("workspace"), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64], ids=str)
def test_shape_dtype_and_layout(provider, dtype, available):
    available(provider)
    # of the model only dtype and device are taken
    like = torch.zeros(4, 6, dtype=dtype, device=provider.device).T
    for shape in SHAPES:
        made = provider.function()(like, list(shape))
        assert made.shape == shape
        assert made.dtype == dtype
        assert made.device == like.device
        assert made.is_contiguous()
        assert made.fill_(1).sum() == made.numel()


def test_two_living_buffers_are_apart():
    like = torch.zeros(0)
    first, second = ops.workspace(like, (2000, 1500)).fill_(1), ops.workspace(like, (2000, 1500)).fill_(2)
    assert bool((first == 1).all())
    assert bool((second == 2).all())


def test_fake_tensors_have_the_same_shape():
    torch.library.opcheck(
        torch.ops.fastedit.workspace.default,
        (torch.zeros(2), [3, 4]),
        # contents are undefined: only schema and shapes can be checked
        test_utils=("test_schema", "test_faketensor"),
    )


def test_negative_sizes_are_refused():
    with pytest.raises(ValueError, match=r"workspace: sizes are not negative \(got size=\(2, -1\)\)"):
        ops.workspace(torch.zeros(0), (2, -1))


def test_release_returns_bytes():
    ops.release_workspaces()
    buffer = ops.workspace(torch.zeros(0), (4 << 20,))
    del buffer
    served = ops.implementations()["workspace"]["cpu"]
    assert ops.release_workspaces() == (16 << 20 if served == "csrc" else 0)
