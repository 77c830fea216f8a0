"""Names with overrides become plans; what does not exist is named with its nearest neighbour."""

from __future__ import annotations

import pytest

from fastedit.methods import METHODS, OBJECTIVES, method_names, resolve
from fastedit.objectives import InvariantObjective, KLObjective, NLLObjective


def test_every_name_resolves() -> None:
    assert len(method_names()) == len(METHODS) * len(OBJECTIVES)
    for name in method_names():
        plan = resolve(name, {})
        objective = plan.build_objective(10)
        expected = {"": NLLObjective, "kl": KLObjective, "odedit": InvariantObjective}[name.rpartition("+")[0]]
        assert isinstance(objective, expected)


def test_overrides_reach_every_config_that_has_the_field() -> None:
    plan = resolve("odedit+lora", {"rank": 3, "penalty": "paper", "seed": 7})
    assert plan.config.rank == 3
    assert plan.objective_config.penalty == "paper"
    assert plan.config.seed == plan.objective_config.seed == 7
    assert plan.settings()["method"]["rank"] == 3


def test_no_method_knows_the_objective() -> None:
    with pytest.raises(ValueError, match="lora: field 'penalty' is not known"):
        resolve("lora", {"penalty": "paper"})


@pytest.mark.parametrize("name", ["", "odedit", "odedit+", "ft+odedit", "odedit+odedit+ft", "FT"])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"method: .* is not known"):
        resolve(name, {})
