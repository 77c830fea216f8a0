"""Run one case: gate, warm-up, alternating timed runs, peak memory, necessary operations; and the rows of it."""

from __future__ import annotations

import gc
import importlib.metadata
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import fastedit
from benchmarks import gate, memory, record
from benchmarks.cases import Case, edits_of
from benchmarks.implementations import ENGINE, IMPLEMENTATIONS, forget
from benchmarks.outcome import Fitted
from benchmarks.record import Row
from benchmarks.roofline import measure_peak
from fastedit.backbone import EditableModel
from fastedit.engine import provenance
from fastedit.engine.flops import FlopCounter, NecessaryFlops, Peak, nfu
from fastedit.engine.views import ViewSource
from fastedit.objectives import Role
from fastedit.requests import EditRequest
from fastedit.solver import FitOutcome

WARM_UP_STEPS = 2


@dataclass
class Timed:
    """The timed runs of one implementation.

    Args:
        seconds: wall-clock time of each run over all edits.
        phases: seconds by phase of each run.
        outcomes: how the fits ended (of the last run).
        memory: None where it was not measured.
    """

    seconds: list[float] = field(default_factory=list)
    phases: list[Mapping[str, float]] = field(default_factory=list)
    outcomes: Sequence[FitOutcome] = ()
    memory: memory.PeakMemory | None = None

    def edits_per_s(self, edits: int) -> list[float]:
        """Of each run."""
        return [edits / seconds for seconds in self.seconds]

    def phase_names(self) -> list[str]:
        """In order of first appearance."""
        return list(dict.fromkeys(name for phases in self.phases for name in phases))


@dataclass
class Comparison:
    """A finished case.

    Args:
        case: as it was run. gate: what was found equal. peak: of the machine, in this run.
        load_s: seconds to load the model. necessary: operations of all edits.
        timed: implementation -> runs, in the order in which they alternated.
        device: "cpu" or "cuda". rows: everything of it, as rows.
    """

    case: Case
    gate: gate.GateReport
    peak: Peak
    load_s: float
    necessary: NecessaryFlops
    timed: Mapping[str, Timed]
    device: str = "cpu"
    rows: list[Row] = field(default_factory=list)

    def nfu(self, implementation: str) -> list[float]:
        """Of each run, over the time of editing (evaluation is not counted)."""
        runs = self.timed[implementation]
        spent = [s - phases.get("evaluation", 0.0) for s, phases in zip(runs.seconds, runs.phases, strict=True)]
        return [nfu(self.necessary.total, seconds, self.peak) for seconds in spent]


def run_case(case: Case, *, with_memory: bool = True, say: Callable[[str], None] = lambda _line: None) -> Comparison:
    """Run a case from start to end.

    Args:
        case: what to run.
        with_memory: also measure peak memory, each implementation in a process of its own.
        say: told what happens now, in a few words.
    Raises:
        gate.GateError: implementations disagree; nothing was timed.
    """
    case.plan()
    edits = edits_of(case)
    say("checking that all implementations fit the same deltas")
    report = gate.check_exact(case)
    gc.collect()
    say(f"loading {case.model}")
    # Libraries were imported for the check: only the model is timed.
    start = time.perf_counter()
    model = fastedit.load(case.model, **case.loading())
    load_s = time.perf_counter() - start
    say("checking that all implementations score alike")
    gate.check_scores(case, model)
    say("measuring the machine")
    peak = measure_peak(case.dtype, model.device)
    names = [ENGINE, *case.baselines]
    say("warming up")
    _warm_up(model, edits, case, names)
    timed = {name: Timed() for name in names}
    for repeat in range(case.repeats):
        for name in names:
            say(f"run {repeat + 1} of {case.repeats}: {name}")
            _run_once(model, edits, case, name, timed[name])
    # A peak is the most that was seen: a machine that was busy once does not lower it.
    peak = max(peak, measure_peak(case.dtype, model.device), key=lambda each: each.matmul_gflop_per_s)
    necessary = count_necessary(model, edits, case, timed[ENGINE].outcomes)
    device = model.device.type
    if with_memory and device == "cuda":
        for name in names:
            say(f"peak memory: {name}")
            timed[name].memory = memory.on_device(model, case, name)
    # The worker processes need the memory.
    del model
    gc.collect()
    if with_memory and device != "cuda":
        for name in names:
            say(f"peak memory: {name}")
            timed[name].memory = memory.measure(case, name)
    found = Comparison(case, report, peak, load_s, necessary, timed, device)
    found.rows = rows_of(found)
    return found


def _warm_up(model: EditableModel, edits: Sequence[EditRequest], case: Case, names: Sequence[str]) -> None:
    """A whole batch for the engine, one edit for the others: every code path and buffer size once."""
    short = replace(case, steps=min(case.steps, WARM_UP_STEPS))
    for name in names:
        count = case.batch_size if name == ENGINE else 1
        IMPLEMENTATIONS[name](model, edits[:count], short)


def _run_once(model: EditableModel, edits: Sequence[EditRequest], case: Case, name: str, timed: Timed) -> None:
    forget(model)
    gc.collect()
    start = time.perf_counter()
    fitted: Fitted = IMPLEMENTATIONS[name](model, edits, case)
    timed.seconds.append(time.perf_counter() - start)
    timed.phases.append(dict(fitted.seconds))
    timed.outcomes = fitted.outcomes


def count_necessary(
    model: EditableModel, edits: Sequence[EditRequest], case: Case, outcomes: Sequence[FitOutcome]
) -> NecessaryFlops:
    """Operations that fitting these edits, which ended like this, cannot do without."""
    plan = case.plan()
    counter = FlopCounter(model, plan.method.spec(model, plan.config))
    objective = plan.objective.build(plan.objective_config, case.steps)
    source = ViewSource(edits, None, seed=case.seed)
    total = NecessaryFlops(0, 0, 0, 0, 0)
    for first in range(0, len(edits), case.batch_size):
        batch = range(first, min(first + case.batch_size, len(edits)))
        views = [(i - first, view) for i in batch for view in source.views(i, objective.roles)]
        encoded = model.encode([view.query for _, view in views], answers=True)
        reference = [row for row, (_, view) in enumerate(views) if view.role >= Role.TEXT_LOCALITY]
        ended = outcomes[first : first + case.batch_size]
        total = total + counter.batch(encoded, [edit for edit, _ in views], ended, reference)
    return total


def rows_of(found: Comparison) -> list[Row]:
    """Everything measured, as rows that share provenance; those of the engine and peft with their ratio."""
    case = found.case
    commit, now = record.commit_with_changes(provenance.commit()), provenance.utc_now()
    machine, versions = record.machine(found.device), {**provenance.versions(), **_peft_version()}

    def row(implementation: str, metric: str, values: Sequence[float]) -> Row:
        value, low, high = record.spread(values)
        unit = record.METRICS.get(metric, "s")
        shared = (case.config, machine, versions, commit, case.seed, now)
        return Row(case.name, implementation, metric, unit, value, low, high, None, None, *shared)

    rows = [
        row("machine", "matmul_peak_gflop_per_s", [found.peak.matmul_gflop_per_s]),
        row("machine", "copy_bandwidth_gib_per_s", [found.peak.copy_gib_per_s]),
        row("machine", "necessary_gflop", [found.necessary.total / 1e9]),
        row("machine", "load_s", [found.load_s]),
    ]
    for name, runs in found.timed.items():
        rows.append(row(name, "edits_per_s", runs.edits_per_s(case.edits)))
        rows.append(row(name, "run_s", runs.seconds))
        rows.append(row(name, "nfu", found.nfu(name)))
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
