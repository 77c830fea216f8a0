"""Calls of a stock model while deltas are attached: what acts belongs to a call, from its beginning to its end."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

from torch import Tensor

from fastedit.backbone import EditableModel
from fastedit.backbone.active import installing, withdraw
from fastedit.backbone.stock import StockCalls, generating, is_inside
from fastedit.deltas import RowsHolder
from fastedit.deltas.live import LiveHolder
from fastedit.engine.rewritten_prompts import RewrittenPrompts, prompt_tokens

Method = Callable[..., Any]
#: From the arguments of a call to the number of the delta that acts on each row; -1 or None is none.
Select = Callable[[dict[str, Any]], Sequence[int | None]]
_NONE: Mapping[int, list[int] | None] = MappingProxyType({})
#: Which delta acts on each row of the ``generate`` that runs in this context, by attachment.
_EDIT_IDS: ContextVar[Mapping[int, list[int] | None]] = ContextVar("fastedit_edit_ids", default=_NONE)
#: Settings of ``generate`` under which tokens are read otherwise than prompt by prompt and then one by one.
_REFUSED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "prefill_chunk_size")


class InFlight:
    """Calls that are under way: what they began with is taken away when the last of them has ended.

    Args:
        holder: of the deltas. everywhere: whether they are installed for all threads.
    """

    def __init__(self, holder: RowsHolder | LiveHolder, *, everywhere: bool) -> None:
        self._holder, self._everywhere = holder, everywhere
        self._lock = threading.Lock()
        self._users = 0
        self._left = False
        self._block: ExitStack | None = None

    @contextmanager
    def call(self) -> Iterator[bool]:
        """Inside the block deltas that were there at its beginning stay; yields whether they were."""
        with self._lock:
            acts = not self._left or self._holder.acts
            self._users += acts
        try:
            with installing(self._holder) if acts and self._everywhere else nullcontext():
                yield acts
        finally:
            with self._lock:
                self._users -= acts
                block = None
                if not self._users:
                    block, self._block = self._block, None
            if block is not None:
                block.close()

    def leave(self, block: ExitStack) -> None:
        """Let the deltas act on no new call, and leave the block with the last that is under way."""
        withdraw(self._holder)
        with self._lock:
            if self._left:
                return
            self._left = True
            if self._users:
                self._block = block
                return
        block.close()


class AttachedCalls:
    """Makes a stock model's methods into those in which deltas act.

    Args:
        model: around the stock model. holder: of the installed deltas, ``count`` of them.
        select: which delta acts on which row of a call; None leaves it to the call.
        needs_choice: whether the deltas act on no row unless it is said which.
        everywhere: whether they were installed for all threads.
    """

    def __init__(
        self,
        model: EditableModel,
        holder: RowsHolder,
        count: int,
        *,
        select: Select | None,
        needs_choice: bool,
        everywhere: bool,
    ) -> None:
        self.model, self.holder, self.count = model, holder, count
        self.select, self.needs_choice, self.everywhere = select, needs_choice, everywhere
        self.flight = InFlight(holder, everywhere=everywhere)
        self.calls = StockCalls(model)

    def forward(self, stock: Method) -> Method:
        """Return the forward in which the deltas act."""
        names, holder, calls = names_of(stock), self.holder, self.calls

        def forward(*args: Any, edit_ids: Any = None, **kwargs: Any) -> Any:
            if not holder.acts or is_inside(holder):
                return stock(*args, **kwargs)
            given = dict(zip(names, args, strict=False)) | kwargs
            with self.flight.call() as acts:
                if not acts:
                    return stock(**given)
                if holder.rewrites_prompts and id(self) not in _EDIT_IDS.get():
                    raise ValueError(
                        f"attach: a delta of kind {holder.stacked.spec.kind!r} asks another question, which a stock "
                        "call cannot but in generate, as logits are those of the tokens that are given; use generate, "
                        "or score by the fastedit model (got a forward)"
                    )
                chosen = self._chosen(edit_ids if edit_ids is not None else _EDIT_IDS.get().get(id(self)), given)
                return calls.forward(stock, holder, chosen, given, unknown=self.everywhere)

        return forward

    def generate(self, stock: Method) -> Method:
        """Return the ``generate`` in which the deltas act."""
        names, holder = names_of(stock), self.holder

        def generate(*args: Any, edit_ids: Any = None, **kwargs: Any) -> Any:
            if not holder.acts:
                return stock(*args, **kwargs)
            given = dict(zip(names, args, strict=False)) | kwargs
            with self.flight.call() as acts:
                if not acts:
                    return stock(**given)
                self._refuse_assistance(given)
                ids = given.get("input_ids", given.get("inputs"))
                before = _EDIT_IDS.get()
                chosen = self._chosen(edit_ids, given)
                asked = None
                if holder.rewrites_prompts and not self.calls.goes_on(given):
                    chosen = self._asking(chosen, given)
                    if max(chosen) >= 0:
                        asked = RewrittenPrompts(self.model, holder, chosen, given)
                if asked is not None:
                    given, ids, chosen = asked.given, asked.given["input_ids"], asked.chosen
                _EDIT_IDS.set(MappingProxyType({**before, id(self): chosen}))
                try:
                    with generating(ids), self.calls.looking(holder, ids, chosen):
                        output = stock(**given)
                finally:
                    _EDIT_IDS.set(before)
                if asked is None:
                    return output
                base = None
                if min(asked.chosen) < 0:
                    # Rows in which none asks are those of the batch as it was given
                    with holder.paused():
                        base = stock(**(dict(zip(names, args, strict=False)) | kwargs))
                return asked.answered(output, base)

        return generate

    def _asking(self, chosen: list[int] | None, given: dict[str, Any]) -> list[int]:
        """By row the delta that asks another question, -1 for none."""
        if chosen is not None:
            return chosen
        ids, mask = prompt_tokens(self.model, given)
        return [0] * len(ids) if self.holder.router is None else self.calls.choose(self.holder, given, ids, mask)

    def _chosen(self, edit_ids: Any, given: dict[str, Any]) -> list[int] | None:
        """By row of a call the number of a delta, -1 for none; of beams each as its prompt; None leaves it to routers.

        Raises:
            ValueError: another number of rows, a delta that there is not, or none where one has to be named.
        """
        if edit_ids is None and self.calls.goes_on(given):
            return None
        if edit_ids is None and self.select is not None:
            edit_ids = self.select(given)
        if edit_ids is None:
            if self.needs_choice:
                raise ValueError(
                    f"attach: {self.count} deltas that were fitted apart act on the rows that name them; give select, "
                    "or edit_ids with the call (got neither)"
                )
            return None
        listed = edit_ids.tolist() if isinstance(edit_ids, Tensor) else list(edit_ids)
        numbers = [-1 if each is None else int(each) for each in listed]
        tokens = next((given[n] for n in ("input_ids", "inputs", "inputs_embeds") if given.get(n) is not None), None)
        rows = len(numbers) if tokens is None else int(tokens.shape[0])
        if not numbers or rows % len(numbers):
            raise ValueError(f"attach: edit_ids has an entry for every row (got {len(numbers)} for {rows} rows)")
        for number in numbers:
            if not -1 <= number < self.count:
                raise ValueError(f"attach: edit_ids are -1 for none, or 0 to {self.count - 1} (got {number})")
        share = rows // len(numbers)
        return [number for number in numbers for _ in range(share)]

    def _refuse_assistance(self, given: dict[str, Any]) -> None:
        """Refuse ways of generating in which no one knows what is a prompt and what its answer.

        Raises:
            ValueError: names the setting.
        """
        config = given.get("generation_config") or self.model.hf.generation_config
        for name in _REFUSED:
            setting = given.get(name, getattr(config, name, None))
            if setting:
                shown = type(setting).__name__ if name == "assistant_model" else repr(setting)
                raise ValueError(
                    "attach: generate reads a prompt as a whole and then its answer token by token, without assistance "
                    f"and without chunks (got {name}={shown})"
                )


def names_of(method: Method) -> tuple[str, ...]:
    """Names of a method's positional arguments."""
    parameters = inspect.signature(method).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(parameter.name for parameter in parameters if parameter.kind in kinds) or ("input_ids",)
