"""The options of each kind of delta, as typed records: what a spec may hold, of which type, and what is left out.

``DeltaSpec.options`` stays a plain mapping, as it is stored; ``options_of`` reads it. An option that a kind does not
have, or one of another type, is refused where a stack is made, before anything is computed with it.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Any

from fastedit.deltas.base import DeltaSpec
from fastedit.settings import nearest, typed


@dataclass(frozen=True, kw_only=True)
class DeltaOptions:
    """What any kind may have.

    Args:
        positions: the tokens that it acts on: "all", "after_image", or of kinds that stand for answers "answer".
        router: that chooses the prompts it acts on (``fastedit.routers.ROUTERS``); None acts on all.
        artifact: id of the trained parts that it or its router needs. threshold: of a router, over the trained one.
    """

    positions: str = "all"
    router: str | None = None
    artifact: str | None = None
    threshold: float | None = None


@dataclass(frozen=True, kw_only=True)
class FullOptions(DeltaOptions):
    """A full matrix has no others."""


@dataclass(frozen=True, kw_only=True)
class LowRankOptions(DeltaOptions):
    """``rank`` r of the factors; ``scale`` of their product; ``seed`` of the first factor."""

    rank: int
    scale: float = 1.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class KeyValueOptions(DeltaOptions):
    """See ``KeyValueDelta``; the losses of neurons are absent where they have none."""

    n: int
    activation: str = "relu"
    gate: bool = False
    switches: bool = False
    seed: int = 0
    steering: float | None = None
    activation_weight: float | None = None
    memory_weight: float | None = None
    margin: float | None = None
    most: int | None = None


@dataclass(frozen=True, kw_only=True)
class AttentionMemoryOptions(KeyValueOptions):
    """See ``AttentionMemoryDelta``."""

    n: int = 0
    top_k: int = 40
    reading: str = "attn"
    search: str = "codes"
    alpha: float | str = "dynamic"
    rescale: bool = True
    own: int = 0
    gain: float = 1.0
    each: int | None = None


@dataclass(frozen=True, kw_only=True)
class SideOptions(DeltaOptions):
    """See ``SideDelta``; ``tokens`` are those that distances are taken of."""

    tokens: str
    keep: float
    alpha: float
    beta: float
    gamma: float
    weight: float
    share: float


@dataclass(frozen=True, kw_only=True)
class CodebookOptions(DeltaOptions):
    """``values`` of an entry; ``replace``: a value replaces the output or is added to it."""

    values: int = 1
    replace: bool = False


@dataclass(frozen=True, kw_only=True)
class LocalizedOptions(LowRankOptions):
    """``slots`` pairs of factors an edit; sizes of what its router keeps of a question, absent without one."""

    slots: int
    entity: int | None = None
    relation: int | None = None
    image: int | None = None


@dataclass(frozen=True, kw_only=True)
class CounterfactualOptions(DeltaOptions):
    """``scope_size`` of a point in the space of scopes; ``rank`` of the shared change, 0 for a full one; ``scale``."""

    scope_size: int
    rank: int = 0
    scale: float = 1.0


def options_of(spec: DeltaSpec, record: type[Any]) -> Any:
    """The options of a spec as the record of its kind.

    Raises:
        ValueError: an option that the kind does not have, naming the nearest; one that is absent and must be
            there; or a value of another type.
    """
    known = [field.name for field in fields(record)]
    for name, value in spec.options.items():
        if name not in known:
            raise ValueError(f"{spec.kind}: option {name!r} is not known{nearest(name, known)} (got {name}={value!r})")
    given = typed(spec.kind, record, spec.options)
    absent = [field.name for field in fields(record) if field.default is MISSING and field.name not in given]
    if absent:
        raise ValueError(f"{spec.kind}: options name {absent[0]!r} (got {dict(spec.options)})")
    return record(**given)
