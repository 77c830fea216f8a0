"""Named settings that are known to work: a method, a model, data, and the scores to expect of them."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastedit.published.case import Case
from fastedit.published.rerun import Reproduction, run_again
from fastedit.published.rows import PublishedRow, published_rows

#: Scores that were measured, a line a recipe; written by ``python benchmarks/recipes.py --record``.
EXPECTED = Path(__file__).parent / "recipes.jsonl.gz"
BATCH_SIZE = 16


@dataclass(frozen=True)
class Recipe:
    """Settings with a name, which is the label of the case.

    Args:
        says: what they are for. case: what is run. parameters: of the model.
    """

    says: str
    case: Case
    parameters: int = 1_824_640

    @property
    def command(self) -> str:
        """The same on the command line."""
        case = self.case
        words = ["fastedit", "edit", "--model", case.model, "--data", case.data, "--method", case.method]
        words += ["--limit", str(case.edits)] + (["--mode", case.mode] if case.mode != "single" else [])
        for name, value in case.settings.items():
            words += ["--set", f"{name}={value}"]
        return shlex.join([*words, "--out", f"runs/{case.label}"])


def _named(table: str, label: str, method: str, edits: int, data: str = "pocket-vqa") -> Case:
    return Case(table, "pocket-llava", data, method, label=label, edits=edits)


_ALL = (
    Recipe("single facts kept apart: each acts near its own question alone", _named("single", "apart", "grace", 8)),
    Recipe("a low-rank change an edit, for PEFT and vLLM", _named("single", "adapters", "lora", 8)),
    Recipe("adapters that hold what must stay by a KL term", _named("single", "adapters-kl", "kl+lora", 6)),
    Recipe("adapters under ODEdit's objective", _named("single", "adapters-odedit", "odedit+lora", 4)),
    Recipe("a change of the last weights, for a merged checkpoint", _named("single", "weights", "ft", 8)),
    Recipe("longer answers: captions of images", _named("single", "captions", "lora", 6, "pocket-caption")),
    Recipe("a sequence in which all edits act together", _named("sequential", "sequence", "grace", 12)),
)
RECIPES: Mapping[str, Recipe] = {recipe.case.label: recipe for recipe in _ALL}


def recipe_named(name: str) -> Recipe:
    """Return a recipe.

    Raises:
        ValueError: there is none of this name; the message names the nearest.
    """
    if name not in RECIPES:
        nearest = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"recipes: name is one of {', '.join(RECIPES)} (got name={name!r}; the nearest is {nearest!r})"
        )
    return RECIPES[name]


def expected(name: str) -> PublishedRow:
    """What a recipe scored when it was measured.

    Raises:
        ValueError: no such recipe.
    """
    return published_rows(EXPECTED)[recipe_named(name).case.name]


def run_recipe(name: str, *, seed: int = 0, show_progress: bool = True) -> Reproduction:
    """Run a recipe and compare its scores with those that are expected.

    Raises:
        ValueError: no such recipe, or one that was measured on other weights than its model has.
    """
    return run_again(
        expected(name), limit=None, batch_size=BATCH_SIZE, seed=seed, artifacts=Path("runs/recipes"),
        show_progress=show_progress,
    )  # fmt: skip
