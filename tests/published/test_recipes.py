"""Recipes: each runs, and scores what is expected of it."""

from __future__ import annotations

import functools
import shlex
from typing import Any

import click
import pytest
import typer
from typer.testing import CliRunner

import fastedit
from fastedit.cli.main import app
from fastedit.published import recipes, rerun
from fastedit.published.recipes import RECIPES, expected

runner = CliRunner()
load_once, records_once = functools.cache(fastedit.load), functools.cache(rerun.records)


@pytest.fixture(autouse=True)
def _once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is loaded, and a set of records made, once for all recipes."""
    monkeypatch.setattr(rerun, "load", load_once)
    monkeypatch.setattr(rerun, "records", records_once)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_scores_what_is_expected(name: str) -> None:
    result = recipes.run_recipe(name, show_progress=False)
    assert len(result.comparisons) >= 4
    assert [each.name for each in result.comparisons if not each.holds] == []


def test_what_is_shown_is_what_is_run() -> None:
    assert len(RECIPES) >= 6
    listed = runner.invoke(app, ["recipes"], catch_exceptions=False).stdout
    commands: Any = typer.main.get_command(app)
    for name, recipe in RECIPES.items():
        case, words = recipe.case, shlex.split(recipe.command)[1:]
        assert f"{name}: {recipe.says} [{case.method}, {case.model} (1.8 million parameters)" in listed
        with commands.commands[words[0]].make_context(words[0], words[1:], parent=click.Context(commands)) as made:
            given = [made.params[each] for each in ("model", "data", "method", "limit")]
        assert given == [case.model, case.data, case.method, case.edits]
        assert (made.params["mode"] or "single") == case.mode
        assert expected(name).case == case
        assert recipe.parameters == fastedit.pocket.model_card(case.model)["parameters"]
    shown = runner.invoke(app, ["recipes", "apart"], catch_exceptions=False).stdout
    assert RECIPES["apart"].command in shown
    assert "0." in shown


def test_what_falls_outside_ends_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    row = expected("apart")
    scores = {**row.scores["strict"], "reliability": fastedit.evaluation.Score(0.1, 0.05, 0.2, 8)}
    wrong = type(row)(row.case, {**row.scores, "strict": scores}, row.weights, row.commit, row.versions)
    monkeypatch.setattr(recipes, "expected", lambda _name: wrong)
    done = runner.invoke(app, ["recipes", "apart", "--run"], catch_exceptions=False)
    assert done.exit_code == 1
    assert "not reproduced: reliability" in done.stdout
    for line, message in (
        (["recipes", "aprat"], "the nearest is 'apart'"),
        (["recipes", "--run"], "a recipe is named"),
    ):
        with pytest.raises(ValueError, match=message):
            runner.invoke(app, line, catch_exceptions=False)
