"""``fastedit plan`` and the line about memory that ``edit`` and ``compare`` begin with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group

from fastedit.cli.tables import titled
from fastedit.engine.memory.plan import MemoryPlan, plan_memory
from fastedit.requests import EditRequest


def announce(
    model: str,
    edits: Sequence[EditRequest],
    methods: Mapping[str, Mapping[str, Any]],
    *,
    batch_size: int | str,
    loading: Mapping[str, Any],
    evaluate: bool = True,
    keep_deltas: bool = True,
) -> tuple[list[str], float]:
    """What the method that needs the most memory needs: in a line or two, and in MiB; before the model is loaded.

    Args:
        methods: settings by name. loading: arguments of ``fastedit.load``. evaluate, keep_deltas: see ``plan_memory``.
    """
    given = {name: value for name, value in loading.items() if name != "template"}
    plans = [
        plan_memory(
            model, method=name, batch_size=batch_size, edits=edits, evaluate=evaluate, keep_deltas=keep_deltas,
            **given, **settings,
        )
        for name, settings in methods.items()
    ]  # fmt: skip
    largest = max(plans, key=lambda plan: plan.total_bytes)
    size = f"batch of {largest.batch_size}" if batch_size == "auto" else f"batch size {batch_size}"
    lines = [f"{model}, {size}: {largest.text()}"]
    if not largest.fits():
        lines.append("this may not fit: try a smaller --batch-size, auto, or --quantize nf4")
    return lines, largest.total_bytes / 2**20


def plan_table(model: str, plan: MemoryPlan) -> Group:
    """Every part in MiB: what is there all the time, then phase by phase, the largest one marked."""
    title = f"{Path(model).name} on {plan.device}, batch size {plan.batch_size}"
    shown, table = titled(title, ("when", "part", "MiB"), left=2)
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
    return shown


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f}"
