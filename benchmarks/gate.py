"""The correctness gate: nothing is timed before every implementation has been seen to do the same."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

import fastedit
from benchmarks import implementations
from benchmarks.baselines.evaluation import stock_inputs, stock_model
from benchmarks.baselines.plain_loop import beside, first_slot
from benchmarks.cases import GATE_MODELS, Case, edits_of, made_up_edits
from benchmarks.outcome import Fitted
from benchmarks.variants import same_work
from fastedit.backbone import EditableModel
from fastedit.deltas import EditDelta
from fastedit.evaluation import EditScores
from fastedit.requests import EditRequest

#: Largest difference between two deltas that were both fitted in float64.
DELTA_TOLERANCE = 1e-8
#: Largest difference between two scores computed in float64.
SCORE_TOLERANCE = 1e-6
EDITS = 2


class GateError(RuntimeError):
    """Implementations disagree; the message says which, where and by how much."""


@dataclass(frozen=True)
class GateReport:
    """What was found equal in float64.

    Args:
        largest: implementation -> largest difference to the deltas of the reference.
        model: on which model.
        reference: the baseline that the others were compared with.
    """

    largest: Mapping[str, float]
    model: str
    reference: str = ""


def compared(case: Case) -> list[str]:
    """The implementations that must agree, the reference first and the engine last; empty without a baseline.

    A form of the engine with another method or in another dtype does other work, and is left out.
    """
    names = [name for name in case.baselines if same_work(case, name)]
    return [*names, implementations.ENGINE] if names else []


def check_exact(case: Case) -> GateReport:
    """Compare all implementations of a case that do the same work on a couple of edits, in float64.

    Deltas are equal to DELTA_TOLERANCE, fits end alike, and scores are equal where the case is evaluated. The model is
    the case's own, or its small stand-in of the same family.

    Raises:
        GateError: something differs.
    """
    names = compared(case)
    if not names:
        return GateReport({}, "")
    name = case.gate_model or GATE_MODELS.get(case.model, case.model)
    exact = replace(case, model=name, dtype="float64", quantize="none", edits=EDITS, batch_size=EDITS)
    model = fastedit.load(exact.model, **exact.loading())
    edits = edits_of(exact) if name == case.model else made_up_edits(EDITS, seed=case.seed)
    with full_norms(model):
        fitted = {each: implementations.run(each, model, edits, exact) for each in names}
    reference = fitted[names[0]]
    largest = {each: compare(each, fitted[each], names[0], reference) for each in names[1:]}
    return GateReport(largest, name, names[0])


@contextmanager
def full_norms(model: EditableModel) -> Iterator[None]:
    """Inside the block root-mean-square norms compute in the dtype of what they are given.

    Transformers' compute in float32, also for float64: a gradient through one that two rows share is rounded once, and
    twice where each row has its own.
    """
    changed = [module for module in model.hf.modules() if hasattr(module, "variance_epsilon")]
    try:
        for module in changed:
            module.forward = partial(_normed, module)
        yield
    finally:
        for module in changed:
            del module.forward


def _normed(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    normed: torch.Tensor = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + module.variance_epsilon)
    return module.weight * normed


def check_scores(case: Case, model: EditableModel) -> dict[str, float]:
    """Compare token accuracies in the run's own dtype, on the run's own model; return the means by implementation.

    They must be equal. In half precision and on quantized models, one token of an edit may differ.

    Raises:
        GateError: they are not.
    """
    names = compared(case)
    if not names:
        return {}
    small = replace(case, edits=EDITS, batch_size=EDITS, evaluate=False)
    edits = edits_of(small)
    right = {}
    for name in names:
        deltas = implementations.run(name, model, edits, small).deltas
        right[name] = [right_tokens(model, edit, delta) for edit, delta in zip(edits, deltas, strict=True)]
    allowed = 0 if case.dtype in ("float32", "float64") and case.quantize == "none" else 1
    for name in names[1:]:
        for number, (found, wanted) in enumerate(zip(right[name], right[names[0]], strict=True)):
            if abs(found[0] - wanted[0]) > allowed:
                raise GateError(
                    f"{name} and {names[0]} do not score alike in {case.dtype}: edit {number} has {found[0]} of "
                    f"{found[1]} target tokens right, not {wanted[0]}"
                )
    return {name: sum(r for r, _ in each) / sum(n for _, n in each) for name, each in right.items()}


def compare(name: str, found: Fitted, reference_name: str, reference: Fitted) -> float:
    """Compare float64 results; return the largest difference of two delta entries.

    Raises:
        GateError: deltas, ends of fits, or scores differ.
    """
    if len(found.deltas) != len(reference.deltas):
        raise GateError(f"{name} made {len(found.deltas)} edits, {reference_name} {len(reference.deltas)}")
    largest = 0.0
    for number, (delta, wanted) in enumerate(zip(found.deltas, reference.deltas)):
        if set(delta.tensors) != set(wanted.tensors):
            raise GateError(f"{name} has parts {sorted(delta.tensors)}, {reference_name} {sorted(wanted.tensors)}")
        for part, tensor in delta.tensors.items():
            difference = float((tensor.double() - wanted.tensors[part].double()).abs().max())
            # A NaN is a difference too
            if not difference <= DELTA_TOLERANCE:
                raise GateError(
                    f"{name} and {reference_name} do not fit the same delta in float64: edit {number}, part {part!r} "
                    f"differs by {difference:.3e} (allowed {DELTA_TOLERANCE:.0e})"
                )
            largest = max(largest, difference)
    for number, (end, wanted_end) in enumerate(zip(found.outcomes, reference.outcomes, strict=True)):
        if (end.status, end.steps) != (wanted_end.status, wanted_end.steps):
            raise GateError(
                f"{name} and {reference_name} end edit {number} differently: {end.status} after {end.steps} steps, "
                f"not {wanted_end.status} after {wanted_end.steps}"
            )
    if not any(float(t.abs().max()) > 0 for d in reference.deltas for t in _changing(d)):
        raise GateError(f"{reference_name} changed nothing: there is nothing to compare")
    for number, (scores, wanted_scores) in enumerate(zip(found.scores, reference.scores, strict=True)):
        _compare_scores(name, scores, reference_name, wanted_scores, number)
    return largest


def _changing(delta: EditDelta) -> list[torch.Tensor]:
    """The parts that are zero in a fresh delta."""
    return [tensor for part, tensor in delta.tensors.items() if not part.endswith(":down")]


def _compare_scores(name: str, found: EditScores, reference_name: str, wanted: EditScores, edit: int) -> None:
    for protocol in ("legacy", "strict"):
        values, expected = getattr(found, protocol), getattr(wanted, protocol)
        if set(values) != set(expected):
            raise GateError(f"{name} has {protocol} scores {sorted(values)}, {reference_name} {sorted(expected)}")
        for key, value in values.items():
            alike = math.isclose(value, expected[key], rel_tol=SCORE_TOLERANCE, abs_tol=SCORE_TOLERANCE)
            if not alike and not (math.isnan(value) and math.isnan(expected[key])):
                raise GateError(
                    f"{name} and {reference_name} score edit {edit} differently: {protocol} {key} is {value:.6g}, "
                    f"not {expected[key]:.6g}"
                )


@torch.no_grad()
def right_tokens(model: EditableModel, request: EditRequest, delta: EditDelta) -> tuple[int, int]:
    """How many target tokens a stock forward with the delta predicts, of how many."""
    encoded = model.encode([request.query], answers=True)
    inputs = stock_inputs(model, encoded)
    parts = {part: tensor.to(model.device) for part, tensor in delta.tensors.items()}
    with beside(model, delta.spec, parts, first_slot(delta.spec, encoded)):
        logits = stock_model(model, inputs)(**inputs, use_cache=False).logits
    predicted, labels = logits[encoded.label_mask].argmax(-1), encoded.labels[encoded.label_mask]
    return int((predicted == labels).sum()), len(labels)


def token_accuracy(model: EditableModel, edits: Sequence[EditRequest], deltas: Sequence[EditDelta]) -> float:
    """Share of all target tokens that stock forwards with the deltas predict."""
    right = [right_tokens(model, edit, delta) for edit, delta in zip(edits, deltas, strict=True)]
    return sum(found for found, _ in right) / sum(n for _, n in right)
