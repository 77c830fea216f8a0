"""Calls of the stock model, seen as prompts and what follows them: whose the tokens are that a linear map sees.

Inside a stock forward rows are padded, on either side, and a prompt may be followed by its answer (labels) or come
before it (a cache that is still empty). Here that is told from the arguments of the call, so that deltas act there as
they do in the walk over packed rows: routed at the prompt, which they read at their split point, and for the steps of
the answer as they were routed then.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .context import scoped_hooks
from .generic.adapter import generic
from .stock_prompts import Prompts
from .token_layout import Running, TokenLayout, showing
from .vision import VISION

if TYPE_CHECKING:
    from .model import EditableModel

#: Prompts (R, N) of the ``generate`` that runs in this context; None outside of one.
_PROMPTS: ContextVar[Tensor | None] = ContextVar("fastedit_prompts", default=None)
#: Holders whose stock forward runs in this context: a forward inside of it is part of the same call.
_INSIDE: ContextVar[frozenset[int]] = ContextVar("fastedit_inside", default=frozenset())


@contextmanager
def generating(prompts: Tensor | None) -> Iterator[None]:
    """Inside the block, forwards without a cache are of these prompts and of what was generated behind them."""
    before = _PROMPTS.get()
    _PROMPTS.set(prompts)
    try:
        yield
    finally:
        _PROMPTS.set(before)


def is_inside(holder: Any) -> bool:
    """Whether a stock forward with a holder's deltas is running in this context."""
    return id(holder) in _INSIDE.get()


@contextmanager
def _inside(holder: Any, choice: Sequence[int] | None) -> Iterator[None]:
    """Inside the block a holder's choice is this one; what it was for other calls comes back."""
    before, chosen = _INSIDE.get(), holder.choice
    _INSIDE.set(before | {id(holder)})
    holder.choice = None if choice is None else list(choice)
    try:
        yield
    finally:
        holder.choice = chosen
        _INSIDE.set(before)


class _Routed(Exception):
    """The router has chosen."""


@dataclass
class Remembered:
    """What holds for a cache: which edit acts on each row, and what it held when the prompts had been read.

    Args:
        choice: by row. held: tokens of the cache. behind: by row, tokens read behind the prompt by then.
    """

    choice: list[int] | None
    held: int
    behind: tuple[int, ...]


class StockCalls:
    """Runs forwards of a stock model so that installed deltas know rows and prompts.

    Args:
        model: around the stock model.
    """

    def __init__(self, model: EditableModel) -> None:
        self.model = model
        self._by_cache: WeakKeyDictionary[Any, Remembered] = WeakKeyDictionary()

    @staticmethod
    def goes_on(given: Mapping[str, Any]) -> bool:
        """Whether the arguments of a call go on behind prompts that a cache holds."""
        cache = cache_of(given)
        return cache is not None and bool(cache.get_seq_length())

    def forward(
        self,
        stock: Callable[..., Any],
        holder: Any,
        chosen: Sequence[int] | None,
        given: dict[str, Any],
        *,
        unknown: bool = False,
    ) -> Any:
        """Call the stock forward with a holder's deltas acting.

        Args:
            stock: the forward. holder: installed. chosen: by row the edit that acts, -1 for none; None lets the router
                choose. given: the arguments of the call by name.
            unknown: whether a call may go on, unedited, behind a cache that was filled without the deltas.
        """
        ids, embeddings = given.get("input_ids"), given.get("inputs_embeds")
        tokens = ids if ids is not None else embeddings
        if tokens is None:
            raise ValueError("attach: a call gives input_ids or inputs_embeds (got neither)")
        rows, length = tokens.shape[:2]
        cache = cache_of(given)
        if self.goes_on(given):
            known = self._by_cache.get(cache)
            if known is None and unknown:
                # Filled before the deltas were there: it belongs to a call of the base model
                with holder.paused():
                    return stock(**given)
            if known is None:
                raise ValueError(
                    "attach: a cache is filled while the deltas are attached, so that what acts on its rows is known "
                    "(got one that held tokens before)"
                )
            return self._step(stock, holder, known, rows, length, cache, given)
        prompts = self._prompts(given, tokens)
        with ExitStack() as entered:
            entered.enter_context(_inside(holder, chosen))
            image = prompts.image if holder.point[1] == VISION else None
            shares = () if image is None else image.sum(1).tolist()
            entered.enter_context(showing(Running({rows * length: prompts.layout(length)}, shares)))
            if chosen is None and holder.router is not None:
                entered.enter_context(self._deciding(holder, prompts))
            output = stock(**given)
            cache = cache if cache is not None else cache_of(output)
            if cache is not None:
                self._by_cache[cache] = Remembered(holder.choice, length, prompts.behind())
        return output

    def _step(
        self,
        stock: Callable[..., Any],
        holder: Any,
        known: Remembered,
        rows: int,
        length: int,
        cache: Any,
        given: dict[str, Any],
    ) -> Any:
        """Tokens behind prompts that were read before."""
        if len(known.behind) != rows:
            raise ValueError(
                f"attach: a cache has the rows that it was filled with (got {rows} rows, filled with "
                f"{len(known.behind)})"
            )
        # Asked anew at every step: a cache may have been cropped
        more = 1 + int(cache.get_seq_length()) - known.held
        layout = TokenLayout((length,) * rows, behind=tuple(more + first for first in known.behind))
        with _inside(holder, known.choice), showing(Running({rows * length: layout})):
            return stock(**given)

    @torch.no_grad()
    def choose(self, holder: Any, given: dict[str, Any], ids: Tensor, mask: Tensor) -> list[int]:
        """By row the edit that a holder's router chooses for prompts, -1 for none.

        Args:
            given: arguments of a ``generate`` by name. ids, mask: (R, N), of the prompts.
        """
        taken = inspect.signature(self.model.hf.forward).parameters
        inputs = {name: value for name, value in given.items() if name in taken and isinstance(value, Tensor)}
        inputs |= {"input_ids": ids, "attention_mask": mask.to(ids.dtype)}
        with ExitStack() as entered:
            entered.enter_context(_inside(holder, None))
            # A router may read behind the point where deltas begin
            for each in (holder, *self.model.holders):
                entered.enter_context(each.paused())
            entered.enter_context(self._deciding(holder, self._prompts(inputs, ids), ends=True))
            with suppress(_Routed):
                self.model.hf(**inputs)
            return list(holder.choice)

    @contextmanager
    def looking(self, holder: Any, ids: Tensor | None, chosen: Sequence[int] | None) -> Iterator[None]:
        """Inside the block deltas behind the vision tower know whose images are looked at, also before any forward.

        Args:
            ids: (R, N), of the prompts. chosen: by row the edit that acts; None is the only one.
        """
        if holder.point[1] != VISION or ids is None:
            yield
            return
        before = holder.choice
        holder.choice = None if chosen is None else list(chosen)
        try:
            with showing(Running({}, (ids == self.model.adapter.image_token_id).sum(1).tolist())):
                yield
        finally:
            holder.choice = before

    def _prompts(self, given: dict[str, Any], tokens: Tensor) -> Prompts:
        """What the arguments of a call say of its rows."""
        rows, length = tokens.shape[:2]
        device = tokens.device
        mask = given.get("attention_mask")
        real = torch.ones(rows, length, dtype=torch.bool, device=device)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            real = mask[:, -length:].to(device).bool()
        place = torch.arange(length, device=device)
        inside = real
        labels = given.get("labels")
        if isinstance(labels, Tensor):
            answered = (labels.to(device) != -100) & real
            first = torch.where(answered, place, length).amin(1)
            inside = real & (place < first[:, None])
            if not bool(inside.any(1).all()):
                raise ValueError(
                    "attach: labels are -100 at the tokens of the prompt (got a row whose labels leave no prompt)"
                )
        prompts = _PROMPTS.get()
        if prompts is not None and not isinstance(labels, Tensor) and prompts.shape[1] < length:
            inside = real & (place < prompts.shape[1])
        last = torch.where(inside, place, -1).amax(1)
        image = None
        ids = given.get("input_ids")
        if ids is None and prompts is not None and prompts.shape[1] == length and rows % len(prompts) == 0:
            # Models that embed their prompts before they generate; with beams each prompt has several rows
            ids = prompts.repeat_interleave(rows // len(prompts), 0)
        if ids is not None:
            adapter = self.model.adapter
            marks = ids == adapter.image_token_id
            if adapter.video_token_id >= 0:
                marks |= ids == adapter.video_token_id
            image = marks if bool(marks.any()) else None
        home = self.model.device
        marks = None if image is None else image.to(home)
        return Prompts(inside.to(home), last.to(home), marks, real.to(home))

    @contextmanager
    def _deciding(self, holder: Any, prompts: Prompts, *, ends: bool = False) -> Iterator[None]:
        """Inside the block the holder's router chooses as soon as the residual stream is at the split point.

        Args:
            ends: whether the forward ends there, or behind it where the router reads a later layer.
        """
        layer, stage = holder.point
        later = getattr(holder.router, "layer", layer)
        if ends and later > layer:
            layer, stage = later, "attention"
        text = self.model.adapter.text
        module = text.layers[layer] if stage == "attention" else text.feed_forward_entry(layer)
        done = False

        def read(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal done
            if not done:
                done = True
                hidden = args[0] if args else next(iter(kwargs.values()))
                # Of streams beside the first (Gemma 3n has four) a walk gives the first
                hidden = hidden.reshape(-1, *hidden.shape[-3:])[0]
                state = prompts.state(hidden.reshape(-1, hidden.shape[-1]), layer, stage)
                if stage == "ffn" and layer == self.model.n_layers - 1 and generic(self.model.adapter) is None:
                    # As the walk does there (`packed_prefix`)
                    state = state.only(_marked(state.wanted, state.hidden.shape[0]))
                holder.route(state)
                if ends:
                    raise _Routed

        with scoped_hooks({module: read}, before=True, with_kwargs=True):
            yield


def cache_of(given: Any) -> Any:
    """The cache among the arguments of a call, or of its output, under the names that transformers gives it."""
    if isinstance(given, tuple):
        return next((part for part in given if hasattr(part, "get_seq_length")), None)
    for name in ("cache", "past_key_values"):
        # Outputs warn where their older name is looked up
        found = given.get(name) if hasattr(given, "get") else None
        if found is not None:
            return found
    return None


def _marked(index: Tensor, size: int) -> Tensor:
    marks = torch.zeros(size, dtype=torch.bool, device=index.device)
    marks[index] = True
    return marks
