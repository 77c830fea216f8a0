"""The training loop for trained parts: AdamW, warm-up, early stop, checkpoints that a broken-off run goes on from."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastedit.files import claim_file, read_tensors, tensors_digest, write_tensors
from fastedit.progress import progress
from fastedit.training.artifact import Artifact
from fastedit.training.config import TrainerConfig

FORMAT = "fastedit-checkpoint/1"


class Task(Protocol):
    """What is trained. Optional members, looked up by name:

    ``groups() -> Mapping[str, float]``: factor on the learning rate by parameter name, 1 where absent.
    ``buffers() -> Mapping[str, Tensor]``: tensors that ``loss`` changes in place and that belong to the state.
    ``fingerprint: str``: of data and settings; a checkpoint of another one is refused.
    """

    name: str

    def parameters(self) -> Mapping[str, Tensor]:
        """Leaf tensors that require gradients, by name; changed in place. The same ones at every call."""

    def loss(self, step: int) -> tuple[Tensor, Mapping[str, float]]:
        """Scalar loss of step number ``step`` (from 0), and named values that the progress line shows.

        Anything drawn depends on ``step`` alone, or comes from torch's global generator, which the trainer seeds by
        (seed, step): a run that was broken off draws the same again.
        """

    def validate(self) -> Mapping[str, float]:
        """Scores of the present parameters on what is held out; "score" decides, the higher the better."""

    def result(self) -> Artifact:
        """The artifact of the present parameters."""


def train_task(
    task: Task,
    config: TrainerConfig,
    *,
    checkpoint: str | Path | None = None,
    resume: bool = True,
    show_progress: bool | None = None,
) -> Artifact:
    """Train a task and return its artifact with the best parameters that validation saw.

    A run that was broken off goes on from its checkpoint and ends with the same bits as one that was not.

    Args:
        task: what is trained; ends with the best parameters.
        config: settings.
        checkpoint: file that the state is written to, atomically, and read from; None keeps none.
        resume: go on from the checkpoint if it is there; False begins anew.
        show_progress: None shows a progress line on a terminal.
    Returns:
        ``task.result()`` with metrics: steps, seconds, validation (by step), best.
    Raises:
        ValueError: a checkpoint of another task or other settings, one that is not what was written or that another
            process writes, or parameters that cannot be trained.
        FloatingPointError: loss, gradient or parameters are not finite; names the step and the checkpoint that is kept.
        OSError: the checkpoint cannot be written; the one before is kept.
    """
    state = _State(task, config)
    if checkpoint is None:
        return _train(state, None, resume, show_progress)
    with claim_file(checkpoint, f"train {task.name}") as path:
        return _train(state, path, resume, show_progress)


def _train(state: _State, path: Path | None, resume: bool, show_progress: bool | None) -> Artifact:
    task, config = state.task, state.config
    if path is not None and resume and path.is_file():
        state.load(path)
    start = time.monotonic()
    with progress(f"training {task.name}", config.steps, show_progress, done=state.step) as line:
        while state.step < config.steps and not state.stopped:
            record = _step(state, path)
            line.describe(", ".join(f"{name} {value:.3g}" for name, value in {**record, **state.told()}.items()))
            line.advance()
            if _due(state.step, config.valid_every, config.steps):
                line.describe("validating")
                state.validate()
            if path is not None and _due(state.step, config.checkpoint_every, config.steps, state.stopped):
                state.save(path)
    state.take_best()
    artifact = task.result()
    seconds = state.seconds + time.monotonic() - start
    metrics = {"steps": state.step, "seconds": round(seconds, 1), "validation": state.history, "best": state.best}
    return replace(artifact, metrics={**artifact.metrics, **metrics})


def _due(step: int, every: int | None, last: int, stopped: bool = False) -> bool:
    return every is not None and (step % every == 0 or step == last or stopped)


def _step(state: _State, path: Path | None) -> dict[str, float]:
    """One optimiser step; its loss and what the task has to say of it."""
    config, parameters = state.config, list(state.parameters.values())
    factor = _rate(config, state.step)
    for group in state.optimiser.param_groups:
        group["lr"] = config.lr * group["factor"] * factor
    state.optimiser.zero_grad(set_to_none=True)
    with _seeded(config.seed, state.step, parameters):
        loss, told = state.task.loss(state.step)
    value = float(loss.detach())
    if not math.isfinite(value):
        raise FloatingPointError(_broken(state, path, f"loss={value}"))
    loss.backward()  # type: ignore[no-untyped-call]
    limit = math.inf if config.clip is None else config.clip
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
    if not math.isfinite(norm):
        raise FloatingPointError(_broken(state, path, f"norm of the gradient={norm}, loss={value}"))
    state.optimiser.step()
    state.step += 1
    return {"loss": value, **told}


def _rate(config: TrainerConfig, step: int) -> float:
    """Factor on the learning rate of step number ``step``."""
    rise = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    if config.schedule == "constant":
        return rise
    done = max(0, step - config.warmup) / max(1, config.steps - config.warmup)
    return rise * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def _broken(state: _State, path: Path | None, found: str) -> str:
    kept = "no checkpoint was asked for"
    if path is not None:
        kept = f"the state before is kept in {path}" if path.is_file() else "no checkpoint was written yet"
    told = f"step={state.step}, {found}, lr={state.config.lr}, clip={state.config.clip}"
    return f"train {state.task.name}: loss, gradient and parameters are finite (got {told}); {kept}; try a smaller lr"


@contextmanager
def _seeded(seed: int, step: int, parameters: list[Tensor]) -> Iterator[None]:
    """Inside the block torch's generator is at the place of this step; outside it is where it was."""
    devices = sorted({p.device.index or 0 for p in parameters if p.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        # Mixed, so that seeds 0 and 1 do not share their steps
        torch.manual_seed((seed * 0x9E3779B97F4A7C15 + step) % 2**63)
        yield


class _State:
    """Everything that a broken-off run needs."""

    def __init__(self, task: Task, config: TrainerConfig) -> None:
        self.task, self.config = task, config
        self.parameters = dict(task.parameters())
        if not self.parameters:
            raise ValueError(f"train {task.name}: at least one parameter (got none)")
        for name, parameter in self.parameters.items():
            if not (parameter.is_leaf and parameter.requires_grad):
                raise ValueError(f"train {task.name}: parameters are leaves that require gradients (got {name!r})")
        self.buffers: dict[str, Tensor] = dict(_optional(task, "buffers"))
        factors = _optional(task, "groups")
        unknown = sorted(set(factors) - set(self.parameters))
        if unknown:
            raise ValueError(f"train {task.name}: groups name parameters (got {unknown[0]!r})")
        groups = [{"params": [p], "factor": float(factors.get(name, 1.0))} for name, p in self.parameters.items()]
        self.optimiser = torch.optim.AdamW(
            groups, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
        )
        self.step, self.waited, self.seconds = 0, 0, 0.0
        self.best: dict[str, float] | None = None
        self.history: list[dict[str, float]] = []
        self._best_tensors: dict[str, Tensor] = {}
        self._start = time.monotonic()

    @property
    def stopped(self) -> bool:
        """Whether validation has not improved for too long."""
        return self.config.patience is not None and self.waited >= self.config.patience

    def told(self) -> dict[str, float]:
        """The last validation's score, for the progress line."""
        return {"score": self.history[-1]["score"]} if self.history else {}

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers, the tensors themselves."""
        return {f"parameter/{n}": t for n, t in self.parameters.items()} | {
            f"buffer/{n}": t for n, t in self.buffers.items()
        }

    def validate(self) -> None:
        """Score the present parameters; keep them if they are the best so far."""
        with _seeded(self.config.seed, -1, list(self.parameters.values())):
            found = {name: float(value) for name, value in self.task.validate().items()}
        if "score" not in found:
            raise ValueError(f"train {self.task.name}: validation gives 'score' (got {sorted(found)})")
        found["step"] = self.step
        self.history.append(found)
        if math.isfinite(found["score"]) and (self.best is None or found["score"] > self.best["score"]):
            self.best, self.waited = found, 0
            self._best_tensors = {n: t.detach().to("cpu", copy=True) for n, t in self.tensors().items()}
        else:
            self.waited += 1

    def take_best(self) -> None:
        """Put back the best parameters and buffers."""
        with torch.no_grad():
            for name, tensor in self.tensors().items():
                if name in self._best_tensors:
                    tensor.copy_(self._best_tensors[name])

    def save(self, path: Path) -> None:
        """Write a checkpoint, of parameters that can be gone on with."""
        for name, parameter in self.parameters.items():
            if not bool(torch.isfinite(parameter.detach()).all()):
                raise FloatingPointError(_broken(self, path, f"{name} with values that are not finite"))
        tensors = {name: tensor.detach() for name, tensor in self.tensors().items()}
        for name, parameter in self.parameters.items():
            moments = self.optimiser.state[parameter]
            for key in ("exp_avg", "exp_avg_sq", "step"):
                if key in moments:
                    tensors[f"{key}/{name}"] = moments[key]
        tensors |= {f"best/{name}": tensor for name, tensor in self._best_tensors.items()}
        header = {**self._owner(), "step": self.step, "waited": self.waited, "best": self.best}
        header |= {"history": self.history, "seconds": self.seconds + time.monotonic() - self._start}
        kept = {name: tensor.cpu() for name, tensor in tensors.items()}
        write_tensors(kept, {**header, "content": tensors_digest(kept)}, path, f"train {self.task.name}")

    def load(self, path: Path) -> None:
        """Go on from a checkpoint."""
        tensors, header, checked = read_tensors(path, FORMAT, f"train {self.task.name}")
        if not checked:
            told = f"train {self.task.name}: the checkpoint {path} was written without a checksum: it is not checked"
            warnings.warn(told, UserWarning, stacklevel=2)
        if checked and header.get("content") != tensors_digest(tensors):
            raise ValueError(
                f"train {self.task.name}: the checkpoint is what was written (its checksum differs in {path}); delete "
                "it, or pass resume=False"
            )
        for name, mine in self._owner().items():
            if header.get(name) != mine:
                raise ValueError(
                    f"train {self.task.name}: the checkpoint {path} was written by a run with other settings or data; "
                    f"delete it, or pass resume=False (got {name}={header.get(name)!r:.300}, now {mine!r:.300})"
                )
        try:
            with torch.no_grad():
                for name, tensor in self.tensors().items():
                    tensor.copy_(tensors[name])
            for name, parameter in self.parameters.items():
                keys = [key for key in ("exp_avg", "exp_avg_sq", "step") if f"{key}/{name}" in tensors]
                moments = {key: tensors[f"{key}/{name}"] for key in keys}
                places = {key: "cpu" if key == "step" else parameter.device for key in keys}
                self.optimiser.state[parameter] = {key: moments[key].to(places[key]) for key in keys}
            self._best_tensors = {n[len("best/") :]: t for n, t in tensors.items() if n.startswith("best/")}
            self.step, self.waited, self.best = int(header["step"]), int(header["waited"]), header["best"]
            self.history, self.seconds = header["history"], float(header["seconds"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise ValueError(f"train {self.task.name}: a whole checkpoint (got {error!r:.200} in {path})") from error

    def _owner(self) -> dict[str, Any]:
        """What must agree between a checkpoint and the run that goes on from it."""
        settings = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.config).items()}
        return {
            "format": FORMAT,
            "task": self.task.name,
            "fingerprint": getattr(self.task, "fingerprint", ""),
            "config": settings,
        }


def _optional(task: Task, name: str) -> Mapping[str, Any]:
    """What an optional member of a task gives; nothing if it is absent."""
    member = getattr(task, name, None)
    found: Mapping[str, Any] = {} if member is None else member()
    return found
