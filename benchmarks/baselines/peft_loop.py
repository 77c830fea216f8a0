"""LoRA fine-tuning of one edit at a time with transformers and peft, as their documentation shows it.

The same adapter shape as the engine's (rank, alpha, target modules in the same layers) from the same first values, the
same optimiser settings and stopping. The whole stock model runs forward at every step.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from benchmarks.baselines.evaluation import PlainEvaluator
from benchmarks.baselines.plain_loop import AFTER_IMAGE, check_plan, fit_one, initial_parameters
from benchmarks.outcome import Fitted
from fastedit.backbone import EditableModel
from fastedit.deltas import DeltaSpec, EditDelta
from fastedit.engine.profiling.timing import PhaseTimer
from fastedit.methods import EditPlan
from fastedit.requests import EditRequest

ADAPTER = "default"


def run(model: EditableModel, edits: Sequence[EditRequest], plan: EditPlan, *, evaluate: bool = False) -> Fitted:
    """Fit every edit by itself, and score it where asked; the model is left as it was.

    Raises:
        ValueError: a method that is not LoRA with the plain objective.
        ImportError: peft is absent.
    """
    check_plan("peft", plan)
    spec, config = plan.method.spec(model, plan.config), plan.method.solver(model, plan.config)
    if spec.kind != "low_rank":
        raise ValueError(f"peft: fits low-rank adapters only (got method={plan.name!r})")
    if spec.options.get("positions") == AFTER_IMAGE:
        raise ValueError(f"peft: adapters act at every position (got positions={spec.options['positions']!r})")
    if config.radius is not None:
        raise ValueError(f"peft: knows no radius (got radius={config.radius!r})")
    timer = PhaseTimer(model.device)
    evaluator = PlainEvaluator(model, timer)
    deltas, outcomes, scores = [], [], []
    with wrapped(model, spec) as wrapper:
        factors = _factors(model, spec)
        first = [value.detach().clone() for value in initial_parameters(model, spec).values()]
        for request in edits:
            with torch.no_grad():
                for factor, value in zip(factors, first, strict=True):
                    factor.copy_(value.T)
            outcomes.append(fit_one(model, request.query, factors, config, timer))
            # Stored as the engine stores them, (d_in, r) and (r, d_out); peft keeps the transposes.
            parts = (factor.detach().T.cpu().clone().contiguous() for factor in factors)
            deltas.append(EditDelta(spec, dict(zip(_names(spec), parts, strict=True)), request_id=request.id))
            if evaluate:
                with wrapper.disable_adapter():
                    scores.append(evaluator.scores(request, lambda _encoded: _enabled(wrapper)))
    return Fitted(deltas, outcomes, dict(timer.seconds), scores)


@contextmanager
def wrapped(model: EditableModel, spec: DeltaSpec) -> Iterator[Any]:
    """The model with peft's adapters at the sites for the length of the block, its own modules back in place after it.

    Raises:
        ImportError: peft is absent.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("peft baseline: needs peft: pip install peft") from error
    rank = int(spec.options["rank"])
    config = LoraConfig(
        r=rank,
        lora_alpha=float(spec.options.get("scale", 1.0)) * rank,
        lora_dropout=0.0,
        bias="none",
        target_modules="|".join(re.escape(site.module_path) for site in spec.sites),
    )
    with warnings.catch_warnings():
        # Peft asks transformers for a name that is about to change; nothing that a benchmark should print.
        warnings.simplefilter("ignore", FutureWarning)
        wrapper = get_peft_model(model.hf, config, adapter_name=ADAPTER, autocast_adapter_dtype=False)
    try:
        wrapper.eval()
        for name, parameter in wrapper.named_parameters():
            parameter.requires_grad_("lora_" in name)
            if "lora_" in name and parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()
        yield wrapper
    finally:
        wrapper.unload()
        model.hf.requires_grad_(False)


@contextmanager
def _enabled(wrapper: Any) -> Iterator[None]:
    """Adapters on, inside of a block in which they are off."""
    wrapper.base_model.enable_adapter_layers()
    try:
        yield
    finally:
        wrapper.base_model.disable_adapter_layers()


def _names(spec: DeltaSpec) -> list[str]:
    return [f"{site.layer}.{site.name}:{part}" for site in spec.sites for part in ("down", "up")]


def _factors(model: EditableModel, spec: DeltaSpec) -> list[nn.Parameter]:
    """Peft's parameters in the order of the engine's parts."""
    found: list[nn.Parameter] = []
    for site in spec.sites:
        layer: Any = model.module(site)
        found += [layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight]
    return found
