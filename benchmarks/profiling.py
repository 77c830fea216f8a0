"""Where the time of one implementation goes, operator by operator."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from benchmarks import implementations
from benchmarks.cases import Case, edits_of, one_batch
from benchmarks.harness import Models
from benchmarks.implementations import ENGINE, forget
from benchmarks.variants import is_variant

TOP = 20
#: The baselines repeat themselves: a few steps of one edit show everything, in a trace one can still open.
BASELINE_STEPS = 3


def profile_case(case: Case, folder: Path) -> dict[str, tuple[str, Path]]:
    """Profile one batch of the engine and one edit of every baseline.

    Args:
        case: what to run.
        folder: Chrome traces (chrome://tracing, ui.perfetto.dev) are written into it.
    Returns:
        implementation -> (table of the operators with the most time of their own, trace file).
    """
    from torch.profiler import ProfilerActivity, profile

    folder.mkdir(parents=True, exist_ok=True)
    models = Models(case)
    model = models.of(ENGINE)
    activities = [ProfilerActivity.CPU]
    cuda = model.device.type == "cuda"
    if cuda:
        activities.append(ProfilerActivity.CUDA)
    found = {}
    for name in (ENGINE, *case.baselines):
        small = replace(case, edits=one_batch(case))
        if name != ENGINE and not is_variant(name):
            small = replace(case, edits=1, steps=min(case.steps, BASELINE_STEPS))
        edits, model = edits_of(small), models.of(name)
        implementations.run(name, model, edits, replace(small, steps=min(small.steps, 1)))
        forget(model)
        with profile(activities=activities, record_shapes=True) as profiler:
            implementations.run(name, model, edits, small)
        order = "self_device_time_total" if cuda else "self_cpu_time_total"
        table = profiler.key_averages(group_by_input_shape=False).table(
            sort_by=order, row_limit=TOP, max_name_column_width=48
        )
        stem = re.sub(r"[^\w.=-]+", "-", f"{case.name}-{name}").strip("-")
        trace = folder / f"trace-{stem}.json"
        profiler.export_chrome_trace(str(trace))
        found[name] = (table, trace)
    return found
