"""The plain loop: one edit at a time, the whole stock model forward and backward at every step.

This is how editing toolkits fit an edit (VLKEB's and EasyEdit's multimodal FT and LoRA): a batch of one, pixels in, the
frozen vision tower and every layer run again at each step, logits at all positions, mean negative log-likelihood of the
target, ``torch.optim.AdamW``. It is kept as a sensible person would write it, so that a comparison means something: the
base parameters need no gradient, so that autograd records nothing below the lowest edited module; no key-value cache is
filled; an edited weight costs one matrix product (weight plus delta), not two; preprocessing runs once per edit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.baselines import plain_routed
from benchmarks.baselines.descent import IGNORED, all_right, descend, mean_nll
from benchmarks.baselines.evaluation import PlainEvaluator, stock_inputs, stock_model
from benchmarks.outcome import Fitted
from fastedit.backbone import EditableModel, Encoded
from fastedit.deltas import DeltaSpec, EditDelta
from fastedit.deltas.kinds import new_stack
from fastedit.engine.profiling.timing import PhaseTimer
from fastedit.fitting.solver import FitOutcome, SolverConfig
from fastedit.methods import EditPlan
from fastedit.requests import EditRequest, Query

#: Value of a delta's option ``positions``: it acts behind the last image token.
AFTER_IMAGE = "after_image"
#: It acts from the last token of the prompt on.
ANSWER = "answer"


def run(
    model: EditableModel, edits: Sequence[EditRequest], plan: EditPlan, *, evaluate: bool = False, seed: int = 0
) -> Fitted:
    """Fit every edit by itself on the base model, and score it where asked.

    Args:
        model: left as it was.
        edits: in order.
        plan: a method with the plain objective (``ft``, ``lora``, ``grace`` or ``wise``).
        evaluate: score each edit under both protocols, every question in a forward of its own (``ft``, ``lora``).
        seed: of the views of ``wise``.
    Raises:
        ValueError: an objective that needs more than the edit itself; scores of deltas that a router chooses.
    """
    check_plan("plain_loop", plan)
    if plan.name in plain_routed.FITS:
        if evaluate:
            raise ValueError(f"plain_loop: edits that a router chooses are not scored here (got method={plan.name!r})")
        return plain_routed.run(model, edits, plan, seed=seed)
    spec, config = plan.method.spec(model, plan.config), plan.method.solver(model, plan.config)
    timer = PhaseTimer(model.device)
    evaluator = PlainEvaluator(model, timer)
    deltas, outcomes, scores = [], [], []
    for request in edits:
        parameters = initial_parameters(model, spec)
        with beside(model, spec, parameters, _first_slot_of(model, spec, request.query)):
            outcomes.append(fit_one(model, request.query, list(parameters.values()), config, timer))
        tensors = {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}
        deltas.append(EditDelta(spec, tensors, request_id=request.id))
        if evaluate:
            scores.append(evaluator.scores(request, partial(_beside_row, model, spec, parameters)))
    return Fitted(deltas, outcomes, dict(timer.seconds), scores)


def check_plan(owner: str, plan: EditPlan) -> None:
    """Refuse an objective that the loops here do not have.

    Raises:
        ValueError: anything but the plain negative log-likelihood.
    """
    if "+" in plan.name:
        raise ValueError(f"{owner}: only methods with the plain objective (got method={plan.name!r})")


def fit_one(
    model: EditableModel, query: Query, parameters: Sequence[nn.Parameter], config: SolverConfig, timer: PhaseTimer
) -> FitOutcome:
    """Fit parameters that already act on the model to one question and its answer."""
    with timer.phase("encode"):
        encoded = model.encode([query], answers=True)
        inputs = stock_inputs(model, encoded)
        stock = stock_model(model, inputs)
        # (N,), the label of every position, IGNORED where there is none
        labels = torch.where(encoded.label_mask[0], encoded.labels[0], IGNORED)

    def evaluated() -> tuple[Tensor, Tensor, Callable[[], bool]]:
        logits = stock(**inputs, use_cache=False).logits[0]
        loss = mean_nll(logits, labels)
        return loss, loss, lambda: all_right(logits.detach(), labels)

    return descend(parameters, config, timer, evaluated)


def initial_parameters(model: EditableModel, spec: DeltaSpec) -> dict[str, nn.Parameter]:
    """The parts of a fresh delta as parameters: the same names, shapes and first values as the engine's."""
    dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    fresh = new_stack(spec, 1, dtype=dtype, trainable=False).unstack(0)
    return {name: nn.Parameter(tensor.to(model.device)) for name, tensor in fresh.tensors.items()}


def first_slot(spec: DeltaSpec, encoded: Encoded) -> int:
    """The first slot of a row at which a delta acts: 0, the one behind the last image token, or its prompt's last."""
    if spec.options.get("positions") == ANSWER:
        return int(encoded.label_mask[0].nonzero()[0])
    if spec.options.get("positions") != AFTER_IMAGE:
        return 0
    slots = encoded.image_mask[0].nonzero()
    return int(slots.max()) + 1 if len(slots) else 0


def _first_slot_of(model: EditableModel, spec: DeltaSpec, query: Query) -> int:
    if spec.options.get("positions") != AFTER_IMAGE:
        return 0
    return first_slot(spec, model.encode([query], answers=True))


def _beside_row(
    model: EditableModel, spec: DeltaSpec, parameters: Mapping[str, Tensor], encoded: Encoded
) -> AbstractContextManager[None]:
    """Let one delta act on a row."""
    return beside(model, spec, parameters, first_slot(spec, encoded))


@contextmanager
def beside(model: EditableModel, spec: DeltaSpec, parameters: Mapping[str, Tensor], first: int = 0) -> Iterator[None]:
    """Let one delta act on the model for the length of the block, differentiably; nothing remains after it.

    Args:
        model, spec, parameters: what acts where.
        first: it acts at this slot of a row and behind. A step of a generation, a row of one slot, is behind.
    """
    undo: list[Any] = []
    try:
        for site in spec.sites:
            module: Any = model.module(site)
            name = f"{site.layer}.{site.name}"
            if spec.kind == "codebook":
                undo.append(module.register_forward_hook(plain_routed.replaced(parameters, name, first)).remove)
                continue
            if spec.kind == "full" and not first and _is_plain(module, parameters[f"{name}:delta"]):
                module.forward = _edited_forward(module, parameters[f"{name}:delta"])
                undo.append(lambda module=module: module.__dict__.pop("forward"))
            else:
                hook = module.register_forward_hook(_added(spec, name, parameters, first))
                undo.append(hook.remove)
        yield
    finally:
        for step in undo:
            step()


def _is_plain(module: nn.Module, delta: Tensor) -> bool:
    """Whether weight and delta may simply be added: no quantization, one dtype, nothing wrapped around the forward."""
    return type(module) is nn.Linear and module.weight.dtype == delta.dtype and "forward" not in module.__dict__


def _edited_forward(module: nn.Linear, delta: Tensor) -> Any:
    return lambda x: functional.linear(x, module.weight + delta, module.bias)


def _added(spec: DeltaSpec, name: str, parameters: Mapping[str, Tensor], first: int) -> Any:
    """A forward hook that adds the delta's change to a module's output."""
    scale = float(spec.options.get("scale", 1.0))

    def change(x: Tensor) -> Tensor:
        if spec.kind in ("full", "side"):
            delta = parameters[f"{name}:delta"]
            return functional.linear(x.to(delta.dtype), delta)
        down, up = parameters[f"{name}:down"], parameters[f"{name}:up"]
        return x.to(down.dtype) @ down @ up * scale

    def add(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + _behind(change(args[0]), first).to(output.dtype)

    return add


def _behind(change: Tensor, first: int) -> Tensor:
    """The change (1, N, d), zero at the slots before the first."""
    if not first or change.shape[-2] == 1:
        return change
    acts = torch.arange(change.shape[-2], device=change.device) >= first
    return change * acts[:, None].to(change.dtype)
