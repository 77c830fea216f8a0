"""Let edits act in the stock model: its forward, ``generate``, pipelines and trainers behave edited."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from fastedit.backbone import EditableModel
from fastedit.backbone.active import installing
from fastedit.backbone.context import overridden
from fastedit.backbone.wrapping import wrap
from fastedit.deltas import Rows, RowsHolder, installed
from fastedit.deltas.live import is_live
from fastedit.engine.acting import Edits, live_holder, refuse_to_save
from fastedit.engine.attached_calls import AttachedCalls, InFlight, Select
from fastedit.engine.attached_live import LiveCalls
from fastedit.engine.stacking import Checks, Together, put_together
from fastedit.training import Artifact, load_artifact, require_artifact


class Attachment:
    """Deltas that act in a stock model until they are detached. Also a context manager, which detaches on leaving.

    Args:
        block: what is to be left. flight: calls that are under way.
    """

    def __init__(self, block: ExitStack, flight: InFlight) -> None:
        self._block, self._flight = block, flight

    def detach(self) -> None:
        """Take the deltas away; a second time does nothing. Calls that are under way end as they began."""
        self._flight.leave(self._block)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_details: object) -> None:
        self.detach()


@contextmanager
def attached(
    model: Any,
    delta: Edits,
    processor: Any = None,
    *,
    artifact: Artifact | str | Path | None = None,
    select: Select | None = None,
    check_model: bool = True,
    check_sequence: bool = True,
) -> Iterator[Any]:
    """Inside the block, in this context, any call of the stock model behaves edited.

    ``forward`` with and without labels, ``generate`` (greedy, sampling, beams), pipelines and trainers, left and right
    padding, caches. Routed deltas choose at the prompt: at the tokens before the first label, or those that are read
    into an empty cache; the choice is kept with the cache for the steps behind it. Rows for which none acts are those
    of the base model, to the bit.

    Deltas that ask another question do so in ``generate``, where prompts are those of the model's own template and come
    back as they were given; a forward with such deltas is refused. So is generation that does not read a prompt as a
    whole and its answer token by token (assisted, in chunks).

    Args:
        model: a model of transformers or PEFT, or what ``fastedit.load`` and ``fastedit.wrap`` return.
        delta: one edit, or several of one method; or live ones (``fastedit.deltas.live.LiveDeltas``), looked up at the
            beginning of every call: cached steps of a generation go on with what it began with.
        processor: of a stock model.
        artifact: trained parts that the deltas do not act without, or their file (``Run.artifact``).
        select: which delta acts on which row of a call, instead of a router; deltas need not be of a sequence then. A
            call may also say so itself: ``model(..., edit_ids=[0, -1])``, ``model.generate(..., edit_ids=[0, -1])``.
        check_model, check_sequence: see ``fastedit.applied``.
    Yields:
        The stock model.
    Raises:
        TypeError, ValueError: see ``fastedit.applied`` and ``fastedit.wrap``; or trained parts of another model.
    """
    with ExitStack() as block:
        editable = _editable(model, processor, artifact)
        yield _attach(block, editable, delta, select, check_model, check_sequence, everywhere=False)[0]


def attach(
    model: Any,
    delta: Edits,
    processor: Any = None,
    *,
    artifact: Artifact | str | Path | None = None,
    select: Select | None = None,
    check_model: bool = True,
    check_sequence: bool = True,
) -> Attachment:
    """Let edits act in the stock model, in all threads, until ``detach`` of what is returned.

    Calls that are under way in other threads end as they began.

    Args and errors: see ``attached``.
    """
    with ExitStack() as block:
        editable = _editable(model, processor, artifact)
        _, flight = _attach(block, editable, delta, select, check_model, check_sequence, everywhere=True)
        return Attachment(block.pop_all(), flight)


def _editable(model: Any, processor: Any, artifact: Artifact | str | Path | None) -> EditableModel:
    """The editable model around a stock model, with trained parts at its disposal."""
    editable = model if isinstance(model, EditableModel) else wrap(model, processor)
    if artifact is not None:
        given = artifact if isinstance(artifact, Artifact) else load_artifact(artifact)
        require_artifact(given, given.kind, editable)
        editable.artifacts[given.id] = given
    return editable


def _attach(
    block: ExitStack,
    editable: EditableModel,
    delta: Edits,
    select: Select | None,
    check_model: bool,
    check_sequence: bool,
    *,
    everywhere: bool,
) -> tuple[Any, InFlight]:
    if editable.reads_prompts_by_encoder:
        kind = editable.hf.config.model_type
        raise ValueError(
            "attach: prompts must be tokens of the decoder, by which a stock call tells prompt from answer; an encoder "
            f"reads them here, and fastedit.applied serves instead (got model_type={kind!r})"
        )
    checks = Checks(check_model, check_sequence, apart=True)
    calls: AttachedCalls | LiveCalls
    if is_live(delta):
        calls = _live_calls(block, editable, delta, select, checks, everywhere=everywhere)
    else:
        together = put_together(editable, delta, checks)
        holder: RowsHolder = block.enter_context(
            installed(editable, together.stacked, Rows(), key=together.key, stock=True, everywhere=everywhere)
        )
        calls = AttachedCalls(
            editable, holder, together.count, select=select, needs_choice=together.needs_choice, everywhere=everywhere
        )
    hf = editable.hf
    block.enter_context(overridden(hf, calls.forward, everywhere=everywhere))
    inner = getattr(hf, "language_model", None)
    if hasattr(inner, "generate"):
        # A model that embeds its prompts and lets its language model generate
        block.enter_context(overridden(inner, calls.forward, everywhere=everywhere))
    block.enter_context(overridden(hf, calls.generate, "generate", everywhere=everywhere))
    for module in hf.modules():
        if hasattr(module, "save_pretrained"):
            block.enter_context(
                overridden(module, lambda _stock: refuse_to_save, "save_pretrained", everywhere=everywhere)
            )
    return hf, calls.flight


def _live_calls(
    block: ExitStack, editable: EditableModel, delta: Any, select: Select | None, checks: Checks, *, everywhere: bool
) -> LiveCalls:
    """Calls in which live deltas act, as each finds them at its beginning."""

    def calls(holder: RowsHolder, together: Together) -> AttachedCalls:
        return AttachedCalls(
            editable, holder, together.count, select=select, needs_choice=together.needs_choice, everywhere=False
        )

    live = live_holder(editable, delta, checks, calls)
    block.enter_context(live.block())
    block.enter_context(installing(live, everywhere=everywhere))
    return LiveCalls(live, everywhere=everywhere)
