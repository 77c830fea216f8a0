"""A delta that is text: the model is asked another question, and nothing is added to any activation."""

from __future__ import annotations

import torch
from torch import Tensor

from fastedit.deltas.base import DeltaSpec, FlatStack
from fastedit.deltas.rows import Rows, TokenSpans


class ContextDelta(FlatStack):
    """Nothing but ``texts``: in-context editing (IKE, arXiv 2305.12740)."""

    def __init__(
        self, spec: DeltaSpec, size: int, *, dtype: torch.dtype, device: torch.device | str, trainable: bool
    ) -> None:
        super().__init__(spec, {}, size, dtype=dtype, device=device, trainable=trainable)

    def delta(self, site: int, x: Tensor, rows: Rows | TokenSpans, _output: Tensor | None = None) -> Tensor:
        """There is no site."""
        raise ValueError(f"context: a delta without sites changes no activation (got site={site})")
