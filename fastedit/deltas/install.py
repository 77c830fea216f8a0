"""Let deltas act on a model for the length of a block, without touching a weight."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from fastedit.backbone import EditableModel
from fastedit.deltas.base import Rows, StackedDelta


class RowsHolder:
    """The rows that the installed hooks use now; set ``rows`` before each forward of another batch."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows


@contextmanager
def installed(model: EditableModel, stacked: StackedDelta, rows: Rows) -> Iterator[RowsHolder]:
    """Inside the block every site's module returns its output plus its delta's; on leaving nothing remains.

    The base weights are never written: forward hooks add the change, so leaving restores the model exactly.

    Args:
        model: the frozen model.
        stacked: deltas of B edits.
        rows: rows of the batches that will run; replace ``holder.rows`` to run another batch.
    Yields:
        RowsHolder.
    """
    holder = RowsHolder(rows)
    handles = []

    def hook_for(index: int) -> Any:
        def hook(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = args[0]
            change = stacked.delta(index, x.reshape(-1, x.shape[-1]), holder.rows)
            return output + change.view(*x.shape[:-1], -1).to(output.dtype)

        return hook

    try:
        for index, site in enumerate(stacked.spec.sites):
            handles.append(model.module(site).register_forward_hook(hook_for(index)))
        yield holder
    finally:
        for handle in handles:
            handle.remove()
