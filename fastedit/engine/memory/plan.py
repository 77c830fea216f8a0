"""How much memory a run will take, before it takes any, and the largest batch that fits."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastedit.backbone import EditableModel
from fastedit.backbone.settings import checked_device, settled_dtype
from fastedit.backbone.synthetic.skeleton import skeleton, weight_bytes
from fastedit.deltas.growing import sum_bytes
from fastedit.deltas.sketch import COLUMNS
from fastedit.engine.memory.footprint import Sizes, delta_parameters, held_parts, mask_bytes, phase_parts
from fastedit.engine.memory.limits import available_bytes, process_bytes
from fastedit.engine.memory.workload import Workload, measure_workload
from fastedit.methods import EditPlan, resolve
from fastedit.objectives import InvariantConfig, Role
from fastedit.objectives.multiplier import multiplier_bytes
from fastedit.ops import release_workspaces
from fastedit.requests import EditRequest

#: Share of the available memory that a chosen batch may fill, and the largest batch that is chosen.
SHARE, MOST_EDITS = 0.8, 256
# Resident size of the interpreter with torch and transformers, where it cannot be measured; and what a GPU's libraries
# take of its memory. Their scratch space and code come in at the first use.
_LIBRARIES, _GPU_LIBRARIES, _FIRST_USE = 480 << 20, 256 << 20, 64 << 20


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a run needs.

    Args:
        held: by name, what is there all the time. phases: by name, what each phase of a batch has besides.
        available_bytes: what the process may have on the device in all; None where that is not known.
        device: of the model.
        batch_size: of the run.
    """

    held: Mapping[str, int]
    phases: Mapping[str, Mapping[str, int]]
    available_bytes: int | None
    device: str
    batch_size: int

    def __repr__(self) -> str:
        return f"<MemoryPlan: batch size {self.batch_size} on {self.device}, {self.text()}>"

    @property
    def peak_phase(self) -> str:
        """The phase that takes the most."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def parts(self) -> dict[str, int]:
        """By name, what is there at the peak."""
        return {name: size for name, size in {**self.held, **self.phases[self.peak_phase]}.items() if size}

    @property
    def total_bytes(self) -> int:
        """At the peak."""
        return sum(self.parts.values())

    def fits(self, share: float = 1.0) -> bool:
        """Whether the plan fits a share of what is available; True where that is not known."""
        return self.available_bytes is None or self.total_bytes <= share * self.available_bytes

    def text(self) -> str:
        """One line: ``needs 9.8 GiB (weights 6.1, delta rows 2.0, ...); you have 14.2 GiB``."""
        largest = sorted(self.parts.items(), key=lambda part: -part[1])
        shown = [f"{name} {size / 2**30:.1f}" for name, size in largest if size >= 0.05 * 2**30][:5]
        rest = ", ..." if len(shown) < len(largest) else ""
        of = f" ({', '.join(shown)}{rest})" if shown else ""
        known = self.available_bytes
        have = "what you have is not known" if known is None else f"you have {known / 2**30:.1f} GiB"
        return f"needs {self.total_bytes / 2**30:.1f} GiB{of}; {have}"


@dataclass(frozen=True)
class _Run:
    """What the plans of all batch sizes share."""

    model: EditableModel
    plan: EditPlan
    work: Workload
    sizes: Sizes
    parameters: int
    weights: int
    libraries: int
    device: torch.device
    evaluate: bool
    keep_deltas: bool
    in_sequence: bool
    budget: int

    def of_batch(self, batch_size: int) -> MemoryPlan:
        """The plan of a batch size."""
        locality = sum(role >= Role.TEXT_LOCALITY for role in _roles(self.model, self.plan))
        on_cpu = self.device.type == "cpu"
        held = {"libraries": self.libraries, "weights": self.weights}
        held |= held_parts(
            self.model,
            self.sizes,
            self.work,
            budget=self.budget,
            parameters=self.parameters if self.keep_deltas and on_cpu else 0,
            locality=locality,
            on_cpu=on_cpu,
        )
        held["earlier edits"] = self._earlier_bytes() if self.in_sequence else 0
        phases = phase_parts(
            self.model,
            self.sizes,
            self.work,
            batch_size=batch_size,
            parameters=self.parameters,
            masks=mask_bytes(self.plan.method.spec(self.model, self.plan.config)),
            evaluate=self.evaluate,
            locality=locality,
            on_cpu=on_cpu,
            penalty=self._penalty_bytes(batch_size),
        )
        return MemoryPlan(held, phases, available_bytes(self.device), str(self.device), batch_size)

    def _penalty_bytes(self, batch_size: int) -> int:
        """What ODEdit's penalty takes of so many edits; nothing under another objective."""
        config = self.plan.objective_config
        if not isinstance(config, InvariantConfig):
            return 0
        element = 8 if self.model.dtype == torch.float64 else 4
        return multiplier_bytes(config, self.parameters, batch_size, element, COLUMNS)

    def _earlier_bytes(self) -> int:
        """What edits that add up keep on the device for those behind them."""
        method, spec = self.plan.method, self.plan.method.spec(self.model, self.plan.config)
        if method.sequence != "accumulate":
            return 0
        return sum_bytes(spec, self.work.edits or 1, 8 if self.model.dtype == torch.float64 else 4)


def plan_memory(
    model: str | os.PathLike[str] | EditableModel,
    *,
    method: str = "ft",
    batch_size: int | str = 16,
    quantize: str = "none",
    dtype: str | None = "auto",
    device: str | torch.device | None = None,
    edits: Sequence[EditRequest] | None = None,
    evaluate: bool = True,
    tokens_per_row: int | None = None,
    keep_deltas: bool = True,
    mode: str = "single",
    image_cache_mib: int = 1024,
    **overrides: Any,
) -> MemoryPlan:
    """Return the memory that ``fastedit.edit`` would need, without loading weights or editing anything.

    Args:
        model: as ``fastedit.load`` takes it; of a checkpoint only configuration and processor are read. Or a loaded
            model, whose own ``quantize``, ``dtype`` and ``device`` count.
        method: as ``fastedit.edit`` takes it.
        batch_size: edits fitted together, or "auto" for the largest that fits.
        quantize, dtype, device: as ``fastedit.load`` takes them.
        edits: of the run; the first few say how long rows are and how large images. None plans for photos with short
            questions, and for caches that fill up.
        evaluate: whether the edits are scored.
        tokens_per_row: instead of what the edits say.
        keep_deltas: whether fitted deltas stay in memory (no ledger).
        mode: as ``fastedit.edit`` takes it; in "sequential" what earlier edits add up to is there too.
        image_cache_mib: as ``fastedit.load`` takes it.
        overrides: fields of the method's and the objective's config.
    Raises:
        ValueError, FileNotFoundError, ImportError: what ``load`` and ``edit`` would refuse.
    """
    plan = resolve(method, overrides)
    if batch_size != "auto" and (not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"plan_memory: batch_size is at least 1, or 'auto' (got batch_size={batch_size!r})")
    if mode not in ("single", "sequential"):
        raise ValueError(f"plan_memory: mode is 'single' or 'sequential' (got mode={mode!r})")
    if edits is not None and not edits:
        raise ValueError("plan_memory: at least one edit, or None (got edits=[])")
    place = checked_device(device)
    if isinstance(model, EditableModel):
        shaped, weights = model, weight_bytes(model.hf, model.device)
        place, image_cache_mib = model.device, model.image_features.budget_bytes >> 20
    else:
        dtype = settled_dtype(dtype, place)
        shaped, weights = skeleton(model, quantize=quantize, dtype=dtype, image_cache_mib=image_cache_mib)
    run = _run(
        shaped,
        plan,
        edits,
        weights=weights,
        device=place,
        evaluate=evaluate,
        tokens_per_row=tokens_per_row,
        keep_deltas=keep_deltas,
        in_sequence=mode == "sequential",
        budget=image_cache_mib << 20,
    )
    if isinstance(batch_size, int):
        return run.of_batch(batch_size)
    return run.of_batch(_largest(run, MOST_EDITS if edits is None else len(edits)))


def largest_batch(
    model: EditableModel,
    plan: EditPlan,
    edits: Sequence[EditRequest],
    *,
    evaluate: bool = True,
    keep_deltas: bool = True,
    mode: str = "single",
) -> int:
    """Return the most edits, up to all of them and ``MOST_EDITS``, that fit together in ``SHARE`` of the memory.

    Args:
        model: loaded. plan: of the method. edits: of the run. evaluate: whether they are scored.
        keep_deltas: whether fitted deltas stay in memory. mode: of the run.
    Returns:
        At least 1, also where not even that fits by the plan.
    """
    # What earlier runs left for the next is no need of this one
    release_workspaces()
    run = _run(
        model,
        plan,
        edits,
        weights=weight_bytes(model.hf, model.device),
        device=model.device,
        evaluate=evaluate,
        tokens_per_row=None,
        keep_deltas=keep_deltas,
        in_sequence=mode == "sequential",
        budget=model.image_features.budget_bytes,
    )
    return _largest(run, len(edits))


def _run(
    model: EditableModel,
    plan: EditPlan,
    edits: Sequence[EditRequest] | None,
    *,
    weights: int,
    device: torch.device,
    tokens_per_row: int | None,
    evaluate: bool,
    **rest: Any,
) -> _Run:
    spec = plan.method.spec(model, plan.config)
    # before images are read for their sizes
    loaded = weights + model.images.held_bytes + model.image_features.held_bytes
    libraries = _libraries(device, 0 if model.device.type == "meta" else loaded)
    work = measure_workload(model, _roles(model, plan), edits, evaluate=evaluate, tokens_per_row=tokens_per_row)
    return _Run(
        model=model,
        plan=plan,
        work=work,
        sizes=Sizes.of(model, spec),
        parameters=delta_parameters(spec),
        weights=weights,
        libraries=libraries,
        device=device,
        evaluate=evaluate,
        **rest,
    )


def _largest(run: _Run, edits: int) -> int:
    low, high = 1, max(1, min(edits, MOST_EDITS))
    while low < high:
        middle = (low + high + 1) // 2
        if run.of_batch(middle).fits(SHARE):
            low = middle
        else:
            high = middle - 1
    return low


def _roles(model: EditableModel, plan: EditPlan) -> tuple[Role, ...]:
    return plan.build_objective(plan.method.solver(model, plan.config).steps).roles


def _libraries(device: torch.device, loaded: int) -> int:
    """Resident size of everything but a loaded model and its images."""
    if device.type == "cuda":
        return _GPU_LIBRARIES
    return max(_LIBRARIES, process_bytes("VmRSS") - loaded) + _FIRST_USE
