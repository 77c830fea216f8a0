"""A trained change of the model that all edits share, and the place of each edit in the space that scopes live in."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastedit.backbone import EditableModel
from fastedit.deltas.base import DeltaSpec, FlatStack
from fastedit.deltas.options import CounterfactualOptions, options_of
from fastedit.deltas.rows import Rows, TokenSpans
from fastedit.routers.scope import trained_part

PREFIX = "model/"


class CounterfactualDelta(FlatStack):
    """SERAC's counterfactual model (arXiv 2206.06520, section 3.2) as a delta on the frozen one.

    An edit is text (``texts["template"]``) and its embedding, the fixed tensor "scope" (B, scope_size). The change of
    the weights is the same for all: it lies in the artifact that the spec's option ``artifact`` names.

    Options of the spec: ``scope_size``; ``rank`` of the change, 0 is full matrices; ``scale`` of a low-rank one.
    """

    def __init__(
        self, spec: DeltaSpec, size: int, *, dtype: torch.dtype, device: torch.device | str, trainable: bool
    ) -> None:
        options: CounterfactualOptions = options_of(spec, CounterfactualOptions)
        fixed = {"scope": (options.scope_size,)}
        super().__init__(spec, {}, size, dtype=dtype, device=device, trainable=trainable, fixed=fixed)
        self.rank, self.scale = options.rank, options.scale
        #: By part name, as `shared_shapes` has them; taken from the artifact unless they are set before.
        self.weights: Mapping[str, Tensor] = {}

    def bind(self, model: EditableModel) -> None:
        """Take the shared weights from the artifact."""
        if not self.weights:
            tensors = trained_part(model, self.spec.options).tensors
            self.weights = {
                name: tensors[PREFIX + name].to(self.flat.device, self.flat.dtype) for name in shared_shapes(self.spec)
            }

    def delta(self, site: int, x: Tensor, rows: Rows | TokenSpans, _output: Tensor | None = None) -> Tensor:
        """Change (tokens, d_out) of the output of site number ``site`` for x (tokens, d_in), whosever they are."""
        chosen = self.spec.sites[site]
        part = f"{chosen.layer}.{chosen.name}"
        x = x.to(self.flat.dtype)
        if not self.rank:
            return x @ self.weights[f"{part}:delta"].T
        return (x @ self.weights[f"{part}:down"]) @ (self.weights[f"{part}:up"] * self.scale)


def shared_shapes(spec: DeltaSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of the shared weights by name, those of full or of low-rank deltas (without the leading B)."""
    rank = int(spec.options.get("rank", 0))
    shapes: dict[str, tuple[int, ...]] = {}
    for site in spec.sites:
        part = f"{site.layer}.{site.name}"
        if rank:
            shapes |= {f"{part}:down": (site.d_in, rank), f"{part}:up": (rank, site.d_out)}
        else:
            shapes[f"{part}:delta"] = (site.d_out, site.d_in)
    return shapes
