"""The kinds of deltas by name, and many deltas of a kind as one: beside each other, or one after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastedit.deltas.attention_memory import AttentionMemoryDelta, accumulate_attention_memory
from fastedit.deltas.base import DeltaSpec, EditDelta, StackedDelta
from fastedit.deltas.codebook import CodebookDelta
from fastedit.deltas.company import company
from fastedit.deltas.context import ContextDelta
from fastedit.deltas.counterfactual import CounterfactualDelta
from fastedit.deltas.full import FullDelta, accumulate_full
from fastedit.deltas.key_value import KeyValueDelta, accumulate_key_value, joined_key_value
from fastedit.deltas.localized import LocalizedDelta
from fastedit.deltas.low_rank import LowRankDelta, accumulate_low_rank, joined_low_rank
from fastedit.deltas.mapped import MappedStack
from fastedit.deltas.options import (
    AttentionMemoryOptions,
    CodebookOptions,
    CounterfactualOptions,
    DeltaOptions,
    FullOptions,
    KeyValueOptions,
    LocalizedOptions,
    LowRankOptions,
    SideOptions,
    options_of,
)
from fastedit.deltas.questions import QUESTIONS, joined_questions
from fastedit.deltas.side import SideDelta, accumulate_side
from fastedit.routers import READ_PARTS


@dataclass(frozen=True)
class Kind:
    """What there is of a kind of delta.

    Args:
        stacked: many of them, for fitting and application. options: record of its options.
        accumulate: deltas in sequence as one; None where they act one at a time.
        joined: deltas of different sizes as deltas of one spec; None where specs must be equal.
    """

    stacked: Callable[..., StackedDelta]
    options: type[DeltaOptions]
    accumulate: Callable[[Sequence[EditDelta]], EditDelta] | None = None
    joined: Callable[[Sequence[EditDelta]], list[EditDelta]] | None = None


#: What is written once, in storage too, and read by name. A new kind is a module and a line here.
KINDS: dict[str, Kind] = {
    "full": Kind(FullDelta, FullOptions, accumulate_full),
    "low_rank": Kind(LowRankDelta, LowRankOptions, accumulate_low_rank, joined_low_rank),
    "key_value": Kind(KeyValueDelta, KeyValueOptions, accumulate_key_value, joined_key_value),
    "attention_memory": Kind(AttentionMemoryDelta, AttentionMemoryOptions, accumulate_attention_memory),
    "side": Kind(SideDelta, SideOptions, accumulate_side),
    "codebook": Kind(CodebookDelta, CodebookOptions),
    "localized": Kind(LocalizedDelta, LocalizedOptions),
    "context": Kind(ContextDelta, DeltaOptions),
    "counterfactual": Kind(CounterfactualDelta, CounterfactualOptions),
}


def new_stack(
    spec: DeltaSpec,
    size: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    trainable: bool = True,
) -> Any:
    """An initialised stack of ``size`` deltas of the given spec; at the start every delta changes nothing.

    Raises:
        ValueError: unknown kind, no sites, or an option that the kind does not have or that is of another type.
    """
    if spec.kind not in KINDS:
        raise ValueError(f"delta: kind is one of {sorted(KINDS)} (got kind={spec.kind!r})")
    if not spec.sites and spec.kind != "context":
        raise ValueError(f"delta: at least one site (got sites={spec.sites!r})")
    options_of(spec, KINDS[spec.kind].options)
    return KINDS[spec.kind].stacked(spec, size, dtype=dtype, device=device, trainable=trainable)


def is_mapped(deltas: Sequence[EditDelta]) -> bool:
    """Whether deltas stay in storage while they act: the sequence reads them there (``MappedDeltas``), each acts alone,
    and their router chooses without their parts."""
    if not getattr(deltas, "is_mapped", False) or not deltas:
        return False
    spec = deltas[0].spec
    router = spec.options.get("router")
    alone = spec.kind in KINDS and KINDS[spec.kind].accumulate is None
    return alone and router is not None and router not in READ_PARTS


def stack(
    deltas: Sequence[EditDelta],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    check: Callable[[int, EditDelta], None] | None = None,
    earlier: Any = None,
) -> Any:
    """Deltas of equal spec as one stack for application (not trainable).

    Those of a sequence in storage (``MappedDeltas``) stay there, where a router can choose them without their parts.

    Args:
        check: is called with the number of each delta that stays in storage, and the delta, before it acts.
        earlier: a stack of some of these deltas, whose rows are taken over where they stay in storage.
    Raises:
        ValueError: none given, or their specs differ.
    """
    if not deltas:
        raise ValueError("stack: at least one delta (got none)")
    if is_mapped(deltas):
        grown = earlier if isinstance(earlier, MappedStack) else None
        return MappedStack(deltas, new_stack, device=device, dtype=dtype, check=check, earlier=grown)
    kinds = {delta.spec.kind for delta in deltas}
    joined = KINDS[deltas[0].spec.kind].joined if len(kinds) == 1 else None
    if joined is not None and any(delta.spec != deltas[0].spec for delta in deltas):
        deltas = joined(deltas)
    spec = deltas[0].spec
    for index, delta in enumerate(deltas):
        if delta.spec != spec:
            raise ValueError(f"stack: deltas share one spec (delta {index} has {delta.spec}, delta 0 has {spec})")
    kind_dtype = dtype or next((t.dtype for t in deltas[0].tensors.values()), torch.float32)
    stacked = new_stack(spec, len(deltas), dtype=kind_dtype, device=device, trainable=False)
    stacked.copy_from(deltas)
    return stacked


def accumulate(deltas: Sequence[EditDelta]) -> EditDelta:
    """One delta that acts as all the given ones together, as after edits made in sequence.

    Full deltas are added; low-rank deltas are laid side by side along the rank, or added as full ones where that is
    less, and so are both together. Their sites and positions must agree, and else their kinds.

    Raises:
        ValueError: none given; kinds, sites or positions differ; or deltas of which each has a router of its own.
    """
    if not deltas:
        raise ValueError("accumulate: at least one delta (got none)")
    first = deltas[0].spec
    kinds = {delta.spec.kind for delta in deltas}
    for index, delta in enumerate(deltas):
        spec = delta.spec
        alike = spec.kind == first.kind or kinds == {"full", "low_rank"}
        if not alike or (spec.sites, spec.positions) != (first.sites, first.positions):
            detail = f"delta {index} has {spec}, not {first}"
            raise ValueError(f"accumulate: deltas share kind, sites and positions ({detail})")
    together = KINDS["low_rank" if len(kinds) > 1 else first.kind].accumulate
    if together is None:
        raise ValueError(f"accumulate: deltas of kind {first.kind!r} act one at a time (got {len(deltas)} of them)")
    made: EditDelta = together(deltas)
    texts = {name: text for name, text in made.texts.items() if name != QUESTIONS}
    texts |= joined_questions([delta.texts for delta in deltas])
    return replace(made, texts=texts, fitted_on=deltas[0].fitted_on, merged=company(deltas))
