"""Factors are the sum of deltas, and its nearest matrix of a rank where one is asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastedit.backbone import Site
from fastedit.deltas import DeltaSpec, EditDelta
from fastedit.export.factors import Factors, factors_delta, site_factors

SITES = (Site(1, "up", "layers.1.up", 12, 20), Site(2, "down", "layers.2.down", 20, 12))


def low_rank(seed: int, rank: int, scale: float = 0.5, dtype: torch.dtype = torch.float64) -> EditDelta:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for site in SITES:
        tensors[f"{site.layer}.{site.name}:down"] = torch.randn(site.d_in, rank, generator=generator, dtype=dtype)
        tensors[f"{site.layer}.{site.name}:up"] = torch.randn(rank, site.d_out, generator=generator, dtype=dtype)
    return EditDelta(DeltaSpec("low_rank", SITES, {"rank": rank, "scale": scale}), tensors, request_id=f"e{seed}")


def full(seed: int) -> EditDelta:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"{site.layer}.{site.name}:delta": torch.randn(site.d_out, site.d_in, generator=generator, dtype=torch.float64)
        for site in SITES
    }
    return EditDelta(DeltaSpec("full", SITES), tensors, request_id=f"e{seed}")


def change(deltas: list[EditDelta], site: Site) -> Tensor:
    """(d_in, d_out), the whole change of a map."""
    part, total = f"{site.layer}.{site.name}", torch.zeros(site.d_in, site.d_out, dtype=torch.float64)
    for delta in deltas:
        if delta.spec.kind == "full":
            total += delta.tensors[f"{part}:delta"].T
        else:
            product = delta.tensors[f"{part}:down"].double() @ delta.tensors[f"{part}:up"].double()
            total += product * float(delta.spec.options["scale"])
    return total


def product(factors: Factors) -> Tensor:
    return factors.down.double() @ factors.up.double()


def test_ranks_of_a_sum_add_up() -> None:
    deltas = [low_rank(0, 2), low_rank(1, 3, scale=2.0)]
    for site, factors in site_factors(deltas).items():
        assert (factors.rank, factors.relative_error) == (5, 0.0)
        torch.testing.assert_close(product(factors), change(deltas, site), rtol=1e-13, atol=1e-13)


def test_a_rank_is_never_more_than_the_matrix_has() -> None:
    deltas = [low_rank(seed, 4) for seed in range(5)]
    for site, factors in site_factors(deltas).items():
        assert factors.rank == 12
        assert factors.relative_error < 1e-12
        torch.testing.assert_close(product(factors), change(deltas, site), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kinds", ["low_rank", "full", "both"])
def test_a_rank_that_is_asked_for_gives_the_nearest_matrix(kinds: str) -> None:
    makers: dict[str, list[EditDelta]] = {
        "low_rank": [low_rank(0, 4), low_rank(1, 4)],
        "full": [full(0), full(1)],
        "both": [low_rank(0, 4), full(1)],
    }
    deltas = makers[kinds]
    for site, factors in site_factors(deltas, rank=3).items():
        whole = change(deltas, site)
        left, values, right = torch.linalg.svd(whole, full_matrices=False)
        nearest = left[:, :3] * values[:3] @ right[:3]
        assert factors.rank == 3
        torch.testing.assert_close(product(factors), nearest, rtol=1e-10, atol=1e-10)
        error = float((product(factors) - whole).norm() / whole.norm())
        assert factors.relative_error == pytest.approx(error, rel=1e-10)
        assert error > 0.1


def test_the_product_of_low_ranks_is_not_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, ...]] = []
    svd = torch.linalg.svd

    def watched(matrix: Tensor, **options: Any) -> Any:
        sizes.append(tuple(matrix.shape))
        return svd(matrix, **options)

    monkeypatch.setattr(torch.linalg, "svd", watched)
    site_factors([low_rank(0, 2), low_rank(1, 3)], rank=2)
    assert sizes == [(5, 5), (5, 5)]


def test_what_fits_in_the_rank_is_left_as_it_was() -> None:
    delta = low_rank(0, 4, scale=1.0, dtype=torch.float32)
    for site, factors in site_factors([delta], rank=4).items():
        assert torch.equal(factors.down, delta.tensors[f"{site.layer}.{site.name}:down"])
        assert torch.equal(factors.up, delta.tensors[f"{site.layer}.{site.name}:up"])
        assert factors.down.dtype == torch.float32


def test_directions_of_nothing_go_and_one_of_them_stays_alone() -> None:
    delta = low_rank(0, 4)
    for name, tensor in delta.tensors.items():
        if name.startswith("1."):
            (tensor[:, 1:] if name.endswith(":down") else tensor[1:]).zero_()
        if name == "2.down:up":
            tensor.zero_()
    ranks = {site.name: factors.rank for site, factors in site_factors([delta]).items()}
    assert ranks == {"up": 1, "down": 1}


@pytest.mark.parametrize("kind", ["low_rank", "full"])
def test_a_change_of_nothing_is_one_of_rank_one(kind: str) -> None:
    delta = low_rank(0, 4) if kind == "low_rank" else full(0)
    for tensor in delta.tensors.values():
        tensor.zero_()
    for factors in site_factors([delta], rank=2).values():
        assert (factors.rank, factors.relative_error, float(product(factors).abs().max())) == (1, 0.0, 0.0)


def test_a_full_delta_needs_a_rank() -> None:
    with pytest.raises(ValueError, match=r"given as rank=.* \(got deltas\[1\] of request 'e3'\)"):
        site_factors([low_rank(0, 1), full(3)])


def test_other_sites_do_not_add_up() -> None:
    other = EditDelta(DeltaSpec("low_rank", SITES[:1], {"rank": 1}), {})
    with pytest.raises(ValueError, match=r"share their sites \(got other ones in deltas\[1\]\)"):
        site_factors([low_rank(0, 1), other])


def test_factors_become_a_delta_of_the_largest_rank() -> None:
    delta = low_rank(0, 4)
    for name in ("1.up:down", "1.up:up"):
        part = delta.tensors[name]
        (part[:, 2:] if name.endswith(":down") else part[2:]).zero_()
    factors = site_factors([delta])
    assert [each.rank for each in factors.values()] == [2, 4]
    made = factors_delta(delta, factors)
    assert made.spec.options == {"rank": 4, "scale": 1.0}
    for site in SITES:
        torch.testing.assert_close(change([made], site), change([delta], site), rtol=1e-13, atol=1e-13)
