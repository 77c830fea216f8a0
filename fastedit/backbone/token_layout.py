"""Whose the tokens are that a module sees while a walk is in progress: for those who hook in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .packed import PackedState


@dataclass(frozen=True)
class TokenLayout:
    """Whose the tokens are that a linear map sees now.

    Args:
        counts: tokens of each row, rows in order.
        live: (T,), bool, where a delta that leaves some tokens alone acts; None is everywhere.
        wanted: (M,), int64, the tokens that carry labels, or end a prompt; None is all.
        wanted_counts: how many of each row; not used where all are.
        behind: see `PackedState`.
        steps_now: (T,), int64, what ``steps`` is at the token that is read now, where a layout serves one token after
            another; None where ``steps`` says it.
    """

    counts: tuple[int, ...]
    live: Tensor | None = None
    wanted: Tensor | None = None
    wanted_counts: tuple[int, ...] = ()
    behind: tuple[int, ...] = ()
    steps_now: Tensor | None = None

    @cached_property
    def prompts(self) -> tuple[int, ...]:
        """Tokens of each row that belong to its prompt: up to the first wanted one, or all where none is wanted."""
        if self.wanted is None:
            return tuple(min(count, 1) for count in self.counts)
        wanted = self.wanted.tolist()
        starts = [0, *accumulate(self.counts)]
        firsts = [0, *accumulate(self.wanted_counts)]
        return tuple(
            wanted[firsts[row]] - starts[row] + 1 if self.wanted_counts[row] else count
            for row, count in enumerate(self.counts)
        )

    @cached_property
    def steps(self) -> tuple[int, ...]:
        """How many tokens each token is behind the last one of its prompt; below 0 inside of the prompt."""
        behind = self.behind or (0,) * len(self.counts)
        rows = zip(self.counts, self.prompts, behind, strict=True)
        return tuple(place - prompt + 1 + first for count, prompt, first in rows for place in range(count))

    @cached_property
    def answer(self) -> Tensor | None:
        """(T,), bool: the last token of each prompt and all behind it; None is all."""
        if self.wanted is None:
            return None
        return torch.tensor([step >= 0 for step in self.steps], dtype=torch.bool, device=self.wanted.device)

    def acting(self, positions: str) -> Tensor | None:
        """(T,), bool: where a delta with these ``positions`` acts; None is everywhere."""
        return self.answer if positions == "answer" else self.live


def token_layout(state: PackedState) -> TokenLayout:
    """The layout of all tokens of a state."""
    wanted = None if len(state.wanted) == state.hidden.shape[0] else state.wanted
    return TokenLayout(state.counts, state.live, wanted, state.wanted_counts, state.behind)


class Running:
    """The layouts of what runs, by number of tokens.

    Args:
        layouts: by number of tokens: of all in a walk, or of those that are wanted.
        image_tokens: by row, tokens of images: other things that are seen of images are shared out likewise.
    """

    def __init__(self, layouts: Mapping[int, TokenLayout], image_tokens: Sequence[int] = ()) -> None:
        self.layouts = dict(layouts)
        self._image_tokens = tuple(image_tokens)
        #: For those who hook in: what they worked out of a layout.
        self.memory: dict[Any, Any] = {}

    def layout(self, tokens: int) -> TokenLayout | None:
        """The layout of so many tokens; None where it is not known."""
        total = sum(self._image_tokens)
        if tokens not in self.layouts and total and tokens:
            counts = [divmod(tokens * count, total) for count in self._image_tokens]
            if not any(rest for _, rest in counts):
                self.layouts[tokens] = TokenLayout(tuple(count for count, _ in counts))
        return self.layouts.get(tokens)


def _of_state(state: PackedState) -> Running:
    layouts = {state.hidden.shape[0]: token_layout(state)}
    if len(state.wanted) != state.hidden.shape[0]:
        live = None if state.live is None else state.live[state.wanted]
        layouts[len(state.wanted)] = TokenLayout(state.wanted_counts, live, behind=state.behind)
    return Running(layouts)


_RUNNING: ContextVar[Running | None] = ContextVar("fastedit_running", default=None)


def running_now() -> Running | None:
    """Whose tokens the linear maps see now, in this context; None outside of walks over packed rows."""
    return _RUNNING.get()


@contextmanager
def running(state: PackedState) -> Iterator[None]:
    """Inside the block hooks can ask whose tokens they see: those of a state that is walked."""
    with showing(state.remembered("running", lambda: _of_state(state))):
        yield


@contextmanager
def showing(shown: Running) -> Iterator[None]:
    """Inside the block hooks can ask whose tokens they see."""
    before = _RUNNING.get()
    _RUNNING.set(shown)
    try:
        yield
    finally:
        _RUNNING.set(before)
