"""``fastedit info``: what is installed, and the cards of the embedded models."""

from __future__ import annotations

import json

from rich.console import Console

import fastedit
from fastedit import pocket
from fastedit.smol.models import model_card as smol_card
from fastedit.smol.names import MODEL as SMOL


def print_info(console: Console, model: str | None) -> None:
    """The card of an embedded model, or the methods and the installed kernels where none is named.

    Raises:
        ValueError: no such model.
    """
    if model is None:
        names = ", ".join((*pocket.MODELS, SMOL))
        console.print(f"fastedit {fastedit.__version__}; embedded models: {names}", markup=False)
        console.print(f"methods: {', '.join(fastedit.method_names())}", soft_wrap=True, markup=False)
        for op, devices in fastedit.implementations().items():
            console.print(f"  {op}: {devices}", markup=False)
        return
    if model not in (*pocket.MODELS, SMOL):
        raise ValueError(f"info: model is one of {sorted((*pocket.MODELS, SMOL))} (got model={model!r})")
    console.print_json(json.dumps(smol_card() if model == SMOL else pocket.model_card(model)))
