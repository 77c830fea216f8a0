"""Convolutions over whole patches as products."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastedit.backbone import load
from fastedit.backbone.cpu_linear import torch_products
from fastedit.backbone.patches import PatchProduct, use_products


@pytest.mark.parametrize("bias", [True, False])
def test_patches_are_multiplied(bias: bool) -> None:
    module = nn.Conv3d(3, 5, (2, 4, 4), (2, 4, 4), bias=bias, dtype=torch.float64)
    volumes = torch.randn(7, 3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    expected = module(volumes)
    goals = torch.autograd.grad(expected.square().sum(), [volumes, *module.parameters()])
    assert use_products(nn.Sequential(module)) == 1
    found = module(volumes)
    assert found.shape == (7, 5, 1, 1, 1)
    assert torch.allclose(found, expected, rtol=0, atol=1e-13)
    grads = torch.autograd.grad(found.square().sum(), [volumes, *module.parameters()])
    assert all(torch.allclose(one, other, rtol=0, atol=1e-12) for one, other in zip(grads, goals, strict=True))


def test_larger_volumes_are_convolved() -> None:
    module = nn.Conv3d(3, 5, (2, 4, 4), (2, 4, 4))
    volumes = torch.randn(2, 3, 4, 8, 12)
    expected = module(volumes)
    use_products(nn.Sequential(module))
    assert torch.equal(module(volumes), expected)


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv3d(3, 4, 2, 1),
        nn.Conv3d(4, 4, 2, 2, groups=2),
        nn.Conv3d(3, 4, 2, 2, padding=1),
        nn.Conv3d(3, 4, 2, 2, dilation=2),
        nn.Conv3d(3, 4, 2, 2, padding="valid"),
        nn.Conv2d(3, 4, 2, 2),
    ],
    ids=["overlap", "groups", "padding", "dilation", "padding by name", "images"],
)
def test_other_convolutions_stay(module: nn.Module) -> None:
    kind = type(module)
    assert use_products(nn.Sequential(module)) == 0
    assert type(module) is kind


@pytest.mark.parametrize(("linear", "count"), [("auto", 1), ("torch", 0)])
def test_a_tower_that_is_handed_patches_has_one(linear: str, count: int) -> None:
    model = load("random:qwen2vl-tiny", linear=linear)

    def patches() -> int:
        return sum(type(module) is PatchProduct for module in model.hf.modules())

    assert patches() == count
    with torch_products(model.hf):
        assert patches() == 0
    assert patches() == count
