"""Calls of the stock model, seen as prompts and what follows them: whose the tokens are that a linear map sees.

Inside a stock forward rows are padded, on either side, and a prompt may be followed by its answer (labels) or come
before it (a cache that is still empty). Here that is told from the arguments of the call, so that deltas act there as
they do in the walk over packed rows: routed at the prompt, which they read at their split point, and for the steps of
the answer as they were routed then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .context import scoped_hooks
from .generic.adapter import generic
from .packed import PackedState
from .token_layout import Running, TokenLayout, showing

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
def _inside(holder: Any) -> Iterator[None]:
    before = _INSIDE.get()
    _INSIDE.set(before | {id(holder)})
    try:
        yield
    finally:
        _INSIDE.set(before)


@dataclass
class Remembered:
    """What holds for a cache: which edit acts on each row, and how many tokens were read behind the prompts."""

    choices: dict[int, list[int] | None]
    behind: int


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
        cache = _cache(given)
        return cache is not None and bool(cache.get_seq_length())

    def forward(
        self,
        stock: Callable[..., Any],
        holder: Any,
        chosen: Sequence[int] | None,
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> Any:
        """Call the stock forward with a holder's deltas acting.

        Args:
            stock: the forward. holder: installed. chosen: by row the edit that acts, -1 for none; None lets the router
                choose. args, kwargs: of the call.
        """
        given = dict(zip(("input_ids",), args, strict=False)) | kwargs
        ids, embeddings = given.get("input_ids"), given.get("inputs_embeds")
        tokens = ids if ids is not None else embeddings
        if tokens is None:
            raise ValueError("attach: a call gives input_ids or inputs_embeds (got neither)")
        rows, length = tokens.shape[:2]
        cache = _cache(given)
        if self.goes_on(given):
            known = self._by_cache.get(cache)
            if known is None:
                raise ValueError(
                    "attach: a cache is filled while the deltas are attached, so that what acts on its rows is known "
                    "(got one that held tokens before)"
                )
            return self._step(stock, holder, known, rows, length, args, kwargs)
        prompts = self._prompts(given, tokens)
        with ExitStack() as entered:
            entered.enter_context(_inside(holder))
            entered.enter_context(showing(Running({rows * length: prompts.layout(length)})))
            if chosen is not None:
                holder.choice = list(chosen)
            elif holder.router is not None:
                holder.choice = None
                entered.enter_context(self._deciding(holder, prompts))
            output = stock(*args, **kwargs)
        cache = cache if cache is not None else _cache(output)
        if cache is not None:
            self._by_cache[cache] = Remembered({id(holder): holder.choice}, 0)
        return output

    def _step(
        self,
        stock: Callable[..., Any],
        holder: Any,
        known: Remembered,
        rows: int,
        length: int,
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> Any:
        """Tokens behind prompts that were read before."""
        choice = known.choices.get(id(holder))
        if choice is not None and len(choice) != rows:
            raise ValueError(
                f"attach: a cache has the rows that it was filled with (got {rows} rows, filled with {len(choice)})"
            )
        holder.choice = choice
        layout = TokenLayout((length,) * rows, behind=(1 + known.behind,) * rows)
        with _inside(holder), showing(Running({rows * length: layout})):
            output = stock(*args, **kwargs)
        known.behind += length
        return output

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
            marks = ids == self.model.adapter.image_token_id
            image = marks if bool(marks.any()) else None
        return Prompts(inside, last, image)

    @contextmanager
    def _deciding(self, holder: Any, prompts: Prompts) -> Iterator[None]:
        """Inside the block the holder's router chooses as soon as the residual stream is at the split point."""
        layer, stage = holder.point
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
                holder.decide(state)

        with scoped_hooks({module: read}, before=True, with_kwargs=True):
            yield


@dataclass(frozen=True)
class Prompts:
    """Rows of a stock forward.

    Args:
        inside: (R, N), bool, tokens of the prompts. last: (R,), int64, the last of each row.
        image: (R, N), bool, tokens of images, or None without any.
    """

    inside: Tensor
    last: Tensor
    image: Tensor | None

    def layout(self, length: int) -> TokenLayout:
        """Whose the padded tokens are, row after row."""
        rows = len(self.last)
        starts = torch.arange(rows, device=self.last.device) * length
        live = None if self.image is None else self._behind_image().flatten()
        return TokenLayout((length,) * rows, live, self.last + starts, (1,) * rows)

    def state(self, hidden: Tensor, layer: int, stage: str) -> PackedState:
        """The prompts alone, packed, of the padded residual stream (R * N, d)."""
        kept = self.inside.flatten()
        counts = tuple(self.inside.sum(1).tolist())
        ends = torch.tensor(counts, device=hidden.device).cumsum(0) - 1
        image = None if self.image is None else self.image.flatten()[kept]
        return PackedState(
            hidden=hidden[kept],
            position_ids=torch.zeros(1, int(kept.sum()), dtype=torch.long, device=hidden.device),
            rotary=None,
            counts=counts,
            starts=(0,) * len(counts),
            wanted=ends,
            wanted_counts=(1,) * len(counts),
            layer=layer,
            stage=stage,
            live=None if self.image is None else self._behind_image().flatten()[kept],
            image=image,
        )

    def _behind_image(self) -> Tensor:
        assert self.image is not None
        place = torch.arange(self.image.shape[1], device=self.image.device)
        return place > torch.where(self.image, place, -1).amax(1, keepdim=True)


def _cache(given: Any) -> Any:
    """The cache among the arguments of a call, or of its output, under the names that transformers gives it."""
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
