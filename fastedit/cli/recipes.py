"""``fastedit recipes``: named settings, what they are for, and the scores to expect of them."""

from __future__ import annotations

from typing import Annotated, Optional

import typer
from rich.console import Console

from fastedit.cli.app import console
from fastedit.cli.options import Seed, Threads


def recipes(
    name: Annotated[Optional[str], typer.Argument(help="of a recipe; all are listed if absent")] = None,  # noqa: UP045
    run: Annotated[bool, typer.Option("--run", help="run it, and exit 1 where it falls outside")] = False,
    seed: Seed = 0,
    threads: Threads = None,
) -> None:
    """Settings that are known to work, by name: what they are for, the command, and the scores to expect."""
    if name is None:
        if run:
            raise ValueError("--run: a recipe is named (got none)")
        list_recipes(console)
        return
    if not run:
        print_recipe(console, name)
        return
    from fastedit.cli.reproduce import print_reproduction
    from fastedit.published.recipes import run_recipe

    result = run_recipe(name, seed=seed)
    print_reproduction(console, result)
    if not result.holds:
        raise typer.Exit(1)


def list_recipes(to: Console) -> None:
    """Every recipe on a line: its name, method, model with its size, data, and what it is for."""
    from fastedit.published.recipes import RECIPES

    for name, recipe in RECIPES.items():
        case = recipe.case
        size = f"{recipe.parameters / 1e6:.1f} million parameters"
        what = f"{case.method}, {case.model} ({size}), {case.edits} edits of {case.data}"
        to.print(f"{name}: {recipe.says} [{what}]", markup=False, highlight=False, soft_wrap=True)


def print_recipe(to: Console, name: str) -> None:
    """A recipe's command, and the scores that it had when it was measured."""
    from fastedit.cli.tables import HEADINGS, titled
    from fastedit.published.recipes import expected, recipe_named
    from fastedit.published.rerun import COMPARED

    recipe, row = recipe_named(name), expected(name)
    to.print(f"{recipe.says}\n{recipe.command}", markup=False, highlight=False, soft_wrap=True)
    shown, table = titled(f"{name}: expected (strict)", ("score", "mean", "95 % interval", "edits"))
    for score in COMPARED:
        if score in row.scores["strict"]:
            value = row.scores["strict"][score]
            interval = f"{value.low:.3f} to {value.high:.3f}"
            table.add_row(HEADINGS.get(score, score), f"{value.mean:.3f}", interval, str(value.n))
    to.print(shown)
