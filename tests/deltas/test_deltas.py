"""Deltas: what they add, where their gradients go, how they are stored and joined."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastedit.backbone import Site
from fastedit.deltas import (
    DeltaSpec,
    EditDelta,
    Rows,
    TokenSpans,
    accumulate,
    installed,
    load_deltas,
    save_deltas,
    stack,
)
from fastedit.deltas.kinds import new_stack

SITES = (Site(0, "up", "up", 5, 7), Site(1, "down", "down", 7, 5))
SPECS = [DeltaSpec("full", SITES), DeltaSpec("low_rank", SITES, {"rank": 2, "scale": 1.5, "seed": 3})]
ELSEWHERE = [DeltaSpec("full", SITES), DeltaSpec("full", SITES[:1])]
COUNTS = [(2, 2, 2), (1, 3, 0), (0, 0, 4)]


@pytest.fixture(params=SPECS, ids=lambda s: s.kind)
def spec(request: pytest.FixtureRequest) -> DeltaSpec:
    return request.param  # type: ignore[no-any-return]


def filled(spec: DeltaSpec, size: int = 3, *, trainable: bool = True, seed: int = 0) -> Any:
    stacked = new_stack(spec, size, dtype=torch.float64, trainable=trainable)
    stacked.flat.copy_(
        torch.randn(stacked.flat.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    )
    return stacked


def dense(stacked: Any, site: int, edit: int) -> Tensor:
    """The (d_out, d_in) matrix that an edit adds at a site, from its parts."""
    names = stacked.part_names()
    if stacked.spec.kind == "full":
        return stacked.parts[names[site]][edit]  # type: ignore[no-any-return]
    down, up = stacked.parts[names[2 * site]][edit], stacked.parts[names[2 * site + 1]][edit]
    return 1.5 * (down @ up).T  # type: ignore[no-any-return]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("per_row", [1, 4])
def test_each_row_gets_the_change_of_its_own_edit(spec: DeltaSpec, counts: tuple[int, ...], per_row: int) -> None:
    stacked = filled(spec)
    for site, place in enumerate(SITES):
        x = torch.randn(sum(counts) * per_row, place.d_in, dtype=torch.float64)
        owner = torch.repeat_interleave(torch.arange(3), torch.tensor(counts) * per_row)
        expected = torch.stack([dense(stacked, site, int(b)) @ row for b, row in zip(owner, x, strict=True)])
        torch.testing.assert_close(stacked.delta(site, x, Rows(counts)), expected)
        with torch.no_grad():
            torch.testing.assert_close(stacked.delta(site, x, Rows(counts)), expected)


@pytest.mark.parametrize("counts", COUNTS)
def test_gradients_equal_autograds_own(spec: DeltaSpec, counts: tuple[int, ...]) -> None:
    stacked = filled(spec)
    x = torch.randn(sum(counts), 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(sum(counts), 5, dtype=torch.float64)
    stacked.grad.fill_(float("nan"))
    stacked.begin_step()
    middle = stacked.delta(0, x, Rows(counts)).tanh()
    loss = (weight * stacked.delta(1, middle, Rows(counts))).sum() + stacked.parameters_as_input().square().sum()
    loss.backward()
    stacked.end_step()

    flat = stacked.flat.clone().requires_grad_(True)
    again = new_stack(spec, 3, dtype=torch.float64, trainable=False)
    start = 0
    for name, shape in again.shapes.items():
        width = int(torch.tensor(shape).prod())
        again.parts[name] = flat[:, start : start + width].view(3, *shape)
        start += width
    x2 = x.detach().clone().requires_grad_(True)
    owner = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    rows = [dense(again, 1, int(b)) @ (dense(again, 0, int(b)) @ r).tanh() for b, r in zip(owner, x2, strict=True)]
    ((weight * torch.stack(rows)).sum() + flat.square().sum()).backward()
    torch.testing.assert_close(stacked.grad, flat.grad)
    torch.testing.assert_close(x.grad, x2.grad)


def test_a_part_used_twice_gets_both_gradients(spec: DeltaSpec) -> None:
    stacked, x, rows = filled(spec), torch.randn(3, 5, dtype=torch.float64), Rows((1, 1, 1))

    def gradient(times: int) -> Tensor:
        stacked.begin_step()
        sum(stacked.delta(0, x, rows).sum() for _ in range(times)).backward()
        stacked.end_step()
        return stacked.grad.clone()  # type: ignore[no-any-return]

    torch.testing.assert_close(gradient(2), 2 * gradient(1))


def test_parts_without_a_gradient_are_zero(spec: DeltaSpec) -> None:
    stacked = filled(spec)
    stacked.grad.fill_(7.0)
    stacked.begin_step()
    stacked.end_step()
    assert stacked.grad.abs().max() == 0


def test_a_fresh_delta_changes_nothing(spec: DeltaSpec) -> None:
    stacked = new_stack(spec, 3, dtype=torch.float64)
    x = torch.randn(6, 5, dtype=torch.float64)
    assert stacked.delta(0, x, Rows((2, 2, 2))).abs().max() == 0


class TwoLinears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 7).double(), nn.Linear(7, 5, bias=False).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))  # type: ignore[no-any-return]


def test_installed_adds_and_leaves_nothing_behind(spec: DeltaSpec) -> None:
    net = TwoLinears()
    device = torch.device("cpu")
    model: Any = SimpleNamespace(
        module=lambda site: net.get_submodule(site.module_path), running=None, watching=0, device=device
    )
    before = {k: v.clone() for k, v in net.state_dict().items()}
    stacked = filled(spec)
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    plain = net(x)
    with installed(model, stacked, Rows((1, 1, 1))):
        edited = net(x)
    up = [net.up.weight + dense(stacked, 0, b) for b in range(3)]
    down = [net.down.weight + dense(stacked, 1, b) for b in range(3)]
    expected = torch.stack([torch.tanh(x[b] @ up[b].T + net.up.bias) @ down[b].T for b in range(3)])
    torch.testing.assert_close(edited, expected)
    assert torch.equal(net(x), plain)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    with pytest.raises(RuntimeError), installed(model, stacked, Rows((1, 1, 1))):
        raise RuntimeError
    assert torch.equal(net(x), plain)


def test_unstack_and_stack_are_inverse(spec: DeltaSpec) -> None:
    stacked = filled(spec)
    singles = [stacked.unstack(b, model_fingerprint="f", request_id=str(b)) for b in range(3)]
    assert torch.equal(stack(singles).flat, stacked.flat)
    assert singles[1].n_parameters == stacked.flat.shape[1]
    assert singles[1].norm == pytest.approx(float(stacked.flat[1].norm()))


def test_accumulated_deltas_act_together(spec: DeltaSpec) -> None:
    stacked = filled(spec)
    together = stack([accumulate([stacked.unstack(b) for b in range(3)])])
    x = torch.randn(4, 5, dtype=torch.float64)
    expected = sum(x @ dense(stacked, 0, b).T for b in range(3))
    torch.testing.assert_close(together.delta(0, x, Rows()), expected)


def test_saved_deltas_come_back(spec: DeltaSpec, tmp_path: Path) -> None:
    stacked = filled(spec)
    singles = [stacked.unstack(b, model_fingerprint="f", request_id=f"é{b}") for b in range(3)]
    path = save_deltas(singles, tmp_path / "deltas.safetensors")
    loaded = load_deltas(path)
    assert [d.request_id for d in loaded] == ["é0", "é1", "é2"]
    assert [d.spec for d in loaded] == [d.spec for d in singles]
    for a, b in zip(loaded, singles, strict=True):
        assert all(torch.equal(a.tensors[k], b.tensors[k]) for k in b.tensors)
    assert list(tmp_path.iterdir()) == [path]


def test_foreign_and_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="deltas: a safetensors file with a 'fastedit' header"):
        load_deltas(path)
    singles = [filled(SPECS[0]).unstack(0)]
    save_deltas(singles, path)
    header = {"format": "fastedit-deltas/1", "specs": [], "deltas": [{"id": "a", "model": "", "spec": 0}]}
    save_file({"a": torch.zeros(2)}, path, metadata={"fastedit": json.dumps(header)})
    with pytest.raises(ValueError, match="deltas: a complete header"):
        load_deltas(path)
    spec = {
        "kind": "full",
        "sites": [{"layer": 0, "name": "up", "module_path": "up", "d_in": 5, "d_out": 7}],
        "options": {},
    }
    header["specs"] = [spec]
    save_file({"000000/0.up:delta": torch.zeros(2)}, path, metadata={"fastedit": json.dumps(header)})
    with pytest.raises(ValueError, match=r"has shape \(7, 5\) \(got shape=\(2,\)\)"):
        load_deltas(path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: new_stack(DeltaSpec("fulll", SITES), 1), r"kind is one of .* \(got kind='fulll'\)"),
        (
            lambda: new_stack(DeltaSpec("full", SITES, {"rank": 2}), 1),
            r"full: option 'rank' is not known.*\(got rank=2\)",
        ),
        (
            lambda: new_stack(DeltaSpec("low_rank", SITES, {"rank": 2, "scal": 1.0}), 1),
            r"low_rank: option 'scal' is not known; did you mean 'scale'\? \(got scal=1.0\)",
        ),
        (
            lambda: new_stack(DeltaSpec("low_rank", SITES, {"rank": "2"}), 1),
            r"low_rank: rank must be a whole number \(got rank='2'\)",
        ),
        (lambda: new_stack(DeltaSpec("full", ()), 1), r"at least one site"),
        (lambda: stack([]), r"at least one delta"),
        (lambda: accumulate([]), r"at least one delta"),
        (lambda: stack([filled(s).unstack(0) for s in SPECS]), r"deltas share one spec"),
        (lambda: accumulate([filled(s).unstack(0) for s in ELSEWHERE]), r"deltas share kind, sites and positions"),
        (lambda: Rows((1, 1)).token_offsets(4, 3), r"one count per edit \(got counts=2, edits=3\)"),
        (lambda: Rows((1, 2)).token_offsets(4, 2), r"tokens must divide into rows \(got tokens=4, rows=3\)"),
        (lambda: Rows().token_offsets(4, 2), r"a map is needed for more than one edit"),
        (lambda: stack([EditDelta(SPECS[0], {})]), r"every delta has part '0.up:delta'"),
    ],
)
def test_bad_input_is_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_full_and_low_rank_deltas_add_up_as_full_ones() -> None:
    full, low = (filled(spec, seed=number).unstack(number) for number, spec in enumerate(SPECS))
    together = accumulate([full, low])
    assert together.spec == DeltaSpec("full", SITES)
    x = torch.randn(4, SITES[0].d_in, dtype=torch.float64)
    apart = sum(stack([each]).delta(0, x, Rows()) for each in (full, low))
    torch.testing.assert_close(stack([together]).delta(0, x, Rows()), apart)


def test_many_low_rank_deltas_become_a_full_one() -> None:
    """A sequence of a thousand edits must not grow with its length."""
    many = [filled(SPECS[1], seed=seed).unstack(0) for seed in range(6)]
    x = torch.randn(4, SITES[0].d_in, dtype=torch.float64)
    together = many[0]
    kinds = []
    for delta in many[1:]:
        together = accumulate([together, delta])
        kinds.append(together.spec.kind)
    assert kinds[-1] == "full"
    apart = sum(stack([each]).delta(0, x, Rows()) for each in many)
    torch.testing.assert_close(stack([together]).delta(0, x, Rows()), apart)


def test_low_rank_deltas_of_different_ranks_are_stacked() -> None:
    small, large = (DeltaSpec("low_rank", SITES, {"rank": r, "scale": 0.5 * r}) for r in (1, 3))
    deltas = [filled(small).unstack(0), filled(large).unstack(1)]
    stacked = stack(deltas)
    assert stacked.spec.options["rank"] == 3
    x = torch.randn(5, SITES[0].d_in, dtype=torch.float64)
    expected = torch.cat([stack([d]).delta(0, part, Rows()) for d, part in zip(deltas, x.split([2, 3]), strict=True)])
    torch.testing.assert_close(stacked.delta(0, x, TokenSpans([0, 2, 5])), expected)


def test_low_rank_deltas_at_other_sites_are_stacked() -> None:
    """As adapters have it that others trained; each changes nothing at the sites of the others."""
    here, there = (
        DeltaSpec("low_rank", sites, {"rank": rank, "scale": 0.5, "seed": rank})
        for sites, rank in ((SITES[:1], 1), (SITES[1:], 3))
    )
    deltas = [filled(here).unstack(0), filled(there).unstack(1)]
    stacked = stack(deltas)
    assert stacked.spec == DeltaSpec("low_rank", SITES, {"rank": 3, "scale": 1.0})
    for number, site in enumerate(SITES):
        x = torch.randn(5, site.d_in, dtype=torch.float64)
        changed = stacked.delta(number, x, TokenSpans([0, 2, 5])).split([2, 3])
        for edit, delta in enumerate(deltas):
            if site in delta.spec.sites:
                expected = stack([delta]).delta(0, x.split([2, 3])[edit], Rows())
                torch.testing.assert_close(changed[edit], expected)
                assert changed[edit].abs().max() > 0
            else:
                assert torch.equal(changed[edit], torch.zeros_like(changed[edit]))
