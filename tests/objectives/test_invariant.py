"""The penalty, its modes and the primal-dual multiplier."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from fastedit.objectives import PENALTY_MODES, InvariantConfig, InvariantObjective, Role, tripartite
from fastedit.objectives.invariant import DualNetwork
from tests.objectives.test_tripartite import make_batch


def with_flat(batch: object, width: int = 10, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(batch.n_edits, width, generator=generator, dtype=torch.float64, requires_grad=True)  # type: ignore[attr-defined]
    batch.flat = flat  # type: ignore[attr-defined]
    return flat


def penalty_by_hand(batch: object, mode: str) -> Tensor:
    """T (B,) from the table, written out per edit without smoothing."""
    table = tripartite(batch, per_token=mode == "token")  # type: ignore[arg-type]
    values = []
    for b in range(batch.n_edits):  # type: ignore[attr-defined]
        gamma = table.env_grad[b]
        if mode == "prompt_env":
            values.append(gamma.abs().mean() ** 2)
        elif mode == "risk_env":
            values.append((gamma[0].abs() + gamma[3:5].mean().abs() + gamma[5].abs()) ** 2)
        elif mode == "paper":
            values.append((gamma[0] + gamma[3:5].mean() + gamma[5]) ** 2)
        else:
            assert table.token_grad is not None
            values.append(table.token_grad[batch.edit == b].abs().mean() ** 2)  # type: ignore[attr-defined]
    return torch.stack(values)


@pytest.mark.parametrize("mode", PENALTY_MODES)
def test_total_is_risk_plus_multiplier_times_variation(mode: str) -> None:
    batch, _ = make_batch()
    with_flat(batch)
    objective = InvariantObjective(InvariantConfig(penalty=mode, smoothing=0.0, warmup=0.0), steps=10)
    losses = objective(batch, 0)
    expected = penalty_by_hand(batch, mode)
    torch.testing.assert_close(losses.parts["tv"], expected.detach())
    table = tripartite(batch)
    fitted = table.value[:, :3].mean(1) if mode in ("prompt_env", "token") else table.value[:, 0]
    risk = fitted + table.value[:, 3:5].mean(1) + table.value[:, 5]
    torch.testing.assert_close(losses.total, risk + losses.parts["lambda"] * expected)
    # Calibration: when it is switched on the penalty is ``scale`` times the risk, up to the network's start
    share = losses.parts["lambda"] * expected / risk
    assert ((share > 0.02) & (share < 0.5)).all(), share


def test_penalty_is_off_during_the_warmup() -> None:
    batch, _ = make_batch()
    with_flat(batch)
    objective = InvariantObjective(InvariantConfig(warmup=0.5), steps=4)
    assert "tv" not in objective(batch, 1).parts
    assert "tv" in objective(batch, 2).parts


def test_the_multiplier_is_differentiated_by_the_parameters() -> None:
    batch, _ = make_batch()
    flat = with_flat(batch)
    objective = InvariantObjective(InvariantConfig(warmup=0.0), steps=4)
    losses = objective(batch, 0)
    (gradient,) = torch.autograd.grad(losses.total.sum(), flat)
    assert gradient.abs().max() > 0


def test_dual_steps_raise_the_multiplier_and_a_frozen_one_stays() -> None:
    def after(learn: bool) -> Tensor:
        batch, _ = make_batch()
        with_flat(batch)
        objective = InvariantObjective(InvariantConfig(warmup=0.0, learn_dual=learn, dual_lr=0.05), steps=10)
        first = objective(batch, 0).parts["lambda"]
        for step in range(1, 6):
            last = objective(batch, step).parts["lambda"]
        return last - first

    assert (after(True) > 0).all()
    assert (after(False) == 0).all()


def test_the_multiplier_is_capped() -> None:
    batch, _ = make_batch()
    with_flat(batch)
    objective = InvariantObjective(InvariantConfig(warmup=0.0, max_ratio=0.1), steps=10)
    losses = objective(batch, 0)
    assert objective.scale is not None
    torch.testing.assert_close(losses.parts["lambda"], 0.1 * objective.scale)


def test_smoothing_keeps_a_zero_locality_gradient_from_pushing() -> None:
    batch, _ = make_batch()
    batch.reference = batch.logits.detach()[batch.role >= int(Role.TEXT_LOCALITY)]
    with_flat(batch)
    config = InvariantConfig(warmup=0.0, weights=(0.0, 0.0, 0.0), scale=0.1, learn_dual=False)
    objective = InvariantObjective(config, steps=4)
    objective.scale = torch.ones(2, dtype=torch.float64)
    objective.dual = DualNetwork(batch.flat, objective.config)  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(objective(batch, 1).total.sum(), batch.hidden)
    out = batch.role >= int(Role.TEXT_LOCALITY)
    assert gradient[~out].abs().max() > 1e-4
    assert gradient[out].abs().max() < 1e-10


def test_sketch_keeps_inner_products_on_average() -> None:
    flat = torch.randn(1, 5000, dtype=torch.float64)
    norms = []
    for seed in range(40):
        network = DualNetwork(flat, InvariantConfig(sketch=64, seed=seed))
        norms.append(network.summary(flat)[0, :-1].square().sum())
    assert torch.stack(norms).mean() / flat.square().sum() == pytest.approx(1.0, abs=0.1)


def test_edits_have_multipliers_of_their_own() -> None:
    batch, _ = make_batch(2)
    flat = with_flat(batch)
    network = DualNetwork(flat, InvariantConfig())
    before = network(network.summary(flat.detach()))
    network.ascend(network.summary(flat.detach()), torch.tensor([1.0, 0.0], dtype=torch.float64), 0.1, 1)
    after = network(network.summary(flat.detach()))
    assert after[0] > before[0]
    assert after[1] == before[1]


@pytest.mark.parametrize(
    ("field", "value"),
    [("penalty", "papr"), ("direction", "kl"), ("warmup", 1.5), ("smoothing", -1.0), ("weights", (1.0, 1.0))],
)
def test_bad_settings_are_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"odedit: .*\(got {field}="):
        dataclasses.replace(InvariantConfig(), **{field: value})
