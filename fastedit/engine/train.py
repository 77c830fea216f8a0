"""``train``: the trained part of a method, made once for a model and used for any number of edits."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from fastedit.backbone import EditableModel
from fastedit.backbone.context import on_frozen_model, with_gradients
from fastedit.data import fingerprint
from fastedit.engine.arguments import check_records
from fastedit.engine.memory.oom import is_out_of_memory, release_memory
from fastedit.engine.output import claim_result, require_room
from fastedit.engine.preflight import check_training
from fastedit.methods import METHODS, EditPlan, resolve
from fastedit.methods.base import is_trained
from fastedit.ops import keep_freed_memory
from fastedit.progress import progress
from fastedit.requests import EditRequest
from fastedit.settings import typed
from fastedit.training import Artifact, Task, TrainerConfig, load_artifact, processes, save_artifact, train_task

# On disk at once, of what is trained: a checkpoint of values, moments and the best, the one before it, the artifact
_COPIES = 9


#: Steps draw from torch's global generator, which is the process's: a second thread would change what they draw.
_TRAINING = threading.Lock()


@on_frozen_model
@with_gradients
def train(
    model: EditableModel,
    method: str,
    records: Sequence[EditRequest],
    *,
    out: str | Path | None = None,
    resume: bool = True,
    show_progress: bool | None = None,
    trainer: TrainerConfig | Mapping[str, Any] | None = None,
    together: bool = True,
    **overrides: Any,
) -> Artifact:
    """Train the part that a method needs before it can edit, on a frozen model.

    Args:
        model: from ``fastedit.load``; nothing of it is written.
        method: as it will be spelled in ``fastedit.edit``: "mend", "odedit+mend" ...
        records: to learn from, none of those that will be edited.
        out: file for the artifact. Beside it lies a checkpoint while training goes on; a run that was broken off goes
            on from it, and one that has ended with the same settings and records is read back instead.
        resume: False begins anew whatever lies there.
        show_progress: None shows a progress line with the time left on a terminal.
        trainer: settings of training, over the method's own (steps, batch_size, lr, seed ...).
        together: with all processes of the program's process group, each of which has to call it: one that calls it
            alone waits for the others until the group's timeout. False trains in this process alone, as if there were
            no others.
        overrides: fields of the method's and the objective's config.
    Returns:
        Artifact, for ``fastedit.edit(..., artifact=...)``.

    Under torchrun or accelerate launch all processes train together: each has ``batch_size`` records of a step, the
    first one reads and writes ``out``, and all of them return the artifact. Checkpoints are those of one process with
    the whole batch: another number of processes goes on from them where processes times ``batch_size`` is the same.

    Raises:
        ValueError: a method without trained parts, a setting that does not exist, or records that do not suffice; or
            ``out`` cannot be written to, another process writes it, or the disk has no room; before any work starts.
        FloatingPointError: training broke down; the last good state is kept beside ``out``.
        MemoryError, torch.OutOfMemoryError, RuntimeError: memory ran out twice in one step; the state of the last
            checkpoint is kept beside ``out``. A smaller ``batch_size`` takes less, and begins anew.
        OSError: the disk is full; the last state that was written is kept beside ``out``.
        RuntimeError: another thread of this process is training.
    """
    check_records("train", "records", records)
    plan = resolve(method, overrides)
    kind = trained_kind(plan)
    settings = trainer_settings(plan, trainer)
    with progress("checking the records", 0, show_progress):
        check_training(model, records, plan)
    if model.device.type == "cpu":
        keep_freed_memory()
    objective = plan.objective.build(plan.objective_config, settings.steps) if plan.prefix else None
    with processes.apart(not together), _alone(), _joined_claim(out) as path:
        show_progress = show_progress if processes.is_first() else False
        settings = replace(settings, batch_size=settings.batch_size * processes.count())
        _require_alike(model, plan, records, settings, resume)
        with progress(f"preparing {kind}", 0, show_progress):
            task = plan.method.task(model, plan.config, objective, list(records), settings)
        done = processes.by_first(
            lambda: _done(path, model, kind, task, settings) if path is not None and resume else None
        )
        if done is not None:
            return done
        if path is not None:
            require_room(path.parent, _COPIES * _parameter_bytes(task), "train")
        state = None if path is None else path.with_name(path.name + ".training")
        made = train_task(
            task, settings, checkpoint=state, resume=resume, show_progress=show_progress,
            recover=partial(_recover, model, kind, settings, state) if processes.count() == 1 else None,
        )  # fmt: skip
        metrics = {**made.metrics, "task": getattr(task, "fingerprint", ""), "trainer": asdict(settings)}
        artifact = replace(made, kind=kind, metrics=metrics)
        if path is not None and state is not None:
            save_artifact(artifact, path)
            state.unlink(missing_ok=True)
        return artifact


def _joined_claim(out: str | Path | None) -> AbstractContextManager[Path | None]:
    """The file that is written, where this process writes one, once it has joined those that it trains with."""
    processes.join()
    return claim_result(out, field="train") if out is not None and processes.is_first() else nullcontext()


def _require_alike(
    model: EditableModel, plan: EditPlan, records: Sequence[EditRequest], settings: TrainerConfig, resume: bool
) -> None:
    """Refuse processes that were asked for different work."""
    if processes.count() == 1:
        return
    asked = {"method": plan.name, "config": repr((plan.config, plan.objective_config)), "trainer": repr(settings)}
    asked |= {"records": fingerprint(records), "model": model.fingerprint, "resume": str(resume)}
    processes.require_alike(asked, model.device)


def _recover(
    model: EditableModel, kind: str, settings: TrainerConfig, state: Path | None, error: BaseException
) -> Callable[[], None] | None:
    """What gives a step that ran out of memory room; None for other errors."""
    if not is_out_of_memory(error):
        return None
    kept = "" if state is None or not state.is_file() else f"; the state of the last checkpoint is kept in {state}"
    message = f"train {kind}: memory ran out in a step of batch_size={settings.batch_size}"
    warnings.warn(f"{message}; trying once more with all caches emptied{kept}", RuntimeWarning, stacklevel=5)
    return partial(release_memory, model)


@contextmanager
def _alone() -> Iterator[None]:
    """Let one thread of the process train."""
    if not _TRAINING.acquire(blocking=False):
        raise RuntimeError(
            "train: one thread of a process may train at a time (got a second call while one is running)"
        )
    try:
        yield
    finally:
        _TRAINING.release()


def _parameter_bytes(task: Task) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in task.parameters().values())


def trained_kind(plan: EditPlan) -> str:
    """The kind of the trained part of a method.

    Raises:
        ValueError: it has none; names those that have.
    """
    kind = plan.artifact_kind
    if kind is None or not is_trained(plan.method):
        known = [name for name, method in METHODS.items() if is_trained(method)]
        raise ValueError(f"train: a method with trained parts, of {', '.join(known) or 'none'} (got {plan.name!r})")
    return kind


def trainer_settings(plan: EditPlan, given: TrainerConfig | Mapping[str, Any] | None) -> TrainerConfig:
    """Settings of training: those given over the method's own.

    Raises:
        ValueError: a setting that does not exist, or a value out of its range.
    """
    if isinstance(given, TrainerConfig):
        typed("train", TrainerConfig, vars(given))
        return given
    base = plan.method.trainer(plan.config)
    known = {field.name for field in fields(TrainerConfig)}
    for name, value in (given or {}).items():
        if name not in known:
            raise ValueError(f"train: trainer is one of {', '.join(sorted(known))} (got {name}={value!r})")
    return replace(base, **typed("train", TrainerConfig, given or {}))


def _done(path: Path, model: EditableModel, kind: str, task: Task, settings: TrainerConfig) -> Artifact | None:
    """What an earlier run with the same settings and records left there."""
    fingerprint = getattr(task, "fingerprint", "")
    if not fingerprint or not path.is_file():
        return None
    try:
        found = load_artifact(path, model, kind=kind)
    except ValueError:
        # Of another model or method, or broken: it will be replaced
        return None
    plain = replace(found, metrics={"trainer": asdict(settings)}).metrics["trainer"]
    same = found.metrics.get("task") == fingerprint and found.metrics.get("trainer") == plain
    return found if same else None
