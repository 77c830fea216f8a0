"""Run one case: gate, warm-up, alternating timed runs, peak memory, necessary operations; and the rows of it."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import fastedit
from benchmarks import gate, implementations, memory, record
from benchmarks.cases import Case, edits_of, one_batch
from benchmarks.implementations import ENGINE, forget
from benchmarks.outcome import Fitted
from benchmarks.record import Row
from benchmarks.variants import as_run, is_variant
from fastedit.backbone import EditableModel
from fastedit.deltas import EditDelta
from fastedit.engine import provenance
from fastedit.engine.profiling.flops import NecessaryFlops, Peak, nfu
from fastedit.engine.profiling.utilisation import measure_peak, necessary_flops
from fastedit.fitting.solver import FitOutcome
from fastedit.fitting.views import ViewSource
from fastedit.objectives import beside_roles
from fastedit.requests import EditRequest

WARM_UP_STEPS = 2
NOTHING = NecessaryFlops(0, 0, 0, 0, 0)


@dataclass
class Timed:
    """The timed runs of one implementation.

    Args:
        seconds: wall-clock time of each run over all edits.
        phases: seconds by phase of each run.
        outcomes, deltas: how the fits ended, and what they made (of the last run).
        memory: None where it was not measured.
        edits: how many a run makes.
        necessary: operations of these edits. peak: of the machine, in the dtype of this implementation.
        accuracy: share of the target tokens that its edits made right; None where it was not asked for.
    """

    seconds: list[float] = field(default_factory=list)
    phases: list[Mapping[str, float]] = field(default_factory=list)
    outcomes: Sequence[FitOutcome] = ()
    deltas: Sequence[EditDelta] = ()
    memory: memory.PeakMemory | None = None
    edits: int = 1
    necessary: NecessaryFlops = NOTHING
    peak: Peak | None = None
    accuracy: float | None = None

    def edits_per_s(self) -> list[float]:
        """Of each run."""
        return [self.edits / seconds for seconds in self.seconds]

    def nfu(self) -> list[float]:
        """Of each run, over the time of editing (evaluation is not counted)."""
        assert self.peak is not None
        spent = [s - phases.get("evaluation", 0.0) for s, phases in zip(self.seconds, self.phases, strict=True)]
        return [nfu(self.necessary.total, seconds, self.peak) for seconds in spent]

    def phase_names(self) -> list[str]:
        """In order of first appearance."""
        return list(dict.fromkeys(name for phases in self.phases for name in phases))


@dataclass
class Comparison:
    """A finished case.

    Args:
        case: as it was run. gate: what was found equal.
        load_s: seconds to load the model. parameters: how many the model has.
        timed: implementation -> runs, in the order in which they alternated.
        device: "cpu" or "cuda". rows: everything of it, as rows.
    """

    case: Case
    gate: gate.GateReport
    load_s: float
    parameters: int
    timed: Mapping[str, Timed]
    device: str = "cpu"
    rows: list[Row] = field(default_factory=list)

    @property
    def peak(self) -> Peak:
        """Of the machine, in the dtype of the case."""
        peak = self.timed[ENGINE].peak
        assert peak is not None
        return peak

    @property
    def necessary(self) -> NecessaryFlops:
        """Operations of all edits of the case."""
        return self.timed[ENGINE].necessary


class Models:
    """The case's model, and those of variants in another dtype, each loaded once.

    Args:
        case: whose model.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self._loaded: dict[str, EditableModel] = {}

    def of(self, implementation: str) -> EditableModel:
        """The model that an implementation runs on."""
        wanted = as_run(self.case, implementation)
        key = json.dumps(wanted.loading())
        if key not in self._loaded:
            self._loaded[key] = fastedit.load(wanted.model, **wanted.loading())
        return self._loaded[key]


def run_case(
    case: Case,
    *,
    with_memory: bool = True,
    gate_with: Sequence[str] = (),
    say: Callable[[str], None] = lambda _line: None,
) -> Comparison:
    """Run a case from start to end.

    Args:
        case: what to run.
        with_memory: also measure peak memory, each implementation in a process of its own.
        gate_with: baselines that the gate compares with but that are not timed.
        say: told what happens now, in a few words.
    Raises:
        gate.GateError: implementations disagree; nothing was timed.
    """
    case.plan()
    edits = edits_of(case)
    gated = replace(case, baselines=(*gate_with, *case.baselines))
    say("checking that all implementations fit the same deltas")
    report = gate.check_exact(gated)
    gc.collect()
    say(f"loading {case.model}")
    # Libraries were imported for the check: only the model is timed.
    models = Models(case)
    start = time.perf_counter()
    model = models.of(ENGINE)
    load_s = time.perf_counter() - start
    say("checking that all implementations score alike")
    gate.check_scores(gated, model)
    names = [ENGINE, *case.baselines]
    say("measuring the machine")
    dtypes = {as_run(case, name).dtype for name in names}
    peaks = {dtype: measure_peak(dtype, model.device) for dtype in dtypes}
    say("warming up")
    _warm_up(models, edits, case)
    timed = {name: Timed() for name in names}
    for repeat in range(case.repeats):
        for name in names:
            say(f"run {repeat + 1} of {case.repeats}: {name}")
            _run_once(models.of(name), edits, case, name, timed[name])
    # A peak is the most that was seen: a machine that was busy once does not lower it.
    again = {dtype: measure_peak(dtype, model.device) for dtype in dtypes}
    for name in names:
        best = [found[as_run(case, name).dtype] for found in (peaks, again)]
        timed[name].peak = max(best, key=lambda each: each.matmul_gflop_per_s)
    _count_work(models, edits, case, timed)
    device, parameters = model.device.type, count_parameters(model)
    if with_memory and device == "cuda":
        for name in names:
            say(f"peak memory: {name}")
            timed[name].memory = memory.on_device(models.of(name), case, name)
    # The worker processes need the memory.
    del model, models
    gc.collect()
    if with_memory and device != "cuda":
        for name in names:
            say(f"peak memory: {name}")
            timed[name].memory = memory.measure(case, name)
    found = Comparison(case, report, load_s, parameters, timed, device)
    found.rows = rows_of(found)
    return found


def _warm_up(models: Models, edits: Sequence[EditRequest], case: Case) -> None:
    """A whole batch for the engine, one edit for the others: every code path and buffer size once."""
    for name in (ENGINE, *case.baselines):
        own = as_run(case, name)
        count = one_batch(own) if name == ENGINE or is_variant(name) else 1
        implementations.run(name, models.of(name), edits[:count], replace(case, steps=min(case.steps, WARM_UP_STEPS)))


def _run_once(model: EditableModel, edits: Sequence[EditRequest], case: Case, name: str, timed: Timed) -> None:
    forget(model)
    gc.collect()
    start = time.perf_counter()
    fitted: Fitted = implementations.run(name, model, edits, case)
    timed.seconds.append(time.perf_counter() - start)
    timed.phases.append(dict(fitted.seconds))
    timed.outcomes, timed.deltas, timed.edits = fitted.outcomes, fitted.deltas, len(fitted.deltas)


def _count_work(models: Models, edits: Sequence[EditRequest], case: Case, timed: Mapping[str, Timed]) -> None:
    """Necessary operations of everyone's edits; and how right they are where they may differ in that."""
    other_dtypes = any(as_run(case, name).loading() != case.loading() for name in timed)
    for name, runs in timed.items():
        # Of what the engine does, the plain loops do no less: operations are counted by how the engine's fits ended.
        ended = runs.outcomes if is_variant(name) else timed[ENGINE].outcomes
        own = as_run(case, name)
        runs.necessary = count_necessary(models.of(name), edits[: own.edits], own, ended)
        if other_dtypes:
            runs.accuracy = gate.token_accuracy(models.of(name), edits[: own.edits], runs.deltas)
        # A full delta of every edit is much to hold on to.
        runs.deltas = ()


def count_parameters(model: EditableModel) -> int:
    """How many parameters a model has; packed ones are counted as what they stand for."""
    total = 0
    for parameter in model.hf.parameters():
        shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
        total += parameter.numel() if shape is None else math.prod(shape)
    return total


def count_necessary(
    model: EditableModel, edits: Sequence[EditRequest], case: Case, outcomes: Sequence[FitOutcome]
) -> NecessaryFlops:
    """Operations that fitting these edits, which ended like this, cannot do without."""
    plan = case.plan()
    objective = plan.build_objective(case.steps)
    source = ViewSource(edits, None, seed=case.seed)
    spec, beside = plan.method.spec(model, plan.config), beside_roles(objective)
    return necessary_flops(model, spec, source, objective.roles, outcomes, beside)


def rows_of(found: Comparison) -> list[Row]:
    """Everything measured, as rows that share provenance; those of the engine and peft with their ratio."""
    case = found.case
    commit, now = record.commit_with_changes(provenance.commit()), provenance.utc_now()
    machine, versions = record.machine(found.device), {**provenance.versions(), **_peft_version()}

    def row(implementation: str, metric: str, values: Sequence[float]) -> Row:
        value, low, high = record.spread(values)
        unit = record.unit_of(metric)
        shared = (case.config, machine, versions, commit, case.seed, now)
        return Row(case.name, implementation, metric, unit, value, low, high, None, None, *shared)

    rows = [
        row("machine", "matmul_peak_gflop_per_s", [found.peak.matmul_gflop_per_s]),
        row("machine", "copy_bandwidth_gib_per_s", [found.peak.copy_gib_per_s]),
        row("machine", "necessary_gflop", [found.necessary.total / 1e9]),
        row("machine", "load_s", [found.load_s]),
        row("machine", "parameters", [found.parameters]),
    ]
    for name, runs in found.timed.items():
        rows.append(row(name, "edits_per_s", runs.edits_per_s()))
        rows.append(row(name, "run_s", runs.seconds))
        rows.append(row(name, "nfu", runs.nfu()))
        if is_variant(name):
            rows.append(row(name, "necessary_gflop", [runs.necessary.total / 1e9]))
            peak = runs.peak
            if peak is not None and peak.dtype != found.peak.dtype:
                rows.append(row(name, "matmul_peak_gflop_per_s", [peak.matmul_gflop_per_s]))
        if runs.accuracy is not None:
            rows.append(row(name, "token_accuracy", [runs.accuracy]))
        for phase in runs.phase_names():
            rows.append(row(name, f"phase_{phase}_s", [phases.get(phase, 0.0) for phases in runs.phases]))
        if runs.memory is not None:
            rows.append(row(name, "peak_memory_mib", [runs.memory.peak_mib]))
            rows.append(row(name, "working_memory_mib", [runs.memory.working_mib]))
    return record.check(_with_ratios(rows, case.baselines))


def _with_ratios(rows: Sequence[Row], baselines: Sequence[str]) -> list[Row]:
    """Compare speed and memory of every other implementation with the first baseline."""
    if not baselines:
        return list(rows)
    base = {row.metric: row for row in rows if row.implementation == baselines[0]}
    compared = ("edits_per_s", "peak_memory_mib", "working_memory_mib")
    return [
        record.with_ratio(row, base[row.metric])
        if row.metric in compared and row.implementation != baselines[0] and base[row.metric].value > 0
        else row
        for row in rows
    ]


def _peft_version() -> dict[str, str]:
    try:
        return {"peft": importlib.metadata.version("peft")}
    except importlib.metadata.PackageNotFoundError:
        return {}
