"""Attention in 16 bits on the CPU: float32 inside where a gradient is to come, as it is elsewhere."""

import pytest
import torch

from fastedit.backbone import cpu_attention
from fastedit.testing import assert_close

SDPA = torch.nn.functional.scaled_dot_product_attention


def _drawn(dtype, *, queries=3, learns=True):
    make = torch.Generator().manual_seed(0)
    shapes = ((2, 4, queries, 8), (2, 4, 9, 8), (2, 4, 9, 8))
    return [torch.randn(shape, generator=make).to(dtype).requires_grad_(learns) for shape in shapes]


@pytest.fixture
def dtypes_inside(monkeypatch):
    seen = []

    def noted(query, *others, **settings):
        seen.append(query.dtype)
        return SDPA(query, *others, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    return seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("settings", [{"is_causal": True}, {"attn_mask": True, "scale": 0.3}], ids=str)
def test_values_and_gradients_are_those_of_float64_rounded_once(dtype, settings, dtypes_inside):
    settings = dict(settings)
    if "attn_mask" in settings:
        settings["attn_mask"] = torch.ones(2, 1, 3, 9, dtype=torch.bool).tril(4)
    tensors = _drawn(dtype)
    mixed = cpu_attention.attention(*tensors, **settings)
    up = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = torch.autograd.grad(mixed, tensors, up)
    assert dtypes_inside == [torch.float32]
    assert mixed.dtype == dtype
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    goal = SDPA(*wide, **settings)
    # one rounding: shorter than what sums in 16 bits show
    assert_close(mixed, goal, length=1)
    for one, other in zip(gradients, torch.autograd.grad(goal, wide, up.double()), strict=True):
        assert one.dtype == dtype
        assert_close(one, other, length=1)


def test_everything_else_is_torchs_own(dtypes_inside):
    learning, constant = _drawn(torch.bfloat16), _drawn(torch.bfloat16, learns=False)
    with torch.no_grad():
        assert torch.equal(cpu_attention.attention(*learning), SDPA(*learning))
    assert torch.equal(cpu_attention.attention(*constant), SDPA(*constant))
    for dtype in (torch.float32, torch.float64):
        cpu_attention.attention(*_drawn(dtype))
    cpu_attention.attention(*(tensor.detach().to("meta").requires_grad_() for tensor in learning))
    assert dtypes_inside == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float64, torch.bfloat16]
