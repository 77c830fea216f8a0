"""Let deltas act on a model for the length of a block, without touching a weight."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from fastedit.backbone import EditableModel
from fastedit.deltas.base import StackedDelta
from fastedit.deltas.rows import Rows, TokenSpans


class RowsHolder:
    """The rows that the installed hooks use now; set ``rows`` before each forward of another batch."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self._paused = False

    @property
    def is_paused(self) -> bool:
        """Whether the deltas leave the model alone now."""
        return self._paused

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside the block the deltas do not act."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def spans(self, model: EditableModel, tokens: int, n_edits: int) -> TokenSpans | None:
        """Spans of the packed tokens that run through the model now; None where rows are padded."""
        if model.running is None or tokens not in model.running.layouts:
            return None
        known = model.running.memory
        key = (tokens, n_edits, self.rows)
        if key not in known:
            layout = model.running.layouts[tokens]
            known[key] = TokenSpans.of(self.rows, layout.counts, n_edits, layout.live)
        found: TokenSpans = known[key]
        return found


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
    behind_image = stacked.spec.positions == "after_image"

    def hook_for(index: int) -> Any:
        def hook(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if holder.is_paused:
                return output
            x = args[0].reshape(-1, args[0].shape[-1])
            spans = holder.spans(model, x.shape[0], stacked.size)
            change = stacked.delta(index, x, holder.rows if spans is None else spans)
            if behind_image:
                if spans is None:
                    raise ValueError(
                        "installed: a delta with positions='after_image' acts in generate, answer and edits, where "
                        "the model knows which tokens are an image's (got padded rows)"
                    )
                if spans.live is not None:
                    change = change * spans.live[:, None]
            if change.dtype != output.dtype:
                change = change.to(output.dtype)
            # Into the fresh change: the output may be kept for later steps
            return change.add_(output.reshape(change.shape)).view(output.shape)

        return hook

    try:
        for index, site in enumerate(stacked.spec.sites):
            handles.append(model.module(site).register_forward_hook(hook_for(index)))
        yield holder
    finally:
        for handle in handles:
            handle.remove()
