"""What a method is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from inspect import signature
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor

from fastedit.backbone import EditableModel, Site
from fastedit.deltas import DeltaSpec, EditDelta, accumulate
from fastedit.fitting.prepared import EditRows
from fastedit.fitting.solver import SolverConfig
from fastedit.objectives import NLLObjective, Objective
from fastedit.requests import EditRequest
from fastedit.settings import nearest
from fastedit.training import Artifact, Task, TrainerConfig

#: How the edits of a method add up in sequence. "accumulate": each is fitted on top of the earlier ones, and all act;
#: "route": each is fitted alone on the base model, and a router lets at most one of them act on an input; "none": not.
Accumulation = Literal["accumulate", "route", "none"]


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
class ComputedDelta:
    """A delta that is computed, not fitted.

    Args:
        tensors: by part. texts: see ``EditDelta``. options: put over those of the spec.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


class Method:
    """A base editor: its config, where its delta sits, how it is stepped.

    A method overrides ``Config``, ``sequence``, ``spec`` and ``solver``, and of the optional members what it needs. All
    are static: a method holds no state. ``check_method`` refuses a public member that is none of these.
    """

    Config: ClassVar[type]
    sequence: ClassVar[Accumulation]
    #: Names of the objectives that it can be spelled with, "" being its own; None is all.
    objectives: ClassVar[tuple[str, ...] | None] = None
    #: What ``context`` states, in words, for errors about its length.
    context_is: ClassVar[str] = "the edit"

    @staticmethod
    def spec(model: EditableModel, config: Any) -> DeltaSpec:
        """The delta's kind and sites on this model; known without anything trained."""
        raise NotImplementedError

    @staticmethod
    def solver(model: EditableModel, config: Any) -> SolverConfig:
        """The optimiser's settings on this model."""
        raise NotImplementedError

    @staticmethod
    def objective(config: Any) -> Objective:
        """Its own plain objective; by default the NLL of the target."""
        return NLLObjective()

    @staticmethod
    def setup(model: EditableModel, config: Any, resources: Resources) -> Any:
        """What all edits of a run share, made once before any of them."""
        return None

    @staticmethod
    def start(
        model: EditableModel, config: Any, shared: Any, requests: Sequence[EditRequest], rows: Sequence[EditRows]
    ) -> Sequence[Mapping[str, Tensor]]:
        """By edit, values by part that its delta starts from instead of the kind's own."""
        return [{} for _ in requests]

    @staticmethod
    def compute(
        model: EditableModel, config: Any, shared: Any, requests: Sequence[EditRequest], rows: Sequence[EditRows]
    ) -> list[ComputedDelta]:
        """Deltas that are computed at once; a method that overrides this is not fitted."""
        raise NotImplementedError

    @staticmethod
    def finish(
        model: EditableModel, config: Any, shared: Any, requests: Sequence[EditRequest], deltas: Sequence[EditDelta]
    ) -> Sequence[EditDelta]:
        """Fitted or computed deltas with what the method adds to them."""
        return deltas

    @staticmethod
    def combine(config: Any, committed: Sequence[EditDelta], new: EditDelta) -> list[EditDelta]:
        """A sequence with one more edit; by default all in one delta. Of "route", overridden or one delta an edit."""
        return [accumulate([*committed, new])] if committed else [new]

    @staticmethod
    def expecting(config: Any, committed: list[EditDelta], coming: Sequence[EditDelta]) -> list[EditDelta]:
        """A sequence, ready for ``combine`` with these edits one after another."""
        return committed

    @staticmethod
    def active_while_fitting(config: Any, committed: Sequence[EditDelta], question: str) -> Sequence[EditDelta]:
        """What acts of a sequence while the next edit, which answers that question, is made; by default the newest.

        ``question`` is as ``deltas.questions`` names it.
        """
        return committed[-1:]

    @staticmethod
    def context(config: Any, request: EditRequest) -> str:
        """Text that stands before every question once the edit is made; "" for none."""
        return ""

    @staticmethod
    def notes(model: EditableModel, config: Any) -> dict[str, Any]:
        """What provenance says of its settings on this model, plain values; by default nothing."""
        return {}

    @staticmethod
    def artifact(config: Any, name: str) -> str | None:
        """The kind of trained parts that it needs, if any; ``name`` is the method as spelled."""
        return None

    @staticmethod
    def trainer(config: Any) -> TrainerConfig:
        """Settings of the training of its trained parts."""
        return TrainerConfig()

    @staticmethod
    def task(
        model: EditableModel,
        config: Any,
        objective: Objective | None,
        records: Sequence[EditRequest],
        trainer: TrainerConfig,
    ) -> Task:
        """How its trained parts are trained."""
        raise NotImplementedError


def is_computed(method: type[Method]) -> bool:
    """Whether its deltas are computed, not fitted."""
    return method.compute is not Method.compute


def is_trained(method: type[Method]) -> bool:
    """Whether it has trained parts under some settings."""
    return method.task is not Method.task


def check_method(name: str, method: type[Method]) -> None:
    """Refuse a method that lacks what every method has, or has a public member that no method has.

    Raises:
        TypeError: names the member, and the nearest that exists.
    """
    if not issubclass(method, Method):
        raise TypeError(f"methods: {name!r} is a subclass of Method (got {method!r})")
    missing = [member for member in ("Config", "sequence") if not hasattr(method, member)]
    missing += [member for member in ("spec", "solver") if getattr(method, member) is getattr(Method, member)]
    if missing:
        raise TypeError(f"methods: {name!r} defines Config, sequence, spec and solver (got none of {missing})")
    if method.sequence not in get_args(Accumulation):
        raise TypeError(
            f"methods: sequence of {name!r} is one of {list(get_args(Accumulation))} (got {method.sequence!r})"
        )
    known = {member for member in (*vars(Method), *Method.__annotations__) if not member.startswith("_")}
    classes = [cls for cls in method.__mro__ if cls not in Method.__mro__]
    for member in dict.fromkeys(member for cls in classes for member in vars(cls)):
        if member.startswith("_"):
            continue
        if member not in known:
            raise TypeError(f"methods: {name!r} has a member {member!r} that no method has{nearest(member, known)}")
        default, value = getattr(Method, member, None), getattr(method, member)
        if default is not None and callable(default):
            wanted, given = len(signature(default).parameters), len(signature(value).parameters)
            if given != wanted:
                raise TypeError(f"methods: {member} of {name!r} takes {wanted} arguments (got {given})")
    if method.task is not Method.task and method.artifact is Method.artifact:
        raise TypeError(f"methods: {name!r} has a task, so it names its artifact (got none)")


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
        if not self.prefix:
            return self.method.objective(self.config)
        return self.objective.build(self.objective_config, steps)

    @property
    def artifact_kind(self) -> str | None:
        """The kind of trained parts that its edits need, if any."""
        return self.method.artifact(self.config, self.name)

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


#: What a fit goes beside in a layer where nobody says: the first of these that the layer has whole.
USUAL_SITES = (("up", "down"), ("gate_up", "down"), ("block",), ("down",), ("o",))


def layer_sites(model: EditableModel, layers: Sequence[int], names: Sequence[str] | None, owner: str) -> list[Site]:
    """The linear maps of some layers by name; None is a feed-forward block's, of experts the block as a whole.

    Raises:
        ValueError: a layer has none of these names. Says which it has.
    """
    if names is not None:
        return model.sites(layers, names)
    sites = []
    for layer in layers:
        known = model.adapter.text.paths_of(layer)
        chosen = next((usual for usual in USUAL_SITES if all(name in known for name in usual)), None)
        if chosen is None:
            raise ValueError(
                f"{owner}: names must say which linear maps of a layer are edited where it has none of the usual ones "
                f"(got names=None, layer={layer} with {', '.join(known)})"
            )
        sites += model.sites([layer], chosen)
    return sites


POSITIONS = ("all", "after_image")


def check_positions(owner: str, positions: str) -> None:
    """Refuse what is not one of ``POSITIONS``.

    Raises:
        ValueError: it is not.
    """
    if positions not in POSITIONS:
        raise ValueError(f"{owner}: positions is one of {list(POSITIONS)} (got positions={positions!r})")


#: Base methods that neither read prompts at the decoder's tokens nor learn from states there.
BEHIND_ENCODERS = ("lora", "ft")


def check_behind_encoder(model: EditableModel, plan: EditPlan) -> None:
    """Refuse what looks for a prompt among the decoder's tokens where an encoder reads it.

    Raises:
        ValueError: a method with keys, routers or trained parts at prompt tokens, or ``positions`` that tell tokens of
            the image from others.
    """
    if not model.reads_prompts_by_encoder:
        return
    base = plan.name.rpartition("+")[2]
    kind, got = model.hf.config.get_text_config().model_type, f"method={plan.name!r}"
    positions = getattr(plan.config, "positions", "all")
    if base in BEHIND_ENCODERS and positions == "all":
        return
    if base in BEHIND_ENCODERS:
        got = f"positions={positions!r}"
    raise ValueError(
        f"{plan.name}: prompt and image must be tokens of the decoder for what acts by them; the text model {kind!r} "
        f"has an encoder read them, and is edited by {' and '.join(BEHIND_ENCODERS)}, at all positions (got {got})"
    )


def positions_option(positions: str) -> dict[str, str]:
    """The option of a delta's spec; none for a delta that acts everywhere, as in files of earlier versions."""
    return {} if positions == "all" else {"positions": positions}
