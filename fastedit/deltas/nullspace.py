"""Changes of linear maps that leave some inputs alone: what a sequence has written stays as it is.

AlphaEdit (arXiv 2410.02355) projects a change onto the null space of keys, the inputs of the edited map, that stand for
knowledge to be kept: ``W + Δ P`` with ``P = I - U U^T`` answers every key in the span of U as W does. There the keys
are those of a corpus, and earlier edits are held by a penalty; here they are those of the earlier edits themselves, and
the change is fitted through P instead of being solved for in closed form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fastedit.backbone import Site
from fastedit.deltas.base import EditDelta

#: Directions of less than this share of the largest singular value are rounding.
LEAST = 1e-12


def projected(x: Tensor, basis: Tensor) -> Tensor:
    """x (T, d_in) without what lies in the span of an orthonormal basis (d_in, m): ``x P``."""
    return torch.addmm(x, x @ basis, basis.T, alpha=-1)


def project_delta(delta: EditDelta, bases: Mapping[Site, Tensor]) -> EditDelta:
    """A full or low-rank delta that changes no input in the span of the bases: ``Δ P``.

    Args:
        delta: of one edit. bases: orthonormal (d_in, m), by site; sites without one keep their change.
    Raises:
        ValueError: a delta of another kind.
    """
    if delta.spec.kind not in ("full", "low_rank"):
        raise ValueError(f"nullspace: a delta of linear maps is projected (got kind={delta.spec.kind!r})")
    tensors = dict(delta.tensors)
    for site, basis in bases.items():
        prefix = f"{site.layer}.{site.name}:"
        if delta.spec.kind == "full":
            # (d_out, d_in): its rows are inputs
            matrix = tensors[f"{prefix}delta"]
            tensors[f"{prefix}delta"] = projected(matrix, basis.to(matrix))
        else:
            down = tensors[f"{prefix}down"]
            tensors[f"{prefix}down"] = projected(down.T, basis.to(down)).T.contiguous()
    return replace(delta, tensors=tensors)


class Keys:
    """The span of the keys seen so far, as few directions: those that most of their length lies in.

    Up to ``most`` directions it is their span to rounding. From there on a new key's part outside competes with what is
    there: of the singular directions of both together the largest are kept.

    Args:
        d_in: length of a key. most: directions kept.
    """

    def __init__(self, d_in: int, most: int, device: torch.device | str = "cpu") -> None:
        if not 0 <= most <= d_in:
            raise ValueError(f"nullspace: most is 0 to d_in directions (got most={most}, d_in={d_in})")
        self.most = most
        # (m, d_in), rows orthogonal, each as long as its singular value; float64, as rounding adds up over a sequence
        self._rows = torch.zeros(0, d_in, dtype=torch.float64, device=device)

    def add(self, keys: Tensor) -> None:
        """Take up keys (n, d_in)."""
        together = torch.cat([self._rows, keys.detach().to(self._rows)])
        if not len(together):
            return
        _, lengths, directions = torch.linalg.svd(together, full_matrices=False)
        kept = int((lengths > LEAST * lengths[0]).sum())
        kept = min(kept, self.most)
        self._rows = lengths[:kept, None] * directions[:kept]

    @property
    def basis(self) -> Tensor:
        """(d_in, m), orthonormal, float64."""
        lengths = torch.linalg.vector_norm(self._rows, dim=1, keepdim=True)
        basis: Tensor = (self._rows / lengths).T
        return basis
