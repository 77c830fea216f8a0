"""The penalty, its modes and the primal-dual multiplier."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from torch import Tensor

from fastedit.objectives import PENALTY_MODES, InvariantConfig, InvariantObjective, Role, TokenBatch, tripartite
from tests.objectives.test_tripartite import make_batch

#: The penalty is on from the first step, said or not, so that its terms are there to be looked at.
FromFirstStep = functools.partial(InvariantConfig, warmup=0.0, backoff=1.0)


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
    config = FromFirstStep(penalty=mode, smoothing=0.0, warmup=0.0, weights=(1.5, 0.5, 0.25))
    losses = InvariantObjective(config, steps=10)(batch, 0)
    expected = penalty_by_hand(batch, mode)
    torch.testing.assert_close(losses.parts["tv"], expected.detach())
    table = tripartite(batch)
    fitted = table.value[:, :3].mean(1) if mode in ("prompt_env", "token") else table.value[:, 0]
    risk = 1.5 * fitted + 0.5 * table.value[:, 3:5].mean(1) + 0.25 * table.value[:, 5]
    torch.testing.assert_close(losses.total, risk + losses.parts["lambda"] * expected)
    # Calibration: when it is switched on the penalty is ``scale`` times the risk, up to the network's start
    share = losses.parts["lambda"] * expected / risk
    assert ((share > 0.02) & (share < 0.5)).all(), share


def test_generality_weighs_a_hundredth_by_default() -> None:
    batch, _ = make_batch()
    with_flat(batch)
    whole, default = (
        InvariantObjective(config, steps=4)(batch, 0).total
        for config in (FromFirstStep(scale=0.0, weights=(1.0, 1.0, 1.0)), FromFirstStep(scale=0.0))
    )
    torch.testing.assert_close(whole - default, 0.99 * tripartite(batch).value[:, 5])


def test_penalty_is_off_during_the_warmup() -> None:
    batch, _ = make_batch()
    with_flat(batch)
    objective = InvariantObjective(FromFirstStep(warmup=0.5), steps=4)
    assert "tv" not in objective(batch, 1).parts
    assert "tv" in objective(batch, 2).parts


def test_the_multiplier_is_differentiated_by_the_parameters() -> None:
    batch, _ = make_batch()
    flat = with_flat(batch)
    objective = InvariantObjective(FromFirstStep(dual="network"), steps=4)
    losses = objective(batch, 0)
    (gradient,) = torch.autograd.grad(losses.total.sum(), flat)
    assert gradient.abs().max() > 0


def test_dual_steps_raise_the_multiplier_and_a_frozen_one_stays() -> None:
    def after(learn: bool) -> Tensor:
        batch, _ = make_batch()
        with_flat(batch)
        objective = InvariantObjective(
            FromFirstStep(dual="network", learn_dual=learn, dual_lr=0.05, calibration=1), steps=10
        )
        first = objective(batch, 0).parts["lambda"]
        for step in range(1, 6):
            last = objective(batch, step).parts["lambda"]
        return last - first

    assert (after(True) > 0).all()
    assert (after(False) == 0).all()


def test_the_multiplier_is_capped() -> None:
    batch, _ = make_batch()
    with_flat(batch)
    objective = InvariantObjective(FromFirstStep(dual="network", max_ratio=0.1), steps=10)
    losses = objective(batch, 0)
    assert objective.multiplier.scale is not None
    torch.testing.assert_close(losses.parts["lambda"], 0.1 * objective.multiplier.scale)


def test_smoothing_keeps_a_zero_locality_gradient_from_pushing() -> None:
    batch, _ = make_batch()
    batch.reference = batch.logits.detach()[batch.role >= int(Role.TEXT_LOCALITY)]
    with_flat(batch)
    config = FromFirstStep(weights=(0.0, 0.0, 0.0), scale=0.1, learn_dual=False, calibration=1)
    objective = InvariantObjective(config, steps=4)
    multiplier = objective.multiplier
    multiplier.scale, multiplier.mean_risk, multiplier.mean_variation = torch.ones(3, 2, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(objective(batch, 1).total.sum(), batch.hidden)
    out = batch.role >= int(Role.TEXT_LOCALITY)
    assert gradient[~out].abs().max() > 1e-4
    assert gradient[out].abs().max() < 1e-10


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("penalty", "papr"),
        ("dual", "netwrk"),
        ("n_views", 0),
        ("calibration", 0),
        ("direction", "kl"),
        ("warmup", 1.5),
        ("backoff", 1.5),
        ("smoothing", -1.0),
        ("weights", (1.0, 1.0)),
    ],
)
def test_bad_settings_are_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"odedit: .*\(got {field}="):
        dataclasses.replace(FromFirstStep(), **{field: value})


def batches_by_edit(n_edits: int, seed: int) -> tuple[TokenBatch, list[TokenBatch]]:
    """A batch of several edits, and each of them as a batch of its own."""
    whole, _ = make_batch(n_edits, seed)
    assert whole.reference is not None
    out = whole.role >= int(Role.TEXT_LOCALITY)
    singles = []
    for number in range(n_edits):
        own = whole.edit == number
        single = TokenBatch(
            hidden=whole.hidden[own], logits=whole.logits[own], labels=whole.labels[own],
            edit=torch.zeros_like(whole.edit[own]), role=whole.role[own], n_edits=1,
            reference=whole.reference[own[out]],
        )  # fmt: skip
        singles.append(single)
    return whole, singles


def gradients(total: Tensor, flat: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """By the parameters, which nothing depends on before the penalty, and by the hidden states."""
    by_flat, by_hidden = torch.autograd.grad(total.sum(), (flat, hidden), allow_unused=True, retain_graph=True)
    return torch.zeros_like(flat) if by_flat is None else by_flat, by_hidden


@pytest.mark.parametrize("mode", PENALTY_MODES)
@pytest.mark.parametrize("warmup", [0.0, 0.3, 1.0])
def test_edits_at_steps_of_their_own_are_as_they_are_alone(mode: str, warmup: float) -> None:
    """Places are taken over: the edits of one call are before, at and behind the start of the penalty."""
    config = FromFirstStep(penalty=mode, warmup=warmup, dual="network", dual_lr=0.05, sketch=7)
    together = InvariantObjective(config, steps=10)
    # By place the calls at which another edit enters
    entered = [(0,), (0, 3, 9), (0, 5), (0, 7)]
    alone: dict[int, InvariantObjective] = {}
    ratios = set()
    for call in range(14):
        taken = [call - max(start for start in starts if start <= call) for starts in entered]
        whole, singles = batches_by_edit(len(entered), seed=call)
        flat = with_flat(whole, seed=call)
        losses = together(whole, torch.tensor(taken))
        by_flat, by_hidden = gradients(losses.total, flat, whole.hidden)
        for place, (single, step) in enumerate(zip(singles, taken, strict=True)):
            if step == 0:
                alone[place] = InvariantObjective(config, steps=10)
            single.flat = flat.detach()[place : place + 1].requires_grad_(True)
            expected = alone[place](single, step)
            started = step >= alone[place].start
            assert started == ("lambda" in expected.parts)
            torch.testing.assert_close(losses.total[place], expected.total[0], rtol=1e-12, atol=0)
            torch.testing.assert_close(losses.nll[place], expected.nll[0], rtol=1e-12, atol=0)
            for name, value in expected.parts.items():
                torch.testing.assert_close(losses.parts[name][place], value[0], rtol=1e-11, atol=1e-15)
            if not started:
                assert "lambda" not in losses.parts or losses.parts["lambda"][place] == 0
            own_flat, own_hidden = gradients(expected.total, single.flat, whole.hidden)
            torch.testing.assert_close(by_flat[place], own_flat[0], rtol=1e-10, atol=1e-13)
            own = whole.edit == place
            torch.testing.assert_close(by_hidden[own], own_hidden[own], rtol=1e-10, atol=1e-13)
            if started:
                assert alone[place].multiplier.scale is not None
                ratios.add(round(float(expected.parts["lambda"] / alone[place].multiplier.scale), 6))  # type: ignore[operator]
    assert len(ratios) > 1, "multipliers differ by edit and step"


def test_a_number_of_steps_is_the_same_for_every_edit() -> None:
    objectives = [
        InvariantObjective(FromFirstStep(warmup=0.2, dual="network", dual_lr=0.05), steps=10) for _ in range(2)
    ]
    for step in range(6):
        batch, _ = make_batch(3, seed=step)
        with_flat(batch, seed=step)
        one, other = (
            each(batch, steps) for each, steps in zip(objectives, (step, torch.full((3,), step)), strict=True)
        )
        assert torch.equal(one.total, other.total)
        assert one.parts.keys() == other.parts.keys()


def test_an_edit_that_broke_leaves_the_others_and_its_place_alone() -> None:
    """Its losses are nobody's concern, but the next edit in its place starts from a network without NaN."""
    config = FromFirstStep(dual="network", dual_lr=0.05)
    objective, fresh = (InvariantObjective(config, steps=10) for _ in range(2))
    for step in range(4):
        whole, singles = batches_by_edit(2, seed=step)
        flat = with_flat(whole, seed=step)
        if step == 2:
            spoiled = torch.where((whole.edit == 1)[:, None], float("nan"), whole.logits)
            whole = dataclasses.replace(whole, logits=spoiled)
        losses = objective(whole, torch.tensor([step, 0 if step == 3 else step]))
        singles[0].flat, singles[1].flat = flat[:1], flat[1:]
        torch.testing.assert_close(losses.total[0], fresh(singles[0], step).total[0], rtol=1e-12, atol=0)
        assert bool(losses.total[1].isfinite()) == (step != 2)
    newcomer = InvariantObjective(config, steps=10)(singles[1], 0)
    torch.testing.assert_close(losses.total[1], newcomer.total[0], rtol=1e-12, atol=0)
