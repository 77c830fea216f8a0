"""Let fitted edits act on a model for the length of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

from fastedit.backbone import EditableModel
from fastedit.backbone.active import installing
from fastedit.backbone.context import overridden
from fastedit.deltas import EditDelta, LiveDeltas, Rows, RowsHolder, installed
from fastedit.deltas.hooks import refuse_stock
from fastedit.deltas.install import prepared
from fastedit.deltas.live import LiveHolder, Version, is_live
from fastedit.engine.stacking import Checks, Together, put_together

#: What may act: an edit, several, or those of which a store says which hold now.
Edits: TypeAlias = EditDelta | Sequence[EditDelta] | LiveDeltas


@contextmanager
def applied(
    model: EditableModel,
    delta: Edits,
    *,
    check_model: bool = True,
    check_sequence: bool = True,
) -> Iterator[EditableModel]:
    """Inside the block the model answers as edited; on leaving it is bit-identical to what it was.

    The edits act in the context that the block is entered in: other threads and tasks have the base model, or edits of
    their own. ``fastedit.edit`` inside the block edits what acts there, and its deltas belong to that model.

    Args:
        model: the base model.
        delta: one edit, or several of one method that act together, in the order in which they were made; or live ones
            (``fastedit.deltas.live.LiveDeltas``), looked up at the beginning of every call.
        check_model: refuse deltas that were fitted on another base model, or on top of other deltas.
        check_sequence: refuse deltas that act always and were not fitted on top of those before them: together they are
            not what was scored. False adds them up all the same.
    Yields:
        The same model.
    Raises:
        TypeError: something else than deltas.
        ValueError: no delta, deltas of different kinds, of another base model, or not fitted in this company.
    """
    with ExitStack() as entered:
        live = entered.enter_context(acting(model, delta, Checks(check_model, check_sequence)))
        if live is not None:
            for name in ("forward", "generate"):
                if hasattr(model.hf, name):
                    entered.enter_context(overridden(model.hf, _stock_call(live), name))
        for module in model.hf.modules():
            if hasattr(module, "save_pretrained"):
                entered.enter_context(overridden(module, lambda _stock: refuse_to_save, "save_pretrained"))
        yield model


@contextmanager
def acting(model: EditableModel, delta: Edits, checks: Checks) -> Iterator[LiveHolder | None]:
    """What ``applied`` does for the fastedit model's own calls; yields what looks up live deltas."""
    if not is_live(delta):
        together = put_together(model, delta, checks)
        with installed(model, together.stacked, Rows(), key=together.key):
            yield None
        return
    live: LiveHolder = model.stacks.made(delta, checks, lambda: live_holder(model, delta, checks))
    with live.block(), installing(live):
        yield live


def live_holder(
    model: EditableModel,
    delta: Any,
    checks: Checks,
    calls: Callable[[RowsHolder, Together], Any] = lambda _holder, _together: None,
) -> LiveHolder:
    """What looks up live deltas and makes versions of them.

    Args:
        calls: from a version's holder and deltas to the calls of a stock model in which they act.
    """

    def build(deltas: Sequence[EditDelta], before: Version | None) -> Version:
        together = put_together(model, deltas, checks, earlier=before.together if before else None, keep=False)
        holder = prepared(model, together.stacked, Rows(), key=together.key)
        return Version(deltas, holder, together, calls(holder, together))

    return LiveHolder(model, delta, build)


def _stock_call(live: LiveHolder) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Calls of the stock model inside of ``applied``: each has the version that it began with."""

    def make(stock: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not live.acts:
                return stock(*args, **kwargs)
            with live.stock_call(kwargs) as version:
                if version.holder is not None:
                    refuse_stock(version.holder)
                output = stock(*args, **kwargs)
                live.remember(kwargs, output, version)
                return output

        return call

    return make


def refuse_to_save(*_args: Any, **_options: Any) -> None:
    """Stand in for ``save_pretrained`` where edits act that are not in the weights."""
    raise ValueError(
        "save_pretrained: inside of applied the weights are still those of the base model, which would be written "
        "without the edits; save those by Run.save or fastedit.deltas.save_deltas, or leave the block to save the base"
    )
