"""Let deltas act on a model for the length of a block, without touching a weight."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from fastedit.backbone import EditableModel, PackedState
from fastedit.backbone.active import installing, is_installed
from fastedit.backbone.packed_forward import packed_prefix, packed_start
from fastedit.backbone.vision import VISION, VISION_LAYER
from fastedit.deltas.base import DeltaSpec, StackedDelta
from fastedit.deltas.hooks import hooked, stock_refused
from fastedit.deltas.questions import answering
from fastedit.deltas.rows import Rows, TokenSpans
from fastedit.requests import Query
from fastedit.routers import Router, make_router
from fastedit.routers.claims import claims_of

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

    changes = False

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
        self._read: tuple[Sequence[Mapping[str, str]], tuple[bool, Tensor]] | None = None
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
        return self._of_texts()[0]

    @property
    def needs_choice(self) -> bool:
        """Whether a call has to tell which of the deltas acts on which row."""
        return self.routed or (self.rows.counts is None and self.stacked.size > 1)

    def _of_texts(self) -> tuple[bool, Tensor]:
        """Whether another question is asked, and ``answering`` of the deltas: looked up once for many texts."""
        texts = self.stacked.texts
        if self._read is None or self._read[0] is not texts:
            rewrites = any("template" in each for each in texts)
            self._read = texts, (rewrites, answering(texts).to(self.device))
        return self._read[1]

    def acting(self) -> RowsHolder:
        """Itself: its deltas stay as they are."""
        return self

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
            if edit_of_row is None:
                claims = claims_of(self.router, state, self.stacked.fixed)
                chosen = claims.best(len(state), self._of_texts()[1])
            else:
                scores = self.router.scores(state, self.stacked.fixed, edit_of_row)
                threshold = self.router.threshold(self.stacked.fixed)[edit_of_row]
                chosen = torch.where(scores >= threshold, edit_of_row, -1)
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
                self._check_rows()
                made = TokenSpans.of(self.rows, layout.counts, n_edits, acting)
            else:
                alone = getattr(self.stacked, "is_mapped", False)
                made = TokenSpans.chosen(self.choice, layout.counts, n_edits, acting, alone=alone)
            made.layout = layout
            running.memory[key] = made
        found: TokenSpans = running.memory[key]
        return found

    def _check_rows(self) -> None:
        """Refuse rows that nobody said anything of where there are several deltas."""
        if self.rows.counts is None and self.stacked.size > 1:
            raise ValueError(
                "attach: deltas that were fitted apart act on the rows that name them, in calls of the stock model "
                "with edit_ids= or select=; answer and generate of the fastedit model take one at a time, "
                f"fastedit.applied(model, delta) (got {self.stacked.size} deltas)"
            )

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
    holder = prepared(model, stacked, rows, route=route, key=key)
    with ExitStack() as entered:
        if not stock:
            entered.enter_context(stock_refused(holder))
        entered.enter_context(hooked(holder, everywhere=everywhere))
        entered.enter_context(installing(holder, everywhere=everywhere))
        yield holder


def prepared(
    model: EditableModel, stacked: StackedDelta, rows: Rows, *, route: bool = True, key: str | None = None
) -> RowsHolder:
    """A holder of deltas that are bound to the model and not installed yet. Arguments as for ``installed``."""
    stacked.bind(model)
    holder = RowsHolder(model, stacked, rows, make_router(model, stacked) if route else None, key)
    holder.routed = route and holder.routed
    return holder
