"""The implementations that are compared, under one signature; and the engine run otherwise, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import fastedit
from benchmarks.baselines import peft_loop, plain_loop
from benchmarks.cases import Case
from benchmarks.outcome import Fitted
from benchmarks.variants import as_run, is_variant
from fastedit.backbone import EditableModel
from fastedit.backbone.cpu_linear import torch_products
from fastedit.requests import EditRequest

Implementation = Callable[[EditableModel, Sequence[EditRequest], Case], Fitted]

ENGINE = "engine"


def engine(model: EditableModel, edits: Sequence[EditRequest], case: Case) -> Fitted:
    """The engine, through its public function."""
    run = fastedit.edit(
        model,
        edits,
        case.method,
        batch_size=case.batch_size,
        evaluate=case.evaluate,
        seed=case.seed,
        show_progress=False,
        **case.overrides,
    )
    return Fitted(run.deltas, run.outcomes, run.timing.seconds, run.edit_scores)


def plain(model: EditableModel, edits: Sequence[EditRequest], case: Case) -> Fitted:
    """The plain loop, on the model as transformers runs it."""
    with torch_products(model.hf):
        return plain_loop.run(model, edits, case.plan(), evaluate=case.evaluate, seed=case.seed)


def peft(model: EditableModel, edits: Sequence[EditRequest], case: Case) -> Fitted:
    """Transformers and peft."""
    with torch_products(model.hf):
        return peft_loop.run(model, edits, case.plan(), evaluate=case.evaluate)


def plain_onednn(model: EditableModel, edits: Sequence[EditRequest], case: Case) -> Fitted:
    """The plain loop with the engine's products: what is left is not theirs."""
    return plain_loop.run(model, edits, case.plan(), evaluate=case.evaluate, seed=case.seed)


IMPLEMENTATIONS: Mapping[str, Implementation] = {
    ENGINE: engine,
    "plain_loop": plain,
    "peft": peft,
    "plain_onednn": plain_onednn,
}


def run(name: str, model: EditableModel, edits: Sequence[EditRequest], case: Case) -> Fitted:
    """Run an implementation or a variant of the engine.

    Args:
        name: of the implementation.
        model: the case's; for a variant with another dtype, that one's.
        edits: of the case; a variant may take fewer.
        case: as it is, also for a variant.
    """
    own = as_run(case, name)
    return IMPLEMENTATIONS[ENGINE if is_variant(name) else name](model, edits[: own.edits], own)


def forget(model: EditableModel) -> None:
    """Drop all that is remembered, so that every timed run starts with nothing but the model."""
    model.forget()
