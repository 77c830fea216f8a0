"""Let deltas act on a model for the length of a block, without touching a weight."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastedit.backbone import EditableModel, PackedState
from fastedit.backbone.active import installing, is_installed
from fastedit.backbone.context import overridden, scoped_hooks
from fastedit.backbone.generic.context import is_walking
from fastedit.backbone.packed_forward import packed_prefix, packed_start
from fastedit.backbone.vision import VISION, VISION_LAYER
from fastedit.deltas.base import DeltaSpec, StackedDelta
from fastedit.deltas.questions import latest_best
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


#: Numbers of holders, which tell their deltas apart where nothing else does.
_NUMBERS = itertools.count()


class RowsHolder:
    """The rows that the installed hooks use now; set ``rows`` before each forward of another batch.

    Where the deltas have a router, or ask another question, it decides for the prompts that are read and what was
    decided holds for the tokens behind them. Threads that share a holder have rows, choice and pauses of their own.

    Args:
        model: frozen. stacked: deltas of B edits. rows: of the batches that will run.
        router: decides whether a row's edit acts; with ``Rows()`` and more than one edit, which.
        key: tells the deltas from others; None where nothing is known of them, so that they equal no others.
    """

    def __init__(
        self,
        model: EditableModel,
        stacked: StackedDelta,
        rows: Rows,
        router: Router | None = None,
        key: str | None = None,
    ) -> None:
        self.model, self.stacked, self.router = model, stacked, router
        self.key = f"#{next(_NUMBERS)}" if key is None else key
        self.point = split_point(stacked.spec)
        #: Where the deltas are. A site on another device sends its tokens there: rows of edits stay in one piece.
        self.device = model.device
        self._initial_rows = rows
        self._of_thread = threading.local()
        #: Whether it is asked about prompts: which edit acts, or what is asked instead.
        self.routed = router is not None or self.rewrites_prompts

    @property
    def rows(self) -> Rows:
        """Rows of the batch that runs in this thread."""
        rows: Rows = getattr(self._of_thread, "rows", self._initial_rows)
        return rows

    @rows.setter
    def rows(self, rows: Rows) -> None:
        self._of_thread.rows = rows

    @property
    def choice(self) -> list[int] | None:
        """By row of the prompts read last in this thread: the edit that acts, or -1. None without a router."""
        choice: list[int] | None = getattr(self._of_thread, "choice", None)
        return choice

    @choice.setter
    def choice(self, choice: list[int] | None) -> None:
        self._of_thread.choice = choice

    @property
    def is_paused(self) -> bool:
        """Whether the deltas leave the model alone now."""
        paused: bool = getattr(self._of_thread, "paused", False)
        return paused

    @property
    def acts(self) -> bool:
        """Whether the deltas act in the running context."""
        return is_installed(self) and not self.is_paused

    @property
    def seen(self) -> dict[tuple[int, str], Tensor]:
        """Inputs of other modules that the deltas read, by layer and name, in this thread."""
        if not hasattr(self._of_thread, "seen"):
            self._of_thread.seen = {}
        seen: dict[tuple[int, str], Tensor] = self._of_thread.seen
        return seen

    @property
    def rewrites_prompts(self) -> bool:
        """Whether any of the deltas asks another question."""
        return any("template" in texts for texts in self.stacked.texts)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside the block the deltas do not act."""
        before = self.is_paused
        self._of_thread.paused = True
        try:
            yield
        finally:
            self._of_thread.paused = before

    @torch.no_grad()
    def route(self, state: PackedState) -> None:
        """Let the router choose for the rows of prompts, walked to ``point`` on the frozen model."""
        if self.router is None:
            return
        edit_of_row = self._own(len(state))
        with ExitStack() as entered:
            # It may run a part of the model to see what that would do; what other routers choose from is not part of it
            for holder in (self, *self.model.holders):
                entered.enter_context(holder.paused())
            scores = self.router.scores(state, self.stacked.fixed, edit_of_row)
        threshold = self.router.threshold(self.stacked.fixed)
        if edit_of_row is not None:
            chosen = torch.where(scores >= threshold[edit_of_row], edit_of_row, -1)
        else:
            # The largest of what is left over its edit's own threshold
            allowed = torch.where(scores >= threshold, scores, -torch.inf)
            chosen = latest_best(allowed, self.stacked.texts)
        self.choice = chosen.tolist()

    def rewrite_prompts(self, queries: Sequence[Query]) -> list[Query]:
        """The questions to be asked instead, of as many rows as will be read next."""
        if not self.rewrites_prompts or self.is_paused:
            return list(queries)
        if self.router is None:
            edit_of_query = self._own(len(queries))
            chosen = [-1] * len(queries) if edit_of_query is None else edit_of_query.tolist()
        else:
            with self.paused():
                encoded = self.model.encode(queries, answers=False)
                state = packed_start(self.model, encoded)
                self.route(packed_prefix(self.model, state, *self.point))
            chosen = self.choice or []
        return [
            query if edit < 0 else replace(query, prompt=self._text(edit, query.prompt))
            for query, edit in zip(queries, chosen, strict=True)
        ]

    def spans(self, tokens: int) -> TokenSpans | None:
        """Spans of the packed tokens that run through the model now; None where rows are padded."""
        running, n_edits = self.model.running, self.stacked.size
        layout = None if running is None else running.layout(tokens)
        if running is None or layout is None:
            return None
        positions = self.stacked.spec.positions
        key = (tokens, n_edits, positions, self.rows if self.choice is None else tuple(self.choice))
        if key not in running.memory:
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
            return None if self.stacked.size > 1 else torch.zeros(rows, dtype=torch.long, device=self.device)
        if sum(counts) != rows or len(counts) != self.stacked.size:
            got = f"rows={rows}, edits={self.stacked.size}, map={counts}"
            raise ValueError(f"rows: a map has every row once and a count for every edit (got {got})")
        sizes = torch.tensor(counts)
        return torch.repeat_interleave(torch.arange(len(counts)), sizes).to(self.device)

    def _text(self, edit: int, prompt: str) -> str:
        template = self.stacked.texts[edit].get("template", PLACEHOLDER)
        return template.replace(PLACEHOLDER, prompt)


@contextmanager
def installed(
    model: EditableModel,
    stacked: StackedDelta,
    rows: Rows,
    *,
    route: bool = True,
    key: str | None = None,
    stock: bool = False,
    everywhere: bool = False,
) -> Iterator[RowsHolder]:
    """Inside the block every site's module returns its output plus its delta's; on leaving nothing remains.

    The base weights are never written: forward hooks add the change, so leaving restores the model exactly. Rows for
    which a router decides that no edit acts are left as they are, to the bit. Other threads, whose contexts the block
    is not in, have the model as it is.

    Args:
        model: the frozen model.
        stacked: deltas of B edits.
        rows: rows of the batches that will run; replace ``holder.rows`` to run another batch. ``Rows()`` with several
            deltas lets the router choose one for every row.
        route: False lets the deltas act whatever their router says, and ask no other question (while they are fitted).
        key: of deltas that stay as they are inside the block: what the model computes with them may be kept under it.
        stock: the caller tells rows and prompts of stock calls apart (``fastedit.engine.attach``); else what needs to
            know them refuses a stock call.
        everywhere: the deltas act in all threads.
    Yields:
        RowsHolder.
    """
    stacked.bind(model)
    holder = RowsHolder(model, stacked, rows, make_router(model, stacked) if route else None, key)
    holder.routed = route and holder.routed
    readers: dict[nn.Module, tuple[int, str]] = {}
    sites: dict[nn.Module, Any] = {}
    for index, site in enumerate(stacked.spec.sites):
        reader = stacked.reader(index)
        source = None if reader is None else (site.layer, reader)
        if source is not None:
            (read,) = model.sites([site.layer], [source[1]])
            readers[model.module(read)] = source
        sites[model.module(site)] = _hook(holder, index, source)
    with ExitStack() as entered:
        if not stock and (holder.routed or stacked.spec.positions != "all"):
            entered.enter_context(overridden(model.hf, _refuse_stock(holder)))
        inputs = {module: _keep_input(holder, source) for module, source in readers.items()}
        entered.enter_context(scoped_hooks(inputs, before=True, everywhere=everywhere))
        entered.enter_context(scoped_hooks(sites, everywhere=everywhere))
        entered.enter_context(installing(holder, everywhere=everywhere))
        yield holder


def _refuse_stock(holder: RowsHolder) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The stock forward knows neither prompts nor questions: such deltas act in it where a walk goes through it."""
    spec = holder.stacked.spec
    way = "asks another question" if holder.rewrites_prompts else f"acts with router={spec.options.get('router')!r}, "
    way += "" if holder.rewrites_prompts else f"positions={spec.positions!r}"

    def make(stock: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if holder.acts and not is_walking():
                raise ValueError(
                    f"installed: a delta of kind {spec.kind!r} {way}, which the stock model's forward and generate "
                    "cannot do; call generate or answer of the fastedit model (got a stock forward)"
                )
            return stock(*args, **kwargs)

        return forward

    return make


def _keep_input(holder: RowsHolder, source: tuple[int, str]) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        holder.seen[source] = args[0]

    return hook


def _hook(holder: RowsHolder, index: int, key: tuple[int, str] | None) -> Any:
    stacked = holder.stacked
    partly = stacked.spec.positions != "all"

    def hook(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not holder.acts:
            return output
        source = args[0] if key is None else holder.seen[key]
        x, flat = source.reshape(-1, source.shape[-1]), output.reshape(-1, output.shape[-1])
        x, flat = x.to(holder.device), flat.to(holder.device)
        spans = holder.spans(x.shape[0])
        if spans is None and (partly or holder.router is not None):
            options = (
                f"positions={stacked.spec.positions!r}" if partly else f"router={stacked.spec.options['router']!r}"
            )
            raise ValueError(
                f"installed: a delta with {options} acts in generate, answer and edits, where the model knows which "
                "tokens are whose (got padded rows)"
            )
        if spans is not None and spans.order is not None:
            return _on_some(stacked, index, x, flat, spans).view(output.shape).to(output.device)
        change = stacked.delta(index, x, holder.rows if spans is None else spans, flat)
        if partly and spans is not None and spans.live is not None:
            change = change * spans.live[:, None]
        if change.dtype != output.dtype:
            change = change.to(output.dtype)
        # Into the fresh change: the output may be kept for later steps
        return change.add_(flat).view(output.shape).to(output.device)

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
