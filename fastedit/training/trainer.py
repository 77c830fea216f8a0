"""The training loop for trained parts: AdamW, warm-up, early stop, checkpoints that a broken-off run goes on from."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from fastedit.files import claim_file
from fastedit.progress import progress
from fastedit.training import processes
from fastedit.training.artifact import Artifact
from fastedit.training.config import TrainerConfig
from fastedit.training.state import State, Task, broken_message, seeded

Made = TypeVar("Made")
#: Gives what is to be done before a step is made once more, or None where its error is final.
Recover = Callable[[BaseException], Callable[[], None] | None]


def train_task(
    task: Task,
    config: TrainerConfig,
    *,
    checkpoint: str | Path | None = None,
    resume: bool = True,
    show_progress: bool | None = None,
    recover: Recover | None = None,
) -> Artifact:
    """Train a task and return its artifact with the best parameters that validation saw.

    A run that was broken off goes on from its checkpoint and ends with the same bits as one that was not.

    Args:
        task: what is trained; ends with the best parameters.
        config: settings.
        checkpoint: file that the state is written to, atomically, and read from; None keeps none.
        resume: go on from the checkpoint if it is there; False begins anew.
        show_progress: None shows a progress line on a terminal.
        recover: asked about an error inside of a step; what it gives is called, and the step is made once more.
    Returns:
        ``task.result()`` with metrics: steps, seconds, validation (by step), best, status: "max_steps", "early_stop" or
        "diverging" (the loss ended above where it began, and no validation was better than the first).
    Raises:
        ValueError: a checkpoint of another task or other settings, one that is not what was written or that another
            process writes, or parameters that cannot be trained.
        FloatingPointError: loss, gradient or parameters are not finite; names the step and the checkpoint that is kept.
        OSError: the checkpoint cannot be written; the one before is kept.
    """
    state = State(task, config)
    if checkpoint is None:
        return _train(state, None, resume, show_progress, recover)
    with claim_file(checkpoint, f"train {task.name}") as path:
        return _train(state, path, resume, show_progress, recover)


def _train(
    state: State, path: Path | None, resume: bool, show_progress: bool | None, recover: Recover | None
) -> Artifact:
    task, config = state.task, state.config
    if path is not None and resume and path.is_file():
        state.load(path)
    state.share()
    start = time.monotonic()
    with progress(f"training {task.name}", config.steps, show_progress, done=state.step) as line:
        while state.step < config.steps and not state.stopped:
            record = _tried(state, recover, partial(_step, state, path))
            line.describe(", ".join(f"{name} {value:.3g}" for name, value in {**record, **state.told()}.items()))
            line.advance()
            if _due(state.step, config.valid_every, config.steps):
                line.describe("validating")
                _tried(state, recover, state.validate)
            if path is not None and _due(state.step, config.checkpoint_every, config.steps, state.stopped):
                state.save(path)
    state.take_best()
    state.check_finite(path)
    if state.history and state.best is None:
        raise FloatingPointError(broken_message(state, path, f"no finite score in {len(state.history)} validations"))
    if state.status == "diverging" and processes.is_first():
        message = f"train {task.name}: the loss ended above where it began (got {state.told_losses}); try a smaller lr"
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    if state.best is not None and state.best["score"] == 0 and processes.is_first():
        message = f"train {task.name}: no validation scored above 0 (got {len(state.history)} validations)"
        warnings.warn(f"{message}; try more steps, more records or a smaller lr", RuntimeWarning, stacklevel=3)
    artifact = task.result()
    seconds = state.seconds + time.monotonic() - start
    metrics = {"steps": state.step, "seconds": round(seconds, 1), "validation": state.history, "best": state.best}
    metrics["status"] = state.status
    return replace(artifact, metrics={**artifact.metrics, **metrics})


def _due(step: int, every: int | None, last: int, stopped: bool = False) -> bool:
    return every is not None and (step % every == 0 or step == last or stopped)


def _tried(state: State, recover: Recover | None, make: Callable[[], Made]) -> Made:
    """What a step or a validation gives, made once more where it can be recovered from; buffers are as before it."""
    before = {name: tensor.clone() for name, tensor in state.buffers.items()}
    again: Callable[[], None] | None = None
    try:
        return make()
    except Exception as error:
        again = None if recover is None or state.is_stepping else recover(error)
        if again is None:
            raise
    # Not in the handler: the traceback holds the tensors of the step
    state.optimiser.zero_grad(set_to_none=True)
    again()
    for name, tensor in state.buffers.items():
        tensor.copy_(before[name])
    return make()


def _step(state: State, path: Path | None) -> dict[str, float]:
    """One optimiser step; its loss and what the task has to say of it."""
    config, parameters = state.config, list(state.parameters.values())
    factor = _rate(config, state.step)
    for group in state.optimiser.param_groups:
        group["lr"] = config.lr * group["factor"] * factor
    state.optimiser.zero_grad(set_to_none=True)
    with seeded(config.seed, state.step, parameters):
        loss, parts = state.task.loss(state.step)
    value = processes.mean(float(loss.detach()))
    if not math.isfinite(value):
        raise FloatingPointError(broken_message(state, path, f"loss={value}"))
    loss.backward()  # type: ignore[no-untyped-call]
    processes.average_gradients(parameters)
    limit = math.inf if config.clip is None else config.clip
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
    if not math.isfinite(norm):
        raise FloatingPointError(broken_message(state, path, f"norm of the gradient={norm}, loss={value}"))
    state.is_stepping = True
    state.optimiser.step()
    state.is_stepping = False
    state.step += 1
    state.note(value)
    return {"loss": value, **parts}


def _rate(config: TrainerConfig, step: int) -> float:
    """Factor on the learning rate of step number ``step``."""
    rise = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    if config.schedule == "constant":
        return rise
    done = max(0, step - config.warmup) / max(1, config.steps - config.warmup)
    return rise * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
