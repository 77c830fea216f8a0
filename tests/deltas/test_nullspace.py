"""Changes that leave some inputs alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastedit.backbone import Site
from fastedit.deltas import DeltaSpec, EditDelta
from fastedit.deltas.nullspace import Keys, project_delta, projected

SITE = Site(1, "down", "layers.1.down", 12, 7)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_span_of_few_keys_is_kept_whole() -> None:
    keys, found = drawn(5, 12), Keys(12, 8)
    for start in (0, 2, 4):
        found.add(keys[start : start + 2])
    # Again, and a combination of them: nothing new
    found.add(keys[:1] + 2 * keys[3:4])
    basis = found.basis
    assert basis.shape == (12, 5)
    torch.testing.assert_close(basis.T @ basis, torch.eye(5, dtype=torch.float64))
    assert float(projected(keys, basis).abs().max()) < 1e-13
    other = drawn(3, 12, seed=1)
    left = projected(other, basis)
    torch.testing.assert_close(left @ basis, torch.zeros(3, 5, dtype=torch.float64))
    torch.testing.assert_close(projected(left, basis), left)


def test_of_many_keys_the_directions_with_most_of_them_are_kept() -> None:
    directions = torch.linalg.qr(drawn(12, 12)).Q.T
    lengths = torch.linspace(5, 0.5, 12, dtype=torch.float64)
    keys = (lengths[:, None] * directions)[torch.randperm(12, generator=torch.Generator().manual_seed(3))]
    found = Keys(12, 4)
    for key in keys:
        found.add(key[None])
    basis = found.basis
    assert basis.shape == (12, 4)
    kept = (basis.T @ directions.T).square().sum(0)
    torch.testing.assert_close(kept[:4], torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(kept[4:], torch.zeros(8, dtype=torch.float64), atol=1e-12, rtol=0)


def test_no_keys_and_no_room_are_no_directions() -> None:
    assert Keys(12, 8).basis.shape == (12, 0)
    found = Keys(12, 0)
    found.add(drawn(3, 12))
    assert found.basis.shape == (12, 0)
    assert torch.equal(projected(drawn(3, 12), found.basis), drawn(3, 12))
    with pytest.raises(ValueError, match=r"most is 0 to d_in directions \(got most=13, d_in=12\)"):
        Keys(12, 13)


@pytest.mark.parametrize("kind", ["full", "low_rank"])
def test_a_projected_change_is_zero_for_the_keys_and_the_same_beside_them(kind: str) -> None:
    if kind == "full":
        tensors, options = {"1.down:delta": drawn(7, 12)}, {}
    else:
        tensors, options = {"1.down:down": drawn(12, 2), "1.down:up": drawn(2, 7)}, {"rank": 2, "scale": 1.0}
    delta = EditDelta(DeltaSpec(kind, (SITE,), options), tensors)

    def change(made: EditDelta, x: Tensor) -> Tensor:
        if kind == "full":
            return x @ made.tensors["1.down:delta"].T
        return x @ made.tensors["1.down:down"] @ made.tensors["1.down:up"]

    keys, found = drawn(4, 12, seed=5), Keys(12, 6)
    found.add(keys)
    made = project_delta(delta, {SITE: found.basis})
    assert float(change(delta, keys).abs().max()) > 0.1
    assert float(change(made, keys).abs().max()) < 1e-13
    beside = projected(drawn(3, 12, seed=6), found.basis)
    torch.testing.assert_close(change(made, beside), change(delta, beside))
    assert all(made.tensors[name].is_contiguous() for name in made.tensors)
    assert torch.equal(project_delta(delta, {}).tensors[next(iter(tensors))], next(iter(tensors.values())))


def test_other_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a delta of linear maps is projected \(got kind='codebook'\)"):
        project_delta(EditDelta(DeltaSpec("codebook", (SITE,), {}), {}), {})
