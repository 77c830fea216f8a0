"""What a method is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

from fastedit.backbone import EditableModel
from fastedit.deltas import DeltaSpec
from fastedit.objectives import Objective
from fastedit.solver import SolverConfig


class Method(Protocol):
    """A base editor: its config, where its delta sits, how it is stepped."""

    Config: ClassVar[type]

    @staticmethod
    def spec(model: EditableModel, config: Any) -> DeltaSpec:
        """The delta's kind and sites on this model."""

    @staticmethod
    def solver(model: EditableModel, config: Any) -> SolverConfig:
        """The optimiser's settings on this model."""


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
