from __future__ import annotations

import pytest
import torch

from fastedit.pocket.factory.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(32, 32), (96, 32), (32, 96)])
def test_steps_are_those_of_torch_but_for_its_rounding(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimisers = (
        Muon([ours], lr=0.01, momentum=0.95, weight_decay=0.02),
        torch.optim.Muon([theirs], lr=0.01, momentum=0.95, weight_decay=0.02),
    )
    for _ in range(4):
        gradient = torch.randn(shape, generator=generator)
        for parameter, optimiser in zip((ours, theirs), optimisers, strict=True):
            parameter.grad = gradient.clone()
            optimiser.step()
    moved = float((ours - start).detach().abs().max())
    assert float((ours - theirs).detach().abs().max()) < 0.05 * moved


def test_singular_values_come_near_one() -> None:
    matrix = torch.randn(24, 40, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonal(matrix))
    assert float(values.min()) > 0.6
    assert float(values.max()) < 1.3
