"""Let edits act in the stock model: its forward, ``generate``, pipelines and trainers behave edited."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from fastedit.backbone import EditableModel
from fastedit.backbone.context import overridden
from fastedit.backbone.stock import StockCalls, generating, is_inside
from fastedit.backbone.wrapping import wrap
from fastedit.deltas import EditDelta, Rows, RowsHolder, accumulate, installed, stack
from fastedit.engine.apply import checked_deltas, memories, refuse_to_save, require_sequence

#: From the arguments of a forward to the number of the delta that acts on each row; -1 or None is none.
Select = Callable[[dict[str, Any]], Sequence[int | None]]
#: Which delta acts on each row of the ``generate`` that runs in this context.
_EDIT_IDS: ContextVar[Any] = ContextVar("fastedit_edit_ids", default=None)


class Attachment:
    """Deltas that act in a stock model until they are detached. Also a context manager, which detaches on leaving.

    Args:
        block: what is to be left.
    """

    def __init__(self, block: ExitStack) -> None:
        self._block = block

    def detach(self) -> None:
        """Take the deltas away; a second time does nothing."""
        self._block.close()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_details: object) -> None:
        self.detach()


@contextmanager
def attached(
    model: Any,
    delta: EditDelta | Sequence[EditDelta],
    processor: Any = None,
    *,
    select: Select | None = None,
    check_model: bool = True,
    check_sequence: bool = True,
) -> Iterator[Any]:
    """Inside the block, in this context, any call of the stock model behaves edited.

    ``forward`` with and without labels, ``generate`` (greedy, sampling, beams), pipelines and trainers, left and right
    padding, caches. Routed deltas choose at the prompt: at the tokens before the first label, or those that are read
    into an empty cache; the choice is kept with the cache for the steps behind it. Rows for which none acts are those
    of the base model, to the bit.

    Args:
        model: a model of transformers or PEFT, or what ``fastedit.load`` and ``fastedit.wrap`` return.
        delta: one edit, or several of one method.
        processor: of a stock model.
        select: which delta acts on which row of a call, instead of a router; deltas need not be of a sequence then. A
            call may also say so itself: ``model(..., edit_ids=[0, -1])``, ``model.generate(..., edit_ids=[0, -1])``.
        check_model, check_sequence: see ``fastedit.applied``.
    Yields:
        The stock model.
    Raises:
        TypeError, ValueError: see ``fastedit.applied`` and ``fastedit.wrap``; or deltas that ask another question,
            which a stock call cannot.
    """
    with ExitStack() as block:
        yield _attach(block, model, delta, processor, select, check_model, check_sequence, everywhere=False)


def attach(
    model: Any,
    delta: EditDelta | Sequence[EditDelta],
    processor: Any = None,
    *,
    select: Select | None = None,
    check_model: bool = True,
    check_sequence: bool = True,
) -> Attachment:
    """Let edits act in the stock model, in all threads, until ``detach`` of what is returned.

    Args and errors: see ``attached``.
    """
    with ExitStack() as block:
        _attach(block, model, delta, processor, select, check_model, check_sequence, everywhere=True)
        return Attachment(block.pop_all())


def _attach(
    block: ExitStack,
    model: Any,
    delta: EditDelta | Sequence[EditDelta],
    processor: Any,
    select: Select | None,
    check_model: bool,
    check_sequence: bool,
    *,
    everywhere: bool,
) -> Any:
    editable = model if isinstance(model, EditableModel) else wrap(model, processor)
    deltas = checked_deltas(editable, delta, check_model=check_model)
    for each in deltas:
        if "template" in each.texts or not each.spec.sites:
            raise ValueError(
                f"attach: a delta of kind {each.spec.kind!r} asks another question, which a stock call cannot; use "
                f"answer or generate of the fastedit model (got the delta of request {each.request_id!r})"
            )
    routed = "router" in deltas[0].spec.options
    together = memories(deltas, check_sequence) if routed else deltas
    if not routed and len(deltas) > 1 and (not check_sequence or any(each.fitted_on for each in deltas)):
        if check_sequence:
            require_sequence(deltas)
        together = [accumulate(deltas)]
    stacked = stack(together, device=editable.device)
    key = "|".join(each.id for each in together)
    holder: RowsHolder = block.enter_context(
        installed(editable, stacked, Rows(), key=key, stock=True, everywhere=everywhere)
    )
    calls = StockCalls(editable)
    needs_choice = len(together) > 1 and not routed

    def make(stock: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, edit_ids: Any = None, **kwargs: Any) -> Any:
            if not holder.acts or is_inside(holder):
                return stock(*args, **kwargs)
            tokens = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
            rows = 0 if tokens is None else int(tokens.shape[0])
            given = edit_ids if edit_ids is not None else _EDIT_IDS.get()
            if given is None and select is not None:
                given = select({**dict(zip(("input_ids",), args, strict=False)), **kwargs})
            chosen = None if given is None else _chosen(given, rows, len(together))
            if chosen is None and needs_choice and not calls.goes_on(kwargs):
                raise ValueError(
                    f"attach: {len(together)} deltas that were fitted apart act on the rows that name them; give "
                    "select, or edit_ids with the call (got neither)"
                )
            return calls.forward(stock, holder, chosen, args, kwargs)

        return forward

    def make_generate(stock: Callable[..., Any]) -> Callable[..., Any]:
        def generate(*args: Any, edit_ids: Any = None, **kwargs: Any) -> Any:
            if not holder.acts:
                return stock(*args, **kwargs)
            ids = args[0] if args and isinstance(args[0], Tensor) else kwargs.get("input_ids", kwargs.get("inputs"))
            before = _EDIT_IDS.get()
            _EDIT_IDS.set(before if edit_ids is None else edit_ids)
            try:
                with generating(ids):
                    return stock(*args, **kwargs)
            finally:
                _EDIT_IDS.set(before)

        return generate

    hf = editable.hf
    block.enter_context(overridden(hf, make, everywhere=everywhere))
    inner = getattr(hf, "language_model", None)
    if hasattr(inner, "generate"):
        # A model that embeds its prompts and lets its language model generate
        block.enter_context(overridden(inner, make, everywhere=everywhere))
    block.enter_context(overridden(hf, make_generate, "generate", everywhere=everywhere))
    for module in hf.modules():
        if hasattr(module, "save_pretrained"):
            block.enter_context(
                overridden(module, lambda _stock: refuse_to_save, "save_pretrained", everywhere=everywhere)
            )
    return hf


def _chosen(given: Any, rows: int, deltas: int) -> list[int]:
    """By row the number of a delta, -1 for none; of beams each as its prompt.

    Raises:
        ValueError: another number of rows, or a delta that there is not.
    """
    listed = given.tolist() if isinstance(given, Tensor) else list(given)
    numbers = [-1 if each is None else int(each) for each in listed]
    if not numbers or rows % len(numbers):
        raise ValueError(f"attach: edit_ids has an entry for every row (got {len(numbers)} for {rows} rows)")
    for number in numbers:
        if not -1 <= number < deltas:
            raise ValueError(f"attach: edit_ids are -1 for none, or 0 to {deltas - 1} (got {number})")
    share = rows // len(numbers)
    return [number for number in numbers for _ in range(share)]
