"""Extra neurons: what they add, their gradients by edit, their own losses, how they are joined."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fastedit.backbone import Site
from fastedit.deltas import DeltaSpec, Rows, accumulate, stack
from fastedit.deltas.key_value import neuron_losses
from fastedit.deltas.kinds import new_stack

D = 5
SITES = (Site(0, "down", "down", 9, D), Site(2, "down", "down", 9, D))
OWN = {"switches": True, "activation_weight": 2.0, "memory_weight": 5.0, "margin": 3.0, "most": 4}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"n": 3, "activation": "relu"},
    "gated": {"n": 3, "activation": "silu", "gate": True},
    "steered": {"n": 2, "activation": "gelu", "steering": 0.7},
    "patches": {"n": 3, "activation": "silu", "gate": True, **OWN},
}


@pytest.fixture(params=OPTIONS.values(), ids=OPTIONS.keys())
def spec(request: pytest.FixtureRequest) -> DeltaSpec:
    return DeltaSpec("key_value", SITES, request.param)


def filled(spec: DeltaSpec, size: int = 3, seed: int = 0) -> Any:
    stacked = new_stack(spec, size, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    stacked.flat.copy_(torch.randn(stacked.flat.shape, generator=generator, dtype=torch.float64))
    for name, tensor in stacked.fixed.items():
        drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        tensor.copy_((drawn > 0.3).double() if name.endswith("off") else drawn)
    return stacked


def neuron(
    spec: DeltaSpec, parts: dict[str, Tensor], fixed: dict[str, Tensor], site: Site, b: int, x: Tensor
) -> Tensor:
    """What edit b adds at a site for one token, written out."""
    place, options = f"{site.layer}.{site.name}:", spec.options
    act = {"relu": functional.relu, "gelu": functional.gelu, "silu": functional.silu}[options["activation"]]
    out = x @ parts[place + "keys"][b] + parts[place + "bias"][b]
    if options.get("gate"):
        out = act(x @ parts[place + "gate_keys"][b] + parts[place + "gate_bias"][b]) * out
    else:
        out = act(out)
    total = torch.zeros(D, dtype=x.dtype)
    for i in range(options["n"]):
        value = parts[place + "values"][b, i]
        if "steering" in options:
            value = value + options["steering"] * parts[place + "steer"][b] * fixed[place + "direction"][b]
        if not (options.get("switches") and fixed[place + "off"][b, i] == 1):
            total = total + out[i] * value
    return total


@pytest.mark.parametrize("counts", [(2, 2, 2), (1, 3, 0), (0, 0, 4)])
def test_each_row_gets_the_neurons_of_its_own_edit(spec: DeltaSpec, counts: tuple[int, ...]) -> None:
    stacked = filled(spec)
    owner = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    for number, site in enumerate(SITES):
        x = torch.randn(sum(counts), D, dtype=torch.float64)
        wanted = [neuron(spec, stacked.parts, stacked.fixed, site, int(b), t) for b, t in zip(owner, x, strict=True)]
        torch.testing.assert_close(stacked.delta(number, x, Rows(counts)), torch.stack(wanted))


def test_gradients_equal_autograds_own(spec: DeltaSpec) -> None:
    counts = (1, 3, 2)
    stacked = filled(spec)
    owner = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    x = torch.randn(6, D, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, D, dtype=torch.float64)
    stacked.grad.fill_(float("nan"))
    stacked.begin_step()
    (weight * stacked.delta(1, stacked.delta(0, x, Rows(counts)).tanh(), Rows(counts))).sum().backward()
    stacked.end_step()

    parts = {name: part.clone().requires_grad_() for name, part in stacked.parts.items()}
    x2 = x.detach().clone().requires_grad_()
    middle = [neuron(spec, parts, stacked.fixed, SITES[0], int(b), t).tanh() for b, t in zip(owner, x2, strict=True)]
    made = [neuron(spec, parts, stacked.fixed, SITES[1], int(b), t) for b, t in zip(owner, middle, strict=True)]
    (weight * torch.stack(made)).sum().backward()
    for name, part in parts.items():
        assert part.grad is not None
        torch.testing.assert_close(stacked.part_grads[name], part.grad, msg=name)
    torch.testing.assert_close(x.grad, x2.grad)


def test_a_fresh_delta_changes_nothing_and_can_be_fitted(spec: DeltaSpec) -> None:
    stacked = new_stack(spec, 2, dtype=torch.float64)
    for tensor in (stacked.fixed.get(f"{site.layer}.down:direction") for site in SITES):
        if tensor is not None:
            tensor.normal_()
    x = torch.randn(40, D, dtype=torch.float64)
    rows = Rows((20, 20))
    stacked.begin_step()
    change = stacked.delta(0, x, rows)
    assert change.abs().max() == 0
    (change * torch.randn_like(change)).sum().backward()
    stacked.end_step()
    assert stacked.part_grads["0.down:values"].abs().amin(2).max() > 0
    stacked.flat.normal_()
    stacked.restart([1])
    assert stacked.delta(0, x, rows)[20:].abs().max() == 0
    assert stacked.delta(0, x, rows)[:20].abs().max() > 0


def test_edits_start_from_the_same_keys_of_a_seed() -> None:
    first, other = (
        new_stack(DeltaSpec("key_value", SITES, {"n": 3, "gate": True, "activation": "silu", "seed": seed}), 2)
        for seed in (0, 1)
    )
    keys = first.parts["0.down:keys"]
    assert torch.equal(keys[0], keys[1])
    assert not torch.equal(keys, other.parts["0.down:keys"])
    assert not torch.equal(keys, first.parts["0.down:gate_keys"])
    assert keys.abs().max() <= D**-0.5


def test_deltas_in_sequence_act_together(spec: DeltaSpec) -> None:
    stacked = filled(spec)
    singles = [stacked.unstack(b, request_id=str(b)) for b in range(3)]
    # Twice: what is accumulated takes up further edits
    together = accumulate([accumulate(singles[:2]), singles[2]])
    assert together.spec.options["n"] == 3 * spec.options["n"]
    assert together.request_id == "0+1+2"
    acting = stack([together])
    x = torch.randn(4, D, dtype=torch.float64)
    for number, site in enumerate(SITES):
        wanted = [sum(neuron(spec, stacked.parts, stacked.fixed, site, b, t) for b in range(3)) for t in x]
        torch.testing.assert_close(acting.delta(number, x, Rows()), torch.stack(wanted))


def test_deltas_with_different_numbers_of_neurons_stack(spec: DeltaSpec) -> None:
    stacked = filled(spec)
    singles = [stacked.unstack(b) for b in range(3)]
    pair = accumulate(singles[:2])
    both = stack([pair, singles[2]])
    x = torch.randn(4, D, dtype=torch.float64)
    for number in range(2):
        apart = torch.cat([stack([d]).delta(number, t, Rows()) for d, t in zip([pair, singles[2]], x.split(2))])
        torch.testing.assert_close(both.delta(number, x, Rows((2, 2))), apart)
    # Deltas of one spec keep what they are made of
    assert torch.equal(stack(singles).flat, stacked.flat)


def plain_losses(spec: DeltaSpec, stacked: Any, b: int, memory: Tensor, foreign: Tensor) -> Tensor:
    """The two losses of an edit at the first site, neuron by neuron."""
    gate = "gate_" if spec.options.get("gate") else ""
    on = [i for i in range(spec.options["n"]) if stacked.fixed["0.down:off"][b, i] == 0]
    keys, bias = stacked.parts[f"0.down:{gate}keys"][b], stacked.parts[f"0.down:{gate}bias"][b]
    if not on:
        return torch.zeros((), dtype=torch.float64)
    own = {i: stacked.tokens["0.down:tokens"][b, i] @ keys[:, i] + bias[i] for i in on}
    activation = torch.stack([torch.exp(-s) for s in own.values()]).sort(descending=True).values[:5].mean()
    near = [torch.exp(m @ keys[:, i] + bias[i] - own[i] + 3.0) for i in on for m in memory[foreign]]
    large = [torch.exp(m @ keys[:, i] + bias[i] + 3.0) for i in on for m in memory[foreign]]
    most = [torch.stack(each).sort(descending=True).values[:4].mean() for each in (near, large)]
    return 2.0 * activation + 5.0 * (most[0] + most[1])


def test_own_losses_are_those_of_the_paper() -> None:
    spec = DeltaSpec("key_value", SITES[:1], OPTIONS["patches"])
    stacked = filled(spec)
    stacked.fixed["0.down:off"].copy_(torch.tensor([[0, 0, 1], [0, 0, 0], [1, 1, 1]]))
    memory = torch.randn(6, D, dtype=torch.float64)
    foreign = torch.tensor([[1, 1, 0, 1, 0, 1], [0, 0, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    assert stacked.extra_loss() is None
    for b in range(3):
        tokens = torch.randn(3, D, dtype=torch.float64)
        stacked.set(b, {"0.down:tokens": tokens, "0.down:memory": memory, "0.down:foreign": foreign[b]})
    found = stacked.extra_loss()
    wanted = torch.stack([plain_losses(spec, stacked, b, memory, foreign[b]) for b in range(3)])
    torch.testing.assert_close(found, wanted)
    assert float(found[2].detach()) == 0
    stacked.begin_step()
    found.sum().backward()
    stacked.end_step()
    parts = stacked.parts
    keys = parts["0.down:gate_keys"].clone().requires_grad_()
    stacked.parts = {**parts, "0.down:gate_keys": keys}
    torch.stack([plain_losses(spec, stacked, b, memory, foreign[b]) for b in range(3)]).sum().backward()
    torch.testing.assert_close(stacked.part_grads["0.down:gate_keys"], keys.grad)


def test_only_so_many_of_the_largest_count() -> None:
    keys = torch.ones(1, 1, 1)
    memory = torch.tensor([[0.0], [1.0], [2.0]])
    found = [
        neuron_losses(
            keys, torch.zeros(1, 1), torch.zeros(1, 1, 1), memory, torch.ones(1, 3, dtype=torch.bool),
            torch.ones(1, 1), margin=0.0, most=most,
        )[1]
        for most in (1, 2, 9)
    ]  # fmt: skip
    values = torch.exp(memory[:, 0])
    wanted = [2 * values[2:].mean(), 2 * values[1:].mean(), 2 * values.mean()]
    torch.testing.assert_close(torch.cat(found), torch.stack(wanted))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (DeltaSpec("key_value", SITES, {"n": 0}), r"n is at least 1 \(got n=0\)"),
        (DeltaSpec("key_value", SITES, {"n": 1, "activation": "tanh"}), r"activation is one of .* \(got .*='tanh'\)"),
        (DeltaSpec("key_value", (replace(SITES[0], name="up"),), {"n": 1}), r"beside 'down' \(got site 0.up\)"),
    ],
)  # fmt: skip
def test_bad_specs_are_named(spec: DeltaSpec, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        new_stack(spec, 1)


def test_other_activations_are_not_laid_side_by_side() -> None:
    pair = [filled(DeltaSpec("key_value", SITES, OPTIONS[name])).unstack(0) for name in ("plain", "gated")]
    with pytest.raises(ValueError, match="share activation and gate"):
        accumulate(pair)
