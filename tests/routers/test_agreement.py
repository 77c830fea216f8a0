"""The least agreement keeps the share of foreign questions that any of many stored edits claims where it was set."""

from __future__ import annotations

import math

import pytest
import torch

from fastedit.routers.agreement import DISTANCE, Agreement


def exponential(seed: int, *shape: int, scale: float = 0.1) -> torch.Tensor:
    return scale * torch.empty(*shape, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("stored", [500, 5_000, 50_000])
def test_the_share_of_foreign_questions_stays(stored: int) -> None:
    """Fitted on fewer pairs than one question has with so many edits."""
    found = Agreement.fitted(exponential(0, 40_000), 40_000, torch.ones(9), false_rate=0.05, kept=0.9)
    assert found is not None
    assert found.scale == pytest.approx(0.1, rel=0.2)
    questions = 400
    best = torch.stack([exponential(1 + n, stored).max() for n in range(questions)])
    least = found.level + found.scale * math.log(stored * found.rate / 0.05)
    assert float((best >= least).double().mean()) == pytest.approx(0.05, abs=0.045)
    assert found.least(stored) == min(least, 1.0)


def test_the_least_grows_by_the_logarithm_up_to_the_most() -> None:
    known = Agreement(level=0.1, rate=0.01, scale=0.1, most=0.5, false_rate=0.01)
    assert known.least(1) == pytest.approx(0.1)
    assert known.least(10) - known.least(1) == pytest.approx(0.1 * math.log(10))
    assert known.least(10**9) == 0.5
    assert known.least(0) == known.least(1)
    assert Agreement.from_config({"agreement": known.settings()}) == known
    assert Agreement.from_config({}) is None


def test_so_many_of_the_related_stay() -> None:
    related = torch.linspace(0, 1, 101)
    found = Agreement.fitted(exponential(0, 1000) + 5, 1000, related, false_rate=0.01, kept=0.9)
    assert found is not None
    assert found.most == pytest.approx(0.1)
    assert found.least(10) == found.most


def test_too_few_examples_give_none() -> None:
    for unrelated, related in ((torch.ones(1), torch.ones(3)), (torch.ones(5), torch.ones(0))):
        assert Agreement.fitted(unrelated, 9, related, false_rate=0.01, kept=0.9) is None


def test_the_very_image_agrees_wholly() -> None:
    assert float(Agreement.of(torch.tensor(1.0), torch.tensor(0.0))) == 1
    assert float(Agreement.of(torch.tensor(0.8), torch.tensor(0.4))) == pytest.approx(0.8 - 0.4 * DISTANCE)
