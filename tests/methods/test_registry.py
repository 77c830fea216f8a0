"""Names with overrides become plans; what does not exist is named with its nearest neighbour."""

from __future__ import annotations

from typing import Any

import pytest

from fastedit.methods import METHODS, LoRA, LoRAConfig, method_names, resolve
from fastedit.methods.base import Method, check_method
from fastedit.methods.registry import objectives_of
from fastedit.objectives import InvariantObjective, KLObjective, NLLObjective, Role


def test_every_name_resolves() -> None:
    assert len(method_names()) == sum(len(objectives_of(method)) for method in METHODS.values())
    assert all("" in objectives_of(method) for method in METHODS.values())
    for name in method_names():
        plan = resolve(name, {})
        objective = plan.build_objective(10)
        own = plan.method.objective is not Method.objective
        expected = {"": NLLObjective, "kl": KLObjective, "odedit": InvariantObjective}[plan.prefix]
        assert isinstance(objective, expected) or (own and not plan.prefix)
        assert Role.EDIT in objective.roles


def test_where_nothing_is_fitted_no_objective_can_be_put() -> None:
    with pytest.raises(ValueError, match=r"'ike' is spelled ike \(got method='odedit\+ike'\)"):
        resolve("odedit+ike", {})


def test_overrides_reach_every_config_that_has_the_field() -> None:
    plan = resolve("odedit+lora", {"rank": 3, "penalty": "paper", "seed": 7})
    assert plan.config.rank == 3
    assert plan.objective_config.penalty == "paper"
    assert plan.config.seed == plan.objective_config.seed == 7
    assert plan.settings()["method"]["rank"] == 3


def test_the_seed_of_a_run_reaches_every_config_that_draws() -> None:
    plan = resolve("odedit+lora", {}, seed=5)
    assert plan.config.seed == plan.objective_config.seed == 5
    assert resolve("odedit+lora", {"seed": 7}, seed=5).config.seed == 7
    assert resolve("ldke", {}, seed=5).config.seed == 5
    # Nothing to draw
    assert resolve("grace", {}, seed=5).settings() == resolve("grace", {}).settings()


def test_no_method_knows_the_objective() -> None:
    with pytest.raises(ValueError, match="lora: field 'penalty' is not known"):
        resolve("lora", {"penalty": "paper"})


@pytest.mark.parametrize("name", ["", "odedit", "odedit+", "ft+odedit", "odedit+odedit+ft", "FT"])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"method: .* is not known"):
        resolve(name, {})


class _Editor(Method):
    Config = LoRAConfig
    sequence = "accumulate"
    spec = staticmethod(LoRA.spec)
    solver = staticmethod(LoRA.solver)


def _method(**members: Any) -> type[Method]:
    return type("Changed", (_Editor,), members)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (LoRAConfig, "is a subclass of Method"),
        (
            type("Bare", (Method,), {}),
            "defines Config, sequence, spec and solver",
        ),
        (_method(sequence="add"), r"sequence of 'x' is one of .*\(got 'add'\)"),
        (
            _method(finnish=staticmethod(lambda *_: [])),
            "a member 'finnish' that no method has; did you mean 'finish'",
        ),
        (_method(context=staticmethod(lambda config: "")), r"context of 'x' takes 2 arguments \(got 1\)"),
        (_method(task=staticmethod(lambda m, c, o, r, t: None)), "has a task, so it names its artifact"),
    ],
)
def test_a_method_is_refused_where_it_is_none(method: type[Method], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        check_method("x", method)


def test_every_method_is_checked() -> None:
    check_method("x", _Editor)
    for name, method in METHODS.items():
        check_method(name, method)
