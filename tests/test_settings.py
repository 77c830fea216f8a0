"""Settings: types by annotation, numbers by range, each refusal with the field, the rule and the value."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

import numpy
import pytest

import fastedit
from fastedit.methods import METHODS, resolve
from fastedit.methods.registry import OBJECTIVES
from fastedit.settings import SIZES, check_ranges, typed
from fastedit.training import TrainerConfig

CONFIGS = [*(m.Config for m in METHODS.values()), *(o.config for o in OBJECTIVES.values()), TrainerConfig]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.__name__)
def test_every_default_fits_its_own_annotation(config: type) -> None:
    defaults = vars(config())
    assert typed("x", config, defaults) == defaults


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.__name__)
def test_no_field_takes_a_value_of_another_type(config: type) -> None:
    for name, hint in get_type_hints(config).items():
        for value in ({"a": 1}, [[1]], b"x", math.nan, math.inf, 10**400, object(), ["a", 1]):
            with pytest.raises(ValueError, match=rf"^x: {name} must be .* \(got {name}="):
                typed("x", config, {name: value})
        if hint is not bool and "bool" not in str(hint):
            with pytest.raises(ValueError, match=f"x: {name} must be"):
                typed("x", config, {name: True})


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.__name__)
def test_every_number_has_a_range(config: type) -> None:
    free = {"seed", "beta", "layer"}
    for field in fields(config):
        hint = str(get_type_hints(config)[field.name])
        if field.name not in free and ("int" in hint or "float" in hint):
            value: Any = (-2.0,) * 3 if hint.startswith("tuple[float, float, ") else (-1.0, 0.5)
            value = value if hint.startswith("tuple") else -1
            with pytest.raises(ValueError, match=field.name):
                config(**typed("x", config, {field.name: value}))


@pytest.mark.parametrize(
    ("method", "overrides", "message"),
    [
        (
            "lora",
            {"layers": "two"},
            "lora: layers must be a whole number or a list of whole numbers (got layers='two')",
        ),
        ("lora", {"layers": True}, "lora: layers must be a whole number or a list of whole numbers (got layers=True)"),
        ("lora", {"layers": (1, "2")}, "lora: layers must be a whole number or a list of whole numbers"),
        ("lora", {"layers": 0}, "lora: layers is at least 1 (got layers=0)"),
        ("lora", {"layers": ()}, "lora: layers names at least one (got layers=())"),
        ("lora", {"layers": (1, 1)}, "lora: layers names each once (got layers=(1, 1))"),
        ("ft", {"names": ("up", "up")}, "ft: names names each once (got names=('up', 'up'))"),
        ("lora", {"names": "up"}, "lora: names must be a list of texts or None (got names='up')"),
        ("lora", {"lr": [1]}, "lora: lr must be a finite number or None (got lr=[1])"),
        ("lora", {"lr": math.nan}, "lora: lr must be a finite number or None (got lr=nan)"),
        ("lora", {"lr": 0}, "solver: lr is positive or None (got lr=0.0)"),
        ("lora", {"steps": "1e9x"}, "lora: steps must be a whole number (got steps='1e9x')"),
        ("lora", {"steps": 3.0}, "lora: steps must be a whole number (got steps=3.0)"),
        ("lora", {"steps": -1}, "solver: steps is not negative (got steps=-1)"),
        ("lora", {"rank": -1}, "lora: rank is at least 1 (got rank=-1)"),
        ("lora", {"clip": 0}, "solver: clip is positive or None (got clip=0.0)"),
        ("ft-vision", {"weight_decay": -1}, "solver: weight_decay is not negative (got weight_decay=-1.0)"),
        ("grace", {"replace": 1}, "grace: replace must be True or False (got replace=1)"),
        ("kl+ft", {"direction": 3}, "kl: direction must be 'forward_kl' or 'reverse_kl' (got direction=3)"),
        ("odedit+ft", {"weights": (1, 1)}, "odedit: weights must be a list of 3 numbers (got weights=(1, 1))"),
        ("odedit+ft", {"penalty": None}, "odedit: penalty must be text (got penalty=None)"),
    ],
)
def test_resolve_says_what_a_setting_must_be(method: str, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"must|is|names") as caught:
        resolve(method, overrides)
    assert str(caught.value).startswith(message)


def test_values_come_out_as_annotated() -> None:
    config = resolve(
        "lora", {"layers": [1, 2], "names": ["up"], "alpha": numpy.float32(2), "rank": numpy.int64(3)}
    ).config
    assert (config.layers, config.names, config.alpha, config.rank) == ((1, 2), ("up",), 2.0, 3)
    assert type(config.rank) is int
    assert type(resolve("lora", {"alpha": 2}).config.alpha) is float
    assert resolve("unike", {"alpha": 1}).config.alpha == 1.0
    assert resolve("unike", {"alpha": "dynamic"}).config.alpha == "dynamic"


def test_ranges_name_the_field_the_rule_and_the_value() -> None:
    @dataclass
    class Config:
        share: float = 0.5
        count: int = 1

    check_ranges("x", Config(1.0, 2), shares=("share",), at_least={"count": 2})
    for value in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"x: share is a share, 0 to 1 \(got share="):
            check_ranges("x", Config(value), shares=("share",))


def test_the_python_api_checks_settings_of_training_too() -> None:
    model = fastedit.load("random:llava-tiny")
    records = [fastedit.EditRequest("What?", "red"), fastedit.EditRequest("Who?", "blue")]
    with pytest.raises(ValueError, match=r"lora: layers must be a whole number .* \(got layers='two'\)"):
        fastedit.edit(model, records, "lora", layers="two")
    with pytest.raises(ValueError, match=r"train: lr must be a finite number \(got lr='fast'\)"):
        fastedit.train(model, "mend", records, trainer={"lr": "fast"})
    with pytest.raises(ValueError, match=r"train: seed must be a whole number \(got seed=1.5\)"):
        fastedit.train(model, "mend", records, trainer=TrainerConfig(seed=1.5))  # type: ignore[arg-type]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.__name__)
def test_sizes_end_before_the_memory_does(config: type) -> None:
    for name in SIZES.intersection(vars(config())):
        with pytest.raises(ValueError, match=rf"{name} is at most 65536.* \(got {name}=1000000000\)"):
            config(**{name: 10**9})


def test_a_size_is_refused_before_anything_is_allocated() -> None:
    model = fastedit.load("random:llava-tiny")
    with pytest.raises(ValueError, match=r"^lora: rank is at most 65536 \(got rank=1000000000\)"):
        fastedit.edit(model, [fastedit.EditRequest("what?", "red")], method="lora", rank=10**9)
