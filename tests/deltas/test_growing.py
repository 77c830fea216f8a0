"""The sum of a sequence: it acts as the deltas put together do, and takes up one more without copying the others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastedit.backbone import Site
from fastedit.deltas import DeltaSpec, EditDelta, Rows, accumulate, company, stack
from fastedit.deltas import growing as module
from fastedit.deltas.growing import GrowingSum, grows, sum_bytes
from fastedit.deltas.kinds import new_stack

LINEAR = (Site(0, "up", "up", 24, 40), Site(1, "down", "down", 40, 24))
ENDING = (Site(0, "down", "0.down", 18, 12), Site(1, "down", "1.down", 18, 12))
SPECS = {
    "full": DeltaSpec("full", LINEAR),
    "low_rank": DeltaSpec("low_rank", LINEAR, {"rank": 3, "scale": 1.5, "seed": 3}),
    "relu": DeltaSpec("key_value", ENDING, {"n": 3, "switches": True}),
    "gated": DeltaSpec("key_value", ENDING, {"n": 3, "activation": "silu", "gate": True, "steering": 0.5}),
    "gelu": DeltaSpec("key_value", ENDING, {"n": 2, "activation": "gelu"}),
}


def made(spec: DeltaSpec, number: int, dtype: torch.dtype = torch.float64) -> EditDelta:
    """One edit's delta with drawn values, a tenth as large as one."""
    generator = torch.Generator().manual_seed(number)
    stacked = new_stack(spec, 1, dtype=dtype)
    delta: EditDelta = stacked.unstack(0, request_id=f"edit-{number}")
    tensors = {name: 0.1 * torch.randn(t.shape, generator=generator, dtype=dtype) for name, t in delta.tensors.items()}
    return replace(delta, tensors=tensors)


def acted(stacked: Any, site: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a stack of one adds, and the gradient of the sum of its sines by the input."""
    x = x.clone().requires_grad_()
    change = stacked.delta(site, x, Rows())
    (gradient,) = torch.autograd.grad(change.sin().sum(), x)
    return change.detach(), gradient


@pytest.mark.parametrize("name", SPECS)
def test_the_sum_acts_as_the_deltas_together_at_every_length(name: str) -> None:
    """Beyond the rank from which on factors are summed, and beyond the first room of the buffers."""
    spec = SPECS[name]
    growing = GrowingSum("cpu")
    deltas: list[EditDelta] = []
    for number in range(80):
        deltas.append(made(spec, number))
        growing.add(deltas[-1])
        assert len(growing) == number + 1
        if number not in (0, 1, 4, 7, 30, 79):
            continue
        assert growing.company == company(deltas)
        together = stack([accumulate(deltas)])
        for site, each in enumerate(spec.sites):
            width = each.d_out if spec.kind == "key_value" else each.d_in
            x = torch.randn(5, width, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
            assert growing.reader(site) == together.reader(site)
            for got, wanted in zip(acted(growing, site, x), acted(together, site, x), strict=True):
                torch.testing.assert_close(got, wanted)


def test_low_rank_and_full_deltas_add_up() -> None:
    deltas = [made(SPECS[name], number) for number, name in enumerate(("low_rank", "full", "low_rank"))]
    growing = GrowingSum("cpu")
    for delta in deltas:
        growing.add(delta)
    x = torch.randn(5, 24, dtype=torch.float64)
    wanted = sum(stack([delta]).delta(0, x, Rows()) for delta in deltas)
    torch.testing.assert_close(growing.delta(0, x, Rows()), wanted)


@pytest.mark.parametrize("name", ["low_rank", "relu", "gated"])
def test_rows_are_copied_a_constant_number_of_times(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CROSSING", 1e9)
    growing, copied = GrowingSum("cpu"), 0
    n_bytes: list[int] = []
    for number in range(300):
        before = growing.n_bytes
        growing.add(made(SPECS[name], number, torch.float32))
        n_bytes.append(growing.n_bytes)
        # A buffer that was made anew had what was in the old one copied
        copied += before if growing.n_bytes != before else 0
    assert copied <= growing.n_bytes
    assert len(set(n_bytes)) <= 6
    per_edit = sum(t.numel() * 4 for t in made(SPECS[name], 0, torch.float32).tensors.values())
    # "off" is a part of a delta, not of what acts
    assert 0.8 * 300 * per_edit <= growing.n_bytes <= 2.2 * 300 * per_edit


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("edits", [1, 20, 200])
def test_the_plan_counts_all_that_is_held(name: str, edits: int) -> None:
    growing, most = GrowingSum("cpu"), 0
    for number in range(edits):
        growing.add(made(SPECS[name], number, torch.float32))
        most = max(most, growing.n_bytes)
    # Old and new buffers are there at once while rows are copied
    assert most <= sum_bytes(SPECS[name], edits, 4) <= 5 * most


def test_from_a_rank_on_a_sequence_costs_the_same() -> None:
    growing, sizes = GrowingSum("cpu"), []
    for number in range(40):
        growing.add(made(SPECS["low_rank"], number))
        sizes.append(growing.n_bytes)
    # 24 x 40 numbers at each of two sites, eight bytes each
    assert set(sizes[4:]) == {2 * 24 * 40 * 8}


def test_what_does_not_add_up_is_refused_and_changes_nothing() -> None:
    growing = GrowingSum("cpu")
    growing.add(made(SPECS["relu"], 0))
    x = torch.randn(3, 12, dtype=torch.float64)
    before = growing.delta(0, x, Rows())
    others = [SPECS["gelu"], SPECS["gated"], SPECS["full"], DeltaSpec("key_value", ENDING[:1], {"n": 3})]
    others.append(DeltaSpec("key_value", ENDING, {"n": 3, "positions": "after_image"}))
    for spec in others:
        with pytest.raises(ValueError, match=r"share kind, sites, positions and activation \(delta 1 has "):
            growing.add(made(spec, 1))
    assert torch.equal(growing.delta(0, x, Rows()), before)
    assert len(growing) == 1


def test_memory_that_runs_out_leaves_the_sum_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    growing = GrowingSum("cpu")
    for number in range(25):
        growing.add(made(SPECS["relu"], number))
    x, calls = torch.randn(3, 12, dtype=torch.float64), []
    before, original = growing.delta(0, x, Rows()), module._GrowingRows.reserve

    def short(rows: Any, new: Tensor) -> None:
        calls.append(new)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("out of memory")
        original(rows, new)

    monkeypatch.setattr(module._GrowingRows, "reserve", short)
    with pytest.raises(torch.OutOfMemoryError):
        growing.add(made(SPECS["relu"], 25))
    assert len(growing) == 25
    assert torch.equal(growing.delta(0, x, Rows()), before)
    growing.add(made(SPECS["relu"], 25))
    wanted = stack([accumulate([made(SPECS["relu"], number) for number in range(26)])])
    for site in (0, 1):
        torch.testing.assert_close(growing.delta(site, x, Rows()), wanted.delta(site, x, Rows()))


def test_only_what_always_acts_and_asks_the_question_itself_adds_up() -> None:
    assert all(grows(made(spec, 0)) for spec in SPECS.values())
    routed = replace(SPECS["full"], options={"router": "scope"})
    assert not grows(made(routed, 0))
    assert not grows(replace(made(SPECS["full"], 0), texts={"template": "{prompt}"}))
    assert not grows(EditDelta(DeltaSpec("codebook", LINEAR[:1]), {}))
