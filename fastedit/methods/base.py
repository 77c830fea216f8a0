"""What a method is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor

from fastedit.backbone import EditableModel
from fastedit.deltas import DeltaSpec
from fastedit.fitting.solver import SolverConfig
from fastedit.objectives import Objective
from fastedit.requests import EditRequest
from fastedit.training import Artifact

#: How the edits of a method add up in sequence. "accumulate": each is fitted on top of the earlier ones, and all act;
#: "route": each is fitted alone on the base model, and a router lets at most one of them act on an input; "none": not.
Accumulation = Literal["accumulate", "route", "none"]


class Method(Protocol):
    """A base editor: its config, where its delta sits, how it is stepped.

    Besides these a method may have any of the hooks of ``HOOKS``, as static methods; see ``hook``.
    """

    Config: ClassVar[type]
    sequence: ClassVar[Accumulation]

    @staticmethod
    def spec(model: EditableModel, config: Any) -> DeltaSpec:
        """The delta's kind and sites on this model; known without anything trained."""

    @staticmethod
    def solver(model: EditableModel, config: Any) -> SolverConfig:
        """The optimiser's settings on this model."""


#: What a method may have besides, by name:
#:
#: * ``objective(config) -> Objective``: its own plain objective; else the NLL of the target.
#: * ``setup(model, config, resources) -> shared``: once per run, before any work.
#: * ``start(model, config, shared, requests, rows) -> list of {part: Tensor}``: what the deltas of edits start from.
#: * ``write(model, config, shared, requests, rows) -> list[Written]``: deltas that are computed and not fitted.
#: * ``finish(model, config, shared, requests, deltas) -> list[EditDelta]``: what is added to fitted deltas.
#: * ``combine(config, committed, new) -> list[EditDelta]``: how a sequence takes up one more edit.
#: * ``beneath(config, committed, question) -> list[EditDelta]``: what acts of a sequence while the next edit is made,
#:   which answers that question (``deltas.questions``); else the newest committed delta.
#: * ``task(model, config, objective, records, trainer) -> Task``: how its trained parts are trained.
#: * ``trainer(config) -> TrainerConfig``: settings of that training, where the usual ones do not suit.
#: * ``context(config, request) -> str``: text that stands before every question once the edit is made; "" for none.
#: * ``artifact(config, name) -> str | None``: the kind of trained parts that it needs, if any; ``name`` is as spelled.
HOOKS = (
    "objective", "setup", "start", "write", "finish", "combine", "beneath", "task", "trainer", "context", "artifact",
)  # fmt: skip


def hook(method: type[Method], name: str) -> Callable[..., Any] | None:
    """One of the ``HOOKS`` of a method, or None where it has no such."""
    found: Callable[..., Any] | None = getattr(method, name, None)
    return found


@dataclass(frozen=True)
class Resources:
    """What a run gives to a method.

    Args:
        pool: records that may be learned from; none of the edits.
        artifact: trained parts.
        seed: of the run.
        prefix: the objective's name, "" for the plain one.
    """

    pool: Sequence[EditRequest] = ()
    artifact: Artifact | None = None
    seed: int = 0
    prefix: str = ""


@dataclass(frozen=True)
class Written:
    """A delta that was computed.

    Args:
        tensors: by part. texts: see ``EditDelta``. options: put over those of the spec.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ObjectiveChoice:
    """A spelled objective: its config class and how it is made for a number of steps."""

    config: type
    build: Callable[[Any, int], Objective]


@dataclass(frozen=True)
class EditPlan:
    """A method name with its settings, ready for any model.

    Args:
        name: as spelled, e.g. "odedit+lora".
        method: the base editor.
        config: its settings.
        objective: the objective's choice and ``objective_config`` its settings.
    """

    name: str
    method: type[Method]
    config: Any
    objective: ObjectiveChoice
    objective_config: Any

    @property
    def prefix(self) -> str:
        """The objective's name, "" for the method's own."""
        return self.name.rpartition("+")[0]

    def build_objective(self, steps: int) -> Objective:
        """The objective for a number of optimiser steps."""
        own = hook(self.method, "objective")
        if own is not None and not self.prefix:
            made: Objective = own(self.config)
            return made
        return self.objective.build(self.objective_config, steps)

    def settings(self) -> dict[str, Any]:
        """Every setting by its name, plain values, for provenance."""
        return {"method": asdict(self.config), "objective": asdict(self.objective_config)}


def last_layers(layers: int | tuple[int, ...], n_layers: int, owner: str) -> tuple[int, ...]:
    """Layer numbers: an int n means the last n; a tuple is taken as it is (negative numbers count from the end).

    Raises:
        ValueError: a layer that the model does not have.
    """
    chosen = tuple(range(n_layers - layers, n_layers)) if isinstance(layers, int) else tuple(layers)
    if isinstance(layers, int) and not 1 <= layers <= n_layers:
        raise ValueError(f"{owner}: layers is 1 to {n_layers} on this model (got layers={layers!r})")
    resolved = tuple(sorted({layer + n_layers if layer < 0 else layer for layer in chosen}))
    if not resolved or resolved[0] < 0 or resolved[-1] >= n_layers:
        raise ValueError(f"{owner}: layers lie in 0 to {n_layers - 1} on this model (got layers={layers!r})")
    return resolved


POSITIONS = ("all", "after_image")


def check_positions(owner: str, positions: str) -> None:
    """Refuse what is not one of ``POSITIONS``.

    Raises:
        ValueError: it is not.
    """
    if positions not in POSITIONS:
        raise ValueError(f"{owner}: positions is one of {list(POSITIONS)} (got positions={positions!r})")


def positions_option(positions: str) -> dict[str, str]:
    """The option of a delta's spec; none for a delta that acts everywhere, as in files of earlier versions."""
    return {} if positions == "all" else {"positions": positions}
