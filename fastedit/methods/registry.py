"""The registry: literal tables, nothing registers itself; and how a name with overrides becomes a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from fastedit.methods.base import EditPlan, Method, ObjectiveChoice, check_method
from fastedit.methods.ft import FT, FTVision
from fastedit.methods.grace import GRACE
from fastedit.methods.ike import IKE
from fastedit.methods.ke import KE
from fastedit.methods.ldke.editor import LDKE
from fastedit.methods.lora import LoRA
from fastedit.methods.mend import MEND
from fastedit.methods.serac.editor import SERAC
from fastedit.methods.tpatcher import TPatcher
from fastedit.methods.unike.editor import UniKE
from fastedit.methods.wise import WISE
from fastedit.objectives import Direction, InvariantConfig, InvariantObjective, KLObjective, NLLObjective
from fastedit.settings import check_ranges, nearest, typed


@dataclass(frozen=True)
class NLLConfig:
    """The plain objective has no settings."""


@dataclass(frozen=True)
class KLConfig:
    """Settings of ``kl+x``.

    Args:
        kl_weight: of the KL term.
        kl_rephrases: also fit rephrased views.
        direction: "reverse_kl" (edited || unedited) or "forward_kl".
        n_views: views of every role but the edit's own.
    """

    kl_weight: float = 1.0
    kl_rephrases: bool = False
    direction: Direction = "reverse_kl"
    n_views: int = 1

    def __post_init__(self) -> None:
        if self.direction not in ("reverse_kl", "forward_kl"):
            raise ValueError(f"kl: direction is reverse_kl or forward_kl (got direction={self.direction!r})")
        if not self.kl_weight >= 0:
            raise ValueError(f"kl: kl_weight is not negative (got kl_weight={self.kl_weight!r})")
        check_ranges("kl", self, at_least={"n_views": 1})


def _nll(_config: NLLConfig, _steps: int) -> NLLObjective:
    return NLLObjective()


def _kl(config: KLConfig, _steps: int) -> KLObjective:
    return KLObjective(
        config.kl_weight, rephrases=config.kl_rephrases, direction=config.direction, n_views=config.n_views
    )


def _checked(methods: dict[str, type[Method]]) -> dict[str, type[Method]]:
    for name, method in methods.items():
        check_method(name, method)
    return methods


METHODS = _checked({
    "ft": FT,
    "ft-vision": FTVision,
    "lora": LoRA,
    "mend": MEND,
    "ke": KE,
    "tpatcher": TPatcher,
    "unike": UniKE,
    "ldke": LDKE,
    "wise": WISE,
    "grace": GRACE,
    "serac": SERAC,
    "ike": IKE,
})  # fmt: skip

OBJECTIVES: dict[str, ObjectiveChoice] = {
    "": ObjectiveChoice(NLLConfig, _nll),
    "kl": ObjectiveChoice(KLConfig, _kl),
    "odedit": ObjectiveChoice(InvariantConfig, InvariantObjective),
}


def method_names() -> list[str]:
    """Every name that can be spelled."""
    return [f"{prefix}+{base}" if prefix else base for base in METHODS for prefix in objectives_of(METHODS[base])]


def objectives_of(method: type[Method]) -> tuple[str, ...]:
    """Names of the objectives that a method can be spelled with, "" being its own."""
    return tuple(OBJECTIVES) if method.objectives is None else method.objectives


def resolve(name: str, overrides: Mapping[str, Any], *, seed: int | None = None) -> EditPlan:
    """The plan of a method name, ``x``, ``kl+x`` or ``odedit+x``, with fields of its configs overridden.

    An override goes to every config of the plan that has a field of this name.

    Args:
        seed: of a run, for the configs that have a seed of their own and no override of it.
    Raises:
        ValueError: unknown method, objective or field (naming the nearest that exists), or a value a config refuses.
    """
    prefix, _, base = name.rpartition("+")
    if base not in METHODS:
        raise ValueError(f"method: {base!r} is not known{nearest(base, list(METHODS))} (got method={name!r})")
    if prefix not in OBJECTIVES:
        known = [key for key in OBJECTIVES if key]
        raise ValueError(f"method: objective {prefix!r} is not known{nearest(prefix, known)} (got method={name!r})")
    method, objective = METHODS[base], OBJECTIVES[prefix]
    if prefix not in objectives_of(method):
        allowed = [f"{one}+{base}" if one else base for one in objectives_of(method)]
        raise ValueError(f"method: {base!r} is spelled {' or '.join(allowed)} (got method={name!r})")
    method_fields = {field.name for field in fields(method.Config)}
    objective_fields = {field.name for field in fields(objective.config)}
    for key, value in overrides.items():
        if key not in method_fields | objective_fields:
            known = sorted(method_fields | objective_fields)
            raise ValueError(f"{name}: field {key!r} is not known{nearest(key, known)} (got {key}={value!r})")
    if seed is not None and "seed" in method_fields | objective_fields:
        overrides = {"seed": seed, **overrides}
    for_method = {key: value for key, value in overrides.items() if key in method_fields}
    for_objective = {key: value for key, value in overrides.items() if key in objective_fields}
    return EditPlan(
        name,
        method,
        method.Config(**typed(base, method.Config, for_method)),
        objective,
        objective.config(**typed(prefix, objective.config, for_objective)),
    )


def setting_names(plan: EditPlan) -> set[str]:
    """Names of every field that can be overridden."""
    return {field.name for config in (plan.config, plan.objective_config) for field in fields(config)}
