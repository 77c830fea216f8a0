"""GRACE and WISE the plain way: the whole stock model over all rows of one edit, forward and backward, at every step.

As EasyEdit's editors do it: an adapter stands at one linear map; GRACE takes its key and its first value from a pass of
the question, WISE puts the rows that must not change into the batch of every step for its margins. Kept as a sensible
person would write them: rows of an edit are one padded batch, masks are made once, nothing below the map has gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.baselines.descent import IGNORED, all_right, descend, mean_nll
from benchmarks.baselines.evaluation import stock_inputs, stock_model
from benchmarks.outcome import Fitted
from fastedit.backbone import EditableModel, Encoded, Site
from fastedit.deltas import EditDelta
from fastedit.deltas.random_mask import apply_mask_, mask_key
from fastedit.engine.profiling.timing import PhaseTimer
from fastedit.fitting.solver import FitOutcome
from fastedit.fitting.views import TrainingView, ViewSource
from fastedit.methods import EditPlan
from fastedit.requests import EditRequest

Made = tuple[dict[str, Tensor], FitOutcome]


def run(model: EditableModel, edits: Sequence[EditRequest], plan: EditPlan, *, seed: int) -> Fitted:
    """Fit every edit by itself on the base model.

    Args:
        model: left as it was. edits: in order. plan: one of ``FITS``. seed: of the views.
    """
    spec = plan.method.spec(model, plan.config)
    roles = plan.build_objective(plan.config.steps).roles
    timer, source = PhaseTimer(model.device), ViewSource(edits, None, seed=seed)
    deltas, outcomes = [], []
    for number, request in enumerate(edits):
        tensors, outcome = FITS[plan.name](model, request, source.views(number, roles), plan, timer)
        kept = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        deltas.append(EditDelta(spec, kept, request_id=request.id))
        outcomes.append(outcome)
    return Fitted(deltas, outcomes, dict(timer.seconds))


def fit_grace(
    model: EditableModel, request: EditRequest, views: Sequence[TrainingView], plan: EditPlan, timer: PhaseTimer
) -> Made:
    """Return the parts of one entry and how its fit ended."""
    config, solver, spec = plan.config, plan.method.solver(model, plan.config), plan.method.spec(model, plan.config)
    (site,) = spec.sites
    prefix = f"{site.layer}.{site.name}:"
    with timer.phase("encode"):
        encoded = model.encode([views[0].query], answers=True)
        inputs = stock_inputs(model, encoded)
        stock = stock_model(model, inputs)
        labels = _labels(encoded)[0]
        (reader,) = model.sites([site.layer], ["up"])
        at = encoded.label_mask[0].nonzero()[:, 0]
        with torch.no_grad():
            read, put_out = _seen(model, reader, site, lambda: stock(**inputs, use_cache=False))
            key, output = read[0, at[0]], put_out[0, at[: config.values]]
        value = nn.Parameter(torch.cat([output, output.new_zeros(config.values - len(output), output.shape[1])]))
        tensors: dict[str, Tensor] = {
            f"{prefix}value": value,
            f"{prefix}key": key,
            f"{prefix}radius": torch.tensor([config.epsilon * 2**0.5 * float(key.float().norm())]),
            f"{prefix}length": key.new_tensor([float(len(at))]),
            f"{prefix}label": key.new_tensor(mask_key(0, request.target.strip().lower())),
        }

    def evaluated() -> tuple[Tensor, Tensor, Callable[[], bool]]:
        logits = stock(**inputs, use_cache=False).logits[0]
        loss = mean_nll(logits, labels)
        return loss, loss, lambda: all_right(logits.detach(), labels)

    hook = replaced(tensors, prefix[:-1], int(at[0]))
    handle = model.module(site).register_forward_hook(hook)
    try:
        return tensors, descend([value], solver, timer, evaluated)
    finally:
        handle.remove()


def fit_wise(
    model: EditableModel, request: EditRequest, views: Sequence[TrainingView], plan: EditPlan, timer: PhaseTimer
) -> Made:
    """Return the parts of one side memory and how its fit ended.

    Raises:
        ValueError: distances over other tokens than the last of a prompt.
    """
    config, solver, spec = plan.config, plan.method.solver(model, plan.config), plan.method.spec(model, plan.config)
    if config.tokens != "last":
        raise ValueError(f"plain_loop: wise compares the last tokens of prompts here (got tokens={config.tokens!r})")
    (site,) = spec.sites
    prefix = f"{site.layer}.{site.name}:"
    with timer.phase("encode"):
        encoded = model.encode([view.query for view in views], answers=True)
        inputs = stock_inputs(model, encoded)
        stock = stock_model(model, inputs)
        labels, ends = _labels(encoded), encoded.label_mask.int().argmax(1)
        inside = [role in plan.build_objective(0).fitted for role in (view.role for view in views)]  # type: ignore[attr-defined]
        key = torch.tensor(mask_key(config.seed, f"{request.id}|{request.prompt}|{request.target}"))
        delta = nn.Parameter(torch.zeros(site.d_out, site.d_in, dtype=_wide(model.dtype), device=model.device))
        mask = torch.ones_like(delta.data).view(1, -1)
        apply_mask_(mask, key[None], config.keep)
    side = _Side(delta, ends)
    handle = model.module(site).register_forward_hook(side.hook)
    try:
        with torch.no_grad(), timer.phase("forward"):
            stock(**inputs, use_cache=False)
        unit = _moved(torch.zeros_like(side.output[:1]), side.output[:1])[0]

        def evaluated() -> tuple[Tensor, Tensor, Callable[[], bool]]:
            logits = stock(**inputs, use_cache=False).logits
            losses = [mean_nll(logits[row], labels[row]) for row, fitted in enumerate(inside) if fitted]
            near, far = side.distances(inside, unit)
            margins = (config.beta - near).relu().mean()
            if len(far):
                apart = (far[None, :] - near[:, None] + config.gamma).relu().mean()
                margins = margins + (far - config.alpha).relu().mean() + apart
            total = torch.stack(losses).mean() + config.weight * margins
            return total, losses[0], lambda: all_right(logits[0].detach(), labels[0])

        def masked() -> None:
            assert delta.grad is not None
            delta.grad *= mask.view_as(delta)

        outcome = descend([delta], solver, timer, evaluated, masked)
        with torch.no_grad():
            threshold = config.share * side.distances(inside, unit.new_ones(()), anew=True)[0].min()
    finally:
        handle.remove()
    ones = unit.new_ones(1)
    fixed = {"mask": key.to(unit), "unit": unit[None], "threshold": threshold[None], "edits": ones, "merged": 0 * ones}
    return {f"{prefix}delta": delta, **{f"{prefix}{name}": tensor for name, tensor in fixed.items()}}, outcome


#: How an edit is fitted, by method.
FITS: Mapping[str, Callable[..., Made]] = {"grace": fit_grace, "wise": fit_wise}


class _Side:
    """A side memory (d_out, d_in) at a linear map, and what it last did to the last tokens (R,) of the prompts."""

    def __init__(self, delta: nn.Parameter, ends: Tensor) -> None:
        self.delta, self._ends = delta, ends
        self.output = self._input = self._change = delta.data

    def hook(self, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        change = functional.linear(args[0].to(self.delta.dtype), self.delta)
        rows = torch.arange(len(output), device=output.device)
        self._input, self.output = args[0][rows, self._ends].detach(), output[rows, self._ends].detach()
        self._change = change[rows, self._ends]
        return output + change.to(output.dtype)

    def distances(self, inside: Sequence[bool], unit: Tensor, *, anew: bool = False) -> tuple[Tensor, Tensor]:
        """How far rows of the edit move and how far the others do; ``anew``: with the memory as it is now."""
        change = functional.linear(self._input.to(self.delta.dtype), self.delta) if anew else self._change
        found = _moved(self.output, change) / unit
        chosen = torch.tensor(inside, device=found.device)
        return found[chosen], found[~chosen]


def replaced(tensors: Mapping[str, Tensor], name: str, first: int) -> Any:
    """A forward hook that puts an entry's values in the place of a module's output, from slot ``first`` on."""
    value = tensors[f"{name}:value"]
    count = min(int(tensors[f"{name}:length"]), len(value))

    def put(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        behind = output[:, first + count :]
        return torch.cat([output[:, :first], value[None, :count].to(output.dtype), behind], 1)

    return put


def _moved(output: Tensor, change: Tensor) -> Tensor:
    """Distances between activations (R, d) with and without a change."""
    frozen = output.to(change.dtype)
    return torch.linalg.vector_norm(functional.silu(frozen + change) - functional.silu(frozen), dim=1)


def _labels(encoded: Encoded) -> Tensor:
    """(R, N), the label of every slot, ``IGNORED`` where there is none."""
    return torch.where(encoded.label_mask, encoded.labels, IGNORED)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _seen(model: EditableModel, reader: Site, site: Site, call: Callable[[], object]) -> tuple[Tensor, Tensor]:
    """What one linear map reads and what another one puts out during a call."""
    kept: dict[str, Tensor] = {}
    handles = [
        model.module(reader).register_forward_hook(lambda _module, args, _output: kept.update(read=args[0])),
        model.module(site).register_forward_hook(lambda _module, _args, output: kept.update(put_out=output)),
    ]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return kept["read"], kept["put_out"]
