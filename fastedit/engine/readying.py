"""What all edits of a run share, made before the first of them; by every process that makes some."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from fastedit.backbone.quantization import expanded_layers
from fastedit.deltas import split_point
from fastedit.engine.memory.oom import once_more
from fastedit.engine.run_state import EditJob, RunState
from fastedit.engine.soundness import check_finite
from fastedit.methods.base import Resources
from fastedit.ops import keep_freed_memory
from fastedit.progress import progress


def ready_device(device: torch.device) -> None:
    """Let a device begin a run: memory is kept or counted from here on."""
    if device.type == "cpu":
        keep_freed_memory()
    elif device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def set_up(run: RunState, show_progress: bool | None) -> None:
    """Make what all edits of a run share, and ask the model a first question."""
    job, model, plan, timer = run.job, run.job.model, run.job.plan, run.timer
    resources = Resources(job.pool, job.artifact, job.seed, plan.prefix)
    with timer.phase("setup"), progress(f"setting up {plan.name}", 0, show_progress):
        run.shared = once_more(model, lambda: plan.method.setup(model, plan.config, resources), "setting up the method")
    # Behind the setup, which refuses trained parts of another shape before the model is asked anything
    with timer.phase("setup"):
        once_more(model, lambda: check_finite(model, job.edits), "asking the first question")


def expanded(job: EditJob) -> AbstractContextManager[Any]:
    """Inside the block the layers that edits go through multiply by weights that are dequantized once."""
    return expanded_layers(job.model, split_point(job.spec)[0]) if job.spec.sites else nullcontext()
