"""What the recipes of ``fastedit recipes`` score: run all of them, and store it where the package ships it.

python benchmarks/recipes.py            every recipe beside what is stored
python benchmarks/recipes.py --record   store what was measured
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

if __name__ == "__main__":
    import _package  # noqa: F401

import fastedit
from fastedit.backbone import weights_hash
from fastedit.engine import Run
from fastedit.published.case import Case
from fastedit.published.recipes import BATCH_SIZE, EXPECTED, RECIPES
from fastedit.published.rerun import run_case
from fastedit.published.rows import PROTOCOLS, packed


def recorded(case: Case, run: Run, weights: str) -> dict[str, Any]:
    """A row as it is stored."""
    scores = {
        protocol: {
            name: [each.mean, each.low, each.high, each.n] for name, each in run.scores[protocol].items() if each.n
        }
        for protocol in PROTOCOLS
    }
    row = {"case": {**dataclasses.asdict(case), "name": case.name}, "scores": scores, "weights": weights}
    return {**row, "provenance": run.provenance}


def main(store: Annotated[bool, typer.Option("--record", help="store what was measured")] = False) -> None:
    """Run every recipe."""
    models: dict[str, Any] = {}
    rows = []
    for name, recipe in RECIPES.items():
        model = models.setdefault(recipe.case.model, fastedit.load(recipe.case.model))
        run = run_case(
            model, recipe.case, batch_size=BATCH_SIZE, seed=0, artifacts=Path("runs/recipes"), show_progress=False
        )
        rows.append(recorded(recipe.case, run, weights_hash(model.hf)))
        strict = run.scores["strict"]
        told = ", ".join(f"{each} {strict[each]}" for each in ("reliability", "text_generality") if each in strict)
        print(f"{name}: {told}", flush=True)
    if store:
        EXPECTED.write_bytes(packed(rows))


if __name__ == "__main__":
    typer.run(main)
