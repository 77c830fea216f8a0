"""The multiplier: its curve while edits are fitted, its gradients, its calibration."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastedit.objectives import DUALS, InvariantConfig, InvariantObjective, TokenBatch
from fastedit.objectives.multiplier import DualNetwork, DualScalar, Multiplier, multiplier_bytes
from tests.objectives.test_tripartite import make_batch

#: The penalty is on from the first step, said or not, so that its terms are there to be looked at.
FromFirstStep = functools.partial(InvariantConfig, warmup=0.0, backoff=1.0)

ASCENDING = [dual for dual in DUALS if dual != "constant"]


class Fit:
    """Edits whose final hidden states are a linear function of their parameters, stepped by Adam.

    Args:
        seed: of the edits. settings: of the objective.
    """

    def __init__(self, seed: int = 0, **settings: Any) -> None:
        self.batch, self.head = make_batch(3, seed)
        generator = torch.Generator().manual_seed(seed)
        width = self.batch.hidden.shape[1]
        self.maps = torch.randn(self.batch.hidden.shape[0], width, 8, generator=generator, dtype=torch.float64) / 3
        self.hidden = self.batch.hidden.detach()
        start = 0.1 * torch.randn(3, 8, generator=generator, dtype=torch.float64)
        self.flat = start.requires_grad_(True)
        self.adam = torch.optim.Adam([self.flat], lr=0.02)
        self.objective = InvariantObjective(FromFirstStep(**settings), steps=50)
        self.step = 0

    def tokens(self) -> TokenBatch:
        """The batch at the parameters as they are."""
        change = (self.maps @ self.flat.index_select(0, self.batch.edit)[:, :, None]).squeeze(2)
        hidden = self.hidden + change
        return dataclasses.replace(self.batch, hidden=hidden, logits=hidden @ self.head.T, flat=self.flat)

    def run(self, steps: int) -> tuple[Tensor, Tensor]:
        """λ and T (steps, B) by step."""
        multipliers, variations = [], []
        for _ in range(steps):
            self.adam.zero_grad()
            losses = self.objective(self.tokens(), self.step)
            losses.total.sum().backward()  # type: ignore[no-untyped-call]
            self.adam.step()
            self.step += 1
            multipliers.append(losses.parts["lambda"].clone())
            variations.append(losses.parts["tv"].clone())
        return torch.stack(multipliers), torch.stack(variations)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("dual", ["network-detached", "scalar"])
def test_the_multiplier_climbs_while_the_constraint_is_violated(dual: str, seed: int) -> None:
    multipliers, variations = Fit(seed, dual=dual, calibration=1, dual_lr=0.05, max_ratio=100.0).run(30)
    assert (variations > 0).all()
    assert multipliers[-1].min() > 2 * multipliers[0].min()
    climbs = multipliers[1:] > multipliers[:-1]
    # φ moves beneath a network; a number has nothing that could lower it
    assert climbs.all() if dual == "scalar" else climbs.double().mean() > 0.8


@pytest.mark.parametrize("seed", [0, 1])
def test_the_ascent_keeps_pace_with_a_primal_that_lowers_the_multiplier(seed: int) -> None:
    """Without ascent a primal step that differentiates λ wears it down; with it, λ climbs all the same."""

    def ratio(dual: str, rate: float) -> Tensor:
        multipliers, _ = Fit(seed, dual=dual, dual_lr=rate, calibration=1, scale=1.0, max_ratio=100.0).run(30)
        return multipliers[-1] / multipliers[0]

    assert (ratio("network", 0.0) < ratio("network-detached", 0.0)).all()
    climbed = ratio("network", 0.1)
    # What the primal takes is given back: as a number, which nothing lowers, climbs
    torch.testing.assert_close(climbed, ratio("scalar", 0.1), rtol=0.35, atol=0)
    assert (climbed > 5).all()


@pytest.mark.parametrize("dual", DUALS)
def test_a_frozen_multiplier_stays_to_the_bit(dual: str) -> None:
    """Neither the dual step nor φ moves it, and the primal's gradient knows nothing of it."""
    fit = Fit(dual=dual, learn_dual=False, calibration=3)
    multipliers, _ = fit.run(12)
    assert torch.equal(multipliers[3:], multipliers[2].expand(9, -1))
    assert (multipliers[1] != multipliers[2]).all(), "before it is calibrated"
    constant, _ = Fit(dual="constant", calibration=3).run(12)
    assert torch.equal(multipliers, constant)
    learned, _ = Fit(dual=dual, calibration=3).run(12)
    assert torch.equal(learned, constant) == (dual == "constant"), "a switch that does nothing"


@pytest.mark.parametrize("dual", DUALS)
def test_the_primal_gradient_is_that_of_the_definition(dual: str) -> None:
    """∂R + λ ∂T, and T ∂λ where λ is a function of φ that the primal step differentiates (equation (13))."""
    fit = Fit(dual=dual, smoothing=0.0, calibration=2)
    fit.run(4)
    # The state before the step, which moves it first
    tokens = fit.tokens()
    (by_flat,) = torch.autograd.grad(fit.objective(tokens, 4).total.sum(), fit.flat)
    multiplier = fit.objective.multiplier
    plain = InvariantObjective(FromFirstStep(scale=0.0, dual="constant", smoothing=0.0), steps=50)
    again = fit.tokens()
    losses = plain(again, 4)
    variation = plain._variation(_table(again), again)
    ratio = torch.ones(3, dtype=torch.float64)
    if dual == "scalar":
        assert isinstance(multiplier.dual, DualScalar)
        ratio = multiplier.dual.log.exp()
    elif dual != "constant":
        assert isinstance(multiplier.dual, DualNetwork)
        first, bias, second, last = multiplier.dual.tensors
        flat = fit.flat if dual == "network" else fit.flat.detach()
        norm = torch.log(torch.sqrt(flat.square().sum(1, keepdim=True) + 1e-12))
        hidden = torch.relu(torch.cat([flat, norm], 1)[:, None, :] @ first + bias)
        ratio = F.softplus(hidden @ second + last).reshape(3) / multiplier.dual.begun
    assert multiplier.scale is not None
    expected = (losses.total + multiplier.scale * ratio * variation).sum()
    (goal,) = torch.autograd.grad(expected, fit.flat)
    torch.testing.assert_close(by_flat, goal, rtol=1e-9, atol=1e-12)


def _table(tokens: TokenBatch) -> Any:
    from fastedit.objectives import tripartite

    return tripartite(tokens)


@pytest.mark.parametrize("dual", ASCENDING)
def test_an_ascent_step_raises_the_logarithm_by_its_rate(dual: str) -> None:
    """By ``dual_lr`` times T over its running mean, to first order, along the gradient."""
    rate = 1e-4
    fit = Fit(dual=dual, dual_lr=rate)
    fit.run(3)
    multiplier = fit.objective.multiplier
    assert multiplier.dual is not None
    summary = multiplier.dual.read(fit.tokens()).detach()
    before = torch.log(multiplier.dual(summary)).detach()
    reached = multiplier.dual.reached.clone() if isinstance(multiplier.dual, DualNetwork) else before
    losses = fit.objective(fit.tokens(), 3)
    assert multiplier.mean_variation is not None
    pace = rate * losses.parts["tv"] / multiplier.mean_variation
    if isinstance(multiplier.dual, DualNetwork):
        torch.testing.assert_close(multiplier.dual.reached, torch.maximum(reached, before) + pace, rtol=1e-12, atol=0)
        pace = multiplier.dual.reached - before
    # What the primal has taken may be much more than the rate: to first order is to the square of the step
    risen, error = torch.log(multiplier.dual(summary)).detach() - before, float(pace.max()) ** 2
    torch.testing.assert_close(risen, pace, rtol=1e-3, atol=error)


def test_calibration_is_by_running_means() -> None:
    """A step at which |Γ| crosses zero does not make λ enormous, and behind the calibration nothing moves it."""
    multiplier = Multiplier(FromFirstStep(dual="constant", scale=0.1, calibration=4), start=2)
    tokens, _ = make_batch(1)
    risks, variations = [9.0, 8.0, 6.0, 4.0, 2.0, 1.0, 0.5, 0.2], [40.0, 30.0, 20.0, 10.0, 1e-9, 4.0, 3.0, 2.0]
    found = []
    for step, (risk, variation) in enumerate(zip(risks, variations, strict=True)):
        values = (torch.tensor([number], dtype=torch.float64) for number in (risk, variation))
        said = torch.tensor([True])
        found.append(float(multiplier(tokens, *values, said, torch.tensor([step]), frozenset([step]))))
    means = [(sum(risks[2 : end + 1]), sum(variations[2 : end + 1])) for end in range(2, 6)]
    assert found[2:6] == pytest.approx([0.1 * risk / variation for risk, variation in means], rel=1e-12)
    assert found[6] == found[7] == found[5]
    assert max(found[2:]) / min(found[2:]) < 2


def test_lambda_waits_for_the_target_and_backs_off_where_it_is_lost() -> None:
    """Two edits, the second a step behind; the first's slot is given to a fresh edit at the end."""
    multiplier = Multiplier(InvariantConfig(dual="constant", scale=0.5, calibration=1, backoff=0.25), start=1)
    tokens, _ = make_batch(1)
    one = torch.ones(2, dtype=torch.float64)
    steps = [(0, 0), (1, 0), (2, 1), (3, 2), (4, 3), (5, 4), (0, 5), (1, 6)]
    said = [(1, 1), (0, 0), (1, 0), (0, 0), (0, 1), (1, 1), (0, 0), (1, 1)]
    found = []
    for taken, now in zip(steps, said, strict=True):
        state = torch.tensor(now, dtype=torch.bool), torch.tensor(taken)
        found.append(multiplier(tokens, one, one, *state, frozenset(taken)).tolist())
    assert [first for first, _ in found[1:6]] == [0.0, 0.5, 0.125, 0.03125, 0.03125]
    assert found[7] == [0.5, 0.125]
    assert [second for _, second in found[2:7]] == [0.0, 0.0, 0.5, 0.5, 0.125]


def test_a_long_calibration_keeps_the_share_of_the_risk() -> None:
    fit = Fit(dual="constant", scale=0.3, calibration=1000)
    shares = []
    for _ in range(30):
        multipliers, variations = fit.run(1)
        multiplier = fit.objective.multiplier
        assert multiplier.mean_risk is not None
        assert multiplier.mean_variation is not None
        shares.append(multipliers[0] * multiplier.mean_variation / multiplier.mean_risk)
        assert (variations > 0).all()
    torch.testing.assert_close(torch.stack(shares), torch.full((30, 3), 0.3, dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("dual", ASCENDING)
def test_a_capped_ratio_is_not_wound_up(dual: str) -> None:
    fit = Fit(dual=dual, max_ratio=1.2, dual_lr=0.1, calibration=1)
    multipliers, _ = fit.run(20)
    multiplier = fit.objective.multiplier
    assert multiplier.scale is not None
    assert multiplier.dual is not None
    assert (multipliers <= 1.2 * multiplier.scale * (1 + 1e-12)).all()
    if dual != "network":
        assert (multiplier.dual(multiplier.dual.read(fit.tokens())) < 1.6).all()


def test_sketch_keeps_inner_products_on_average() -> None:
    flat = torch.randn(1, 5000, dtype=torch.float64)
    norms = []
    for seed in range(40):
        network = DualNetwork(flat, FromFirstStep(sketch=64, seed=seed))
        norms.append(network.summary(flat)[0, :-1].square().sum())
    assert torch.stack(norms).mean() / flat.square().sum() == pytest.approx(1.0, abs=0.1)


def test_edits_have_multipliers_of_their_own() -> None:
    flat = torch.randn(2, 10, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    network = DualNetwork(flat, FromFirstStep())
    summary = network.summary(flat)
    before = network(summary)
    network.ascend(summary, torch.tensor([0.1, 0.0], dtype=torch.float64), 10.0)
    after = network(summary)
    assert after[0] > before[0]
    assert after[1] == before[1]


def test_a_network_needs_the_parameters_and_a_number_does_not() -> None:
    tokens, _ = make_batch()
    tokens.flat = None
    with pytest.raises(ValueError, match=r"odedit: .*\(got flat=None\)"):
        InvariantObjective(FromFirstStep(dual="network"), 4)(tokens, 0)
    for dual in ("scalar", "constant"):
        losses = InvariantObjective(FromFirstStep(dual=dual), 4)(tokens, 0)
        assert losses.total.isfinite().all()


def test_bytes_are_those_of_what_is_there() -> None:
    networks = multiplier_bytes(FromFirstStep(dual="network"), 10_000, 8, 4, 1000)
    assert networks > 8 * 4096 * 32 * 4
    for config in (FromFirstStep(dual="scalar"), FromFirstStep(learn_dual=False)):
        assert multiplier_bytes(config, 10_000, 8, 4, 1000) < networks / 1000


def test_ratios_begin_at_one() -> None:
    for dual in ASCENDING:
        fit = Fit(dual=dual)
        multipliers, variations = fit.run(1)
        multiplier = fit.objective.multiplier
        assert multiplier.mean_risk is not None
        torch.testing.assert_close(multipliers[0], 0.1 * multiplier.mean_risk / variations[0], rtol=1e-12, atol=0)
        assert math.isfinite(float(multipliers.sum()))
