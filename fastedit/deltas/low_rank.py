"""A low-rank change of chosen linear modules (LoRA)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from fastedit.deltas.base import DeltaSpec, EditDelta, FlatStack
from fastedit.deltas.full import accumulate_full
from fastedit.deltas.nullspace import projected
from fastedit.deltas.options import LowRankOptions, options_of
from fastedit.deltas.rows import Rows, TokenSpans
from fastedit.ops import low_rank


class LowRankDelta(FlatStack):
    """Two thin matrices per edit and site: ``y += scale · (x @ down) @ up``.

    LoRA (arXiv 2106.09685): ``down`` starts random, ``up`` at zero, so a fresh delta changes nothing. Every edit starts
    from the same ``down`` (drawn from ``seed``), so that an edit's result does not depend on its slot in a batch.

    Options of the spec: ``rank``, ``scale`` (alpha / rank), ``seed``.
    Parts: ``"{layer}.{name}:down"`` (B, d_in, r) and ``"{layer}.{name}:up"`` (B, r, d_out).
    """

    #: By site, orthonormal directions (d_in, m) of its input that are not seen while the deltas are fitted; or none.
    kept_inputs: Sequence[Tensor] = ()

    def __init__(
        self, spec: DeltaSpec, size: int, *, dtype: torch.dtype, device: torch.device | str, trainable: bool
    ) -> None:
        options: LowRankOptions = options_of(spec, LowRankOptions)
        rank = options.rank
        shapes: dict[str, tuple[int, ...]] = {}
        for site in spec.sites:
            shapes[f"{site.layer}.{site.name}:down"] = (site.d_in, rank)
            shapes[f"{site.layer}.{site.name}:up"] = (rank, site.d_out)
        super().__init__(spec, shapes, size, dtype=dtype, device=device, trainable=trainable)
        self.scale = options.scale
        generator = torch.Generator().manual_seed(options.seed)
        names = self.part_names()
        self._pairs = list(zip(names[0::2], names[1::2], strict=True))
        self._drawn: dict[str, Tensor] = {}
        # Without a row nothing starts: shapes cost nothing, however large they are
        for name, _ in self._pairs if size else ():
            d_in = self.shapes[name][0]
            # Uniform with variance 1 / (3 d_in), the usual initial state of LoRA's first factor
            draw = torch.rand(d_in, rank, generator=generator, dtype=torch.float64) * 2 - 1
            self._drawn[name] = (draw / math.sqrt(d_in)).to(self.flat)
            self.parts[name].copy_(self._drawn[name])

    def initial(self, name: str) -> Tensor | float:
        """The drawn first factor; zero for the second."""
        return self._drawn.get(name, 0.0)

    def delta(self, site: int, x: Tensor, rows: Rows | TokenSpans, _output: Tensor | None = None) -> Tensor:
        """Change of site number ``site``'s output for x (tokens, d_in), tokens sorted by edit: (tokens, d_out)."""
        down, up = (self.differentiable(name) for name in self._pairs[site])
        if self.kept_inputs:
            x = projected(x.to(self.flat.dtype), self.kept_inputs[site])
        offsets = rows.offsets_tensor(x.shape[0], self.size, x.device)
        # Half-precision tokens are taken as they are; sums and factors are float32 all the same
        narrow = x.dtype in (torch.bfloat16, torch.float16) and self.flat.dtype == torch.float32
        return low_rank(x if narrow else x.to(self.flat.dtype), down, up * self.scale, offsets)


def accumulate_low_rank(deltas: Sequence[EditDelta]) -> EditDelta:
    """Low-rank deltas laid side by side: the rank is the sum of theirs, the scale is folded into ``up``.

    Where a full matrix would be smaller, or one of the deltas is full, they are added as full ones.
    """
    low = [d for d in deltas if d.spec.kind == "low_rank"]
    rank = sum(int(d.spec.options["rank"]) for d in low)
    if len(low) < len(deltas) or any(rank * (s.d_in + s.d_out) > s.d_in * s.d_out for s in deltas[0].spec.sites):
        return accumulate_full([d if d.spec.kind == "full" else full_of(d) for d in deltas])
    tensors: dict[str, Tensor] = {}
    for name in deltas[0].tensors:
        if name.endswith(":down"):
            tensors[name] = torch.cat([d.tensors[name] for d in deltas], dim=1)
        else:
            scaled = [d.tensors[name] * float(d.spec.options.get("scale", 1.0)) for d in deltas]
            tensors[name] = torch.cat(scaled, dim=0)
    options = {**deltas[0].spec.options, "rank": rank, "scale": 1.0}
    spec = replace(deltas[0].spec, options=options)
    return replace(deltas[0], spec=spec, tensors=tensors, request_id="+".join(d.request_id for d in deltas))


def full_of(delta: EditDelta) -> EditDelta:
    """A low-rank delta as a full one."""
    scale = float(delta.spec.options.get("scale", 1.0))
    options = {name: value for name, value in delta.spec.options.items() if name in ("positions", "router")}
    tensors = {}
    for site in delta.spec.sites:
        name = f"{site.layer}.{site.name}"
        tensors[f"{name}:delta"] = (
            (delta.tensors[f"{name}:down"] @ delta.tensors[f"{name}:up"]) * scale
        ).T.contiguous()
    return replace(delta, spec=DeltaSpec("full", delta.spec.sites, options), tensors=tensors)


def joined_low_rank(deltas: Sequence[EditDelta]) -> list[EditDelta]:
    """Deltas of different ranks, scales and sites as deltas of the largest rank at all sites, filled up with zeros."""
    rank = max(int(d.spec.options["rank"]) for d in deltas)
    sites = tuple(dict.fromkeys(site for d in deltas for site in d.spec.sites))
    made = []
    for delta in deltas:
        missing = rank - int(delta.spec.options["rank"])
        scale = float(delta.spec.options.get("scale", 1.0))
        dtype = next(t.dtype for t in delta.tensors.values())
        tensors: dict[str, Tensor] = {}
        for site in sites:
            down, up = (f"{site.layer}.{site.name}:{part}" for part in ("down", "up"))
            if site in delta.spec.sites:
                tensors[down] = F.pad(delta.tensors[down], (0, missing))
                tensors[up] = F.pad(delta.tensors[up] * scale, (0, 0, 0, missing))
            else:
                tensors[down] = torch.zeros(site.d_in, rank, dtype=dtype)
                tensors[up] = torch.zeros(rank, site.d_out, dtype=dtype)
        # A seed is of the first values alone
        options = {name: value for name, value in delta.spec.options.items() if name != "seed"}
        options |= {"rank": rank, "scale": 1.0}
        made.append(replace(delta, spec=DeltaSpec("low_rank", sites, options), tensors=tensors))
    return made
