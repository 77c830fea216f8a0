"""Let deltas act on a model for the length of a block, without touching a weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastedit.backbone import EditableModel, PackedState, Site
from fastedit.backbone.vision import VISION, VISION_LAYER
from fastedit.backbone.walk import packed_prefix, packed_start
from fastedit.deltas.base import DeltaSpec, StackedDelta
from fastedit.deltas.rows import Rows, TokenSpans
from fastedit.requests import Query
from fastedit.routers import Router, make_router

FFN_NAMES = frozenset({"up", "gate", "down"})
PLACEHOLDER = "{prompt}"


def split_point(spec: DeltaSpec) -> tuple[int, str]:
    """The last point of the model that the delta cannot reach: (layer, "attention" | "ffn"), or (0, "vision").

    Everything before it is constant while the delta is fitted. A delta without sites changes the prompt: nothing is.
    One on the vision side leaves the vision tower constant.
    """
    if not spec.sites:
        return 0, "attention"
    layer = min(site.layer for site in spec.sites)
    if layer == VISION_LAYER:
        return 0, VISION
    names = {site.name for site in spec.sites if site.layer == layer}
    return layer, "ffn" if names <= FFN_NAMES else "attention"


class RowsHolder:
    """The rows that the installed hooks use now; set ``rows`` before each forward of another batch.

    Where the deltas have a router, or ask another question, it decides for the prompts that are read and what was
    decided holds for the tokens behind them.

    Args:
        model: frozen. stacked: deltas of B edits. rows: of the batches that will run.
        router: decides whether a row's edit acts; with ``Rows()`` and more than one edit, which.
    """

    def __init__(self, model: EditableModel, stacked: StackedDelta, rows: Rows, router: Router | None = None) -> None:
        self.model, self.stacked, self.rows, self.router = model, stacked, rows, router
        self.point = split_point(stacked.spec)
        #: By row of the prompts read last: the edit that acts, or -1. None without a router.
        self.choice: list[int] | None = None
        self._paused = False

    @property
    def is_paused(self) -> bool:
        """Whether the deltas leave the model alone now."""
        return self._paused

    @property
    def asks(self) -> bool:
        """Whether any of the deltas asks another question."""
        return any("template" in texts for texts in self.stacked.texts)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside the block the deltas do not act."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    @torch.no_grad()
    def decide(self, state: PackedState) -> None:
        """Let the router choose for the rows of prompts, walked to ``point`` on the frozen model."""
        if self.router is None:
            return
        own = self._own(len(state))
        with self.paused():
            # It may run a part of the model to see what that would do
            scores = self.router.scores(state, self.stacked.fixed, own)
        threshold = self.router.threshold(self.stacked.fixed)
        if own is not None:
            chosen = torch.where(scores >= threshold[own], own, -1)
        else:
            # The largest of what is left over its edit's own threshold
            allowed = scores.masked_fill(scores < threshold, -torch.inf)
            best, edit = allowed.max(dim=1)
            chosen = torch.where(best > -torch.inf, edit, -1)
        self.choice = chosen.tolist()

    def ask(self, queries: Sequence[Query]) -> list[Query]:
        """The questions to be asked instead, of as many rows as will be read next."""
        if not self.asks or self._paused:
            return list(queries)
        if self.router is None:
            own = self._own(len(queries))
            chosen = [-1] * len(queries) if own is None else own.tolist()
        else:
            with self.paused():
                encoded = self.model.encode(queries, answers=False)
                state = packed_start(self.model, encoded)
                self.decide(packed_prefix(self.model, state, *self.point))
            chosen = self.choice or []
        return [
            query if edit < 0 else replace(query, prompt=self._text(edit, query.prompt))
            for query, edit in zip(queries, chosen, strict=True)
        ]

    def spans(self, tokens: int) -> TokenSpans | None:
        """Spans of the packed tokens that run through the model now; None where rows are padded."""
        running, n_edits = self.model.running, self.stacked.size
        if running is None or tokens not in running.layouts:
            return None
        positions = self.stacked.spec.positions
        key = (tokens, n_edits, self.rows, positions) if self.choice is None else (tokens, id(self), tuple(self.choice))
        if key not in running.memory:
            layout = running.layouts[tokens]
            acting = layout.acting(positions)
            if self.choice is None:
                made = TokenSpans.of(self.rows, layout.counts, n_edits, acting)
            else:
                made = TokenSpans.chosen(self.choice, layout.counts, n_edits, acting)
            made.layout = layout
            running.memory[key] = made
        found: TokenSpans = running.memory[key]
        return found

    def _own(self, rows: int) -> Tensor | None:
        """(R,) int64, the edit of each row; None where any may act."""
        counts = self.rows.counts
        if counts is None:
            return None if self.stacked.size > 1 else torch.zeros(rows, dtype=torch.long, device=self.model.device)
        if sum(counts) != rows or len(counts) != self.stacked.size:
            got = f"rows={rows}, edits={self.stacked.size}, map={counts}"
            raise ValueError(f"rows: a map has every row once and a count for every edit (got {got})")
        sizes = torch.tensor(counts)
        return torch.repeat_interleave(torch.arange(len(counts)), sizes).to(self.model.device)

    def _text(self, edit: int, prompt: str) -> str:
        template = self.stacked.texts[edit].get("template", PLACEHOLDER)
        return template.replace(PLACEHOLDER, prompt)


@contextmanager
def installed(model: EditableModel, stacked: StackedDelta, rows: Rows, *, route: bool = True) -> Iterator[RowsHolder]:
    """Inside the block every site's module returns its output plus its delta's; on leaving nothing remains.

    The base weights are never written: forward hooks add the change, so leaving restores the model exactly. Rows for
    which a router decides that no edit acts are left as they are, to the bit.

    Args:
        model: the frozen model.
        stacked: deltas of B edits.
        rows: rows of the batches that will run; replace ``holder.rows`` to run another batch. ``Rows()`` with several
            deltas lets the router choose one for every row.
        route: False lets the deltas act whatever their router says, and ask no other question (while they are fitted).
    Yields:
        RowsHolder.
    """
    stacked.bind(model)
    holder = RowsHolder(model, stacked, rows, make_router(model, stacked) if route else None)
    handles: list[Any] = []
    seen: dict[tuple[int, str], Tensor] = {}
    decides = False
    watches = int(holder.point[1] == VISION)

    def keep_input(site: Site, reader: str) -> None:
        (source,) = model.sites([site.layer], [reader])

        def hook(_module: Any, args: tuple[Tensor, ...]) -> None:
            seen[site.layer, reader] = args[0]

        handles.append(model.module(source).register_forward_pre_hook(hook))

    try:
        model.watching += watches
        for index, site in enumerate(stacked.spec.sites):
            reader = stacked.reader(index)
            if reader is not None:
                keep_input(site, reader)
            key = None if reader is None else (site.layer, reader)
            handles.append(model.module(site).register_forward_hook(_hook(holder, index, seen, key)))
        decides = route and (holder.router is not None or holder.asks)
        if decides:
            model.holders.append(holder)
        yield holder
    finally:
        model.watching -= watches
        for handle in handles:
            handle.remove()
        if decides:
            model.holders.remove(holder)


def _hook(holder: RowsHolder, index: int, seen: dict[tuple[int, str], Tensor], key: tuple[int, str] | None) -> Any:
    stacked = holder.stacked
    partly = stacked.spec.positions != "all"

    def hook(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if holder.is_paused:
            return output
        source = args[0] if key is None else seen[key]
        x, flat = source.reshape(-1, source.shape[-1]), output.reshape(-1, output.shape[-1])
        spans = holder.spans(x.shape[0])
        if spans is None and (partly or holder.router is not None):
            told = f"positions={stacked.spec.positions!r}" if partly else f"router={stacked.spec.options['router']!r}"
            raise ValueError(
                f"installed: a delta with {told} acts in generate, answer and edits, where the model knows which "
                "tokens are whose (got padded rows)"
            )
        if spans is not None and spans.order is not None:
            return _on_some(stacked, index, x, flat, spans).view(output.shape)
        change = stacked.delta(index, x, holder.rows if spans is None else spans, flat)
        if partly and spans is not None and spans.live is not None:
            change = change * spans.live[:, None]
        if change.dtype != output.dtype:
            change = change.to(output.dtype)
        # Into the fresh change: the output may be kept for later steps
        return change.add_(flat).view(output.shape)

    return hook


def _on_some(stacked: StackedDelta, index: int, x: Tensor, output: Tensor, spans: TokenSpans) -> Tensor:
    """Output (T, d_out) with the change of the tokens that were chosen; the others as they are."""
    assert spans.order is not None
    order = spans.order.to(x.device)
    if not len(order):
        return output
    taken = output[order]
    change = stacked.delta(index, x[order], spans, taken).to(output.dtype)
    if stacked.spec.positions != "all" and spans.live is not None:
        change = change * spans.live[:, None]
    return output.index_copy(0, order, change + taken)
