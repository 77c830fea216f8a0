"""``fastedit plan`` and the line about memory that ``edit`` and ``compare`` begin with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from fastedit.engine.plan import MemoryPlan, plan_memory
from fastedit.methods import resolve, setting_names
from fastedit.requests import EditRequest


def read_batch_size(text: str) -> int | str:
    """A batch size as it is typed: a number of at least 1, or "auto".

    Raises:
        ValueError: anything else.
    """
    if text == "auto":
        return text
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"--batch-size: a number of at least 1, or auto (got {text!r})")
    return int(text)


def announce(
    console: Console,
    model: str,
    edits: Sequence[EditRequest],
    methods: Mapping[str, Mapping[str, Any]],
    *,
    batch_size: int | str,
    loading: Mapping[str, Any],
) -> None:
    """Print what the method that needs the most memory needs, before the model is loaded.

    Args:
        methods: settings by name. loading: arguments of ``fastedit.load``, None for its own defaults.
    """
    given = {name: value for name, value in loading.items() if value is not None}
    plans = []
    for name, settings in methods.items():
        # The rest is for ``edit``, which refuses what nobody knows
        known = setting_names(resolve(name, {}))
        fields = {key: value for key, value in settings.items() if key in known}
        fields |= {"evaluate": bool(settings.get("evaluate", True)), "keep_deltas": "deltas_folder" not in settings}
        plans.append(plan_memory(model, method=name, batch_size=batch_size, edits=edits, **given, **fields))
    largest = max(plans, key=lambda plan: plan.total_bytes)
    size = f"batch of {largest.batch_size}" if batch_size == "auto" else f"batch size {batch_size}"
    console.print(f"{model}, {size}: {largest.text()}", markup=False, soft_wrap=True)
    if not largest.fits():
        console.print("this may not fit: try a smaller --batch-size, auto, or --quantize nf4", style="yellow")


def plan_table(model: str, plan: MemoryPlan) -> Table:
    """Every part in MiB: what is there all the time, then phase by phase, the largest one marked."""
    table = Table(title=f"{model} on {plan.device}, batch size {plan.batch_size}", box=box.SIMPLE_HEAD)
    table.add_column("when")
    table.add_column("part")
    table.add_column("MiB", justify="right")
    for name, size in plan.held.items():
        table.add_row("always", name, _mib(size))
    for phase, parts in plan.phases.items():
        label = f"{phase} (peak)" if phase == plan.peak_phase else phase
        for number, (name, size) in enumerate(parts.items()):
            table.add_row("" if number else label, name, _mib(size))
    table.add_section()
    table.add_row("peak", "needed", _mib(plan.total_bytes))
    known = plan.available_bytes
    table.add_row("", "available", "unknown" if known is None else _mib(known))
    return table


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f}"
