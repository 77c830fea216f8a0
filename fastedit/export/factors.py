"""What deltas change of a weight as two thin factors: laid side by side, cut to a rank by SVD."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from fastedit.backbone import Site
from fastedit.deltas import DeltaSpec, EditDelta


@dataclass(frozen=True)
class Factors:
    """The change ``y += (x @ down) @ up`` of a linear map.

    Args:
        down: (d_in, r). up: (r, d_out), any scale folded in.
        relative_error: Frobenius norm of what is left out over that of the whole change; 0 where nothing is.
    """

    down: Tensor
    up: Tensor
    relative_error: float = 0.0

    @property
    def rank(self) -> int:
        """r, of which a change of nothing has one too."""
        return int(self.down.shape[1])


def site_factors(deltas: Sequence[EditDelta], rank: int | None = None) -> dict[Site, Factors]:
    """The sum of deltas as factors, site by site, in the dtype of the deltas.

    The rank is the sum of those of low-rank deltas, and never more than a matrix of that size has; with ``rank`` it is
    at most that, by an SVD in float64. Of low-rank deltas the SVD is that of a matrix as large as their ranks, between
    the Q of two QR decompositions: their product is never formed.

    Args:
        deltas: of kinds "low_rank" and "full" with the same sites. rank: None cuts nothing off.
    Raises:
        ValueError: a full delta without a rank.
    """
    first = deltas[0]
    for number, delta in enumerate(deltas):
        if delta.spec.sites != first.spec.sites:
            raise ValueError(f"export: deltas that add up share their sites (got other ones in deltas[{number}])")
        if delta.spec.kind == "full" and rank is None:
            raise ValueError(
                "export: a full delta becomes an adapter of a rank that is given as rank=, with what it leaves out in "
                f"the report; 'merged' and 'delta' export it whole (got deltas[{number}] of request "
                f"{delta.request_id!r})"
            )
    return {site: _sum_at(site, deltas, rank) for site in first.spec.sites}


def factors_delta(like: EditDelta, factors: Mapping[Site, Factors]) -> EditDelta:
    """A delta of kind "low_rank" made of factors: ranks filled up to the largest, scale 1."""
    rank = max(each.rank for each in factors.values())
    tensors = {}
    for site, each in factors.items():
        missing = rank - each.rank
        tensors[f"{site.layer}.{site.name}:down"] = F.pad(each.down, (0, missing))
        tensors[f"{site.layer}.{site.name}:up"] = F.pad(each.up, (0, 0, 0, missing))
    return replace(like, spec=DeltaSpec("low_rank", tuple(factors), {"rank": rank, "scale": 1.0}), tensors=tensors)


def _sum_at(site: Site, deltas: Sequence[EditDelta], rank: int | None) -> Factors:
    part = f"{site.layer}.{site.name}"
    low = [delta for delta in deltas if delta.spec.kind == "low_rank"]
    full = [delta.tensors[f"{part}:delta"] for delta in deltas if delta.spec.kind == "full"]
    most = min(site.d_in, site.d_out)
    limit = most if rank is None else min(rank, most)
    if full:
        matrix = torch.stack([each.double() for each in full]).sum(0).T
        for delta in low:
            matrix = matrix + _down(delta, part).double() @ _up(delta, part).double()
        return _cut(matrix, limit, full[0].dtype)
    downs, ups = [_down(delta, part) for delta in low], [_up(delta, part) for delta in low]
    whole = _without_nulls(Factors(torch.cat(downs, dim=1), torch.cat(ups, dim=0)))
    if whole.rank <= limit:
        return whole
    left, right = torch.linalg.qr(whole.down.double()), torch.linalg.qr(whole.up.double().T)
    core = _cut(left.R @ right.R.T, limit, torch.float64)
    down, up = left.Q @ core.down, core.up @ right.Q.T
    return Factors(down.to(whole.down.dtype), up.to(whole.up.dtype), core.relative_error)


def _down(delta: EditDelta, part: str) -> Tensor:
    return delta.tensors[f"{part}:down"]


def _up(delta: EditDelta, part: str) -> Tensor:
    return delta.tensors[f"{part}:up"] * float(delta.spec.options.get("scale", 1.0))


def _without_nulls(factors: Factors) -> Factors:
    """Without the directions in which nothing changes, save one where there is no other."""
    kept = (factors.down != 0).any(0) & (factors.up != 0).any(1)
    if not bool(kept.any()):
        kept[:1] = True
    return Factors(factors.down[:, kept], factors.up[kept])


def _cut(matrix: Tensor, rank: int, dtype: torch.dtype) -> Factors:
    """The nearest matrix of a rank: singular values are shared by both factors."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    # Those that are rounding errors are no directions
    limit = values.max() * max(matrix.shape) * torch.finfo(values.dtype).eps if len(values) else 0.0
    rank = max(1, min(rank, int((values > limit).sum())))
    whole, rest = float(values.square().sum().sqrt()), float(values[rank:].square().sum().sqrt())
    shares = values[:rank].sqrt()
    down, up = left[:, :rank] * shares, shares[:, None] * right[:rank]
    return Factors(down.to(dtype), up.to(dtype), rest / whole if whole else 0.0)
