"""The state of a training: parameters, moments, losses and validations, and its checkpoint on disk."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastedit.files import read_tensors, tensors_digest, write_tensors
from fastedit.training import processes
from fastedit.training.artifact import Artifact
from fastedit.training.config import TrainerConfig

FORMAT = "fastedit-checkpoint/1"
#: Losses that are averaged at the start and at the end, and how much higher the last are, as a share, that go nowhere.
FEW, WORSE = 10, 0.1


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


def broken_message(state: State, path: Path | None, found: str) -> str:
    """What is said of numbers that are none, and what is kept."""
    kept = "no checkpoint was asked for"
    if path is not None:
        kept = f"the state before is kept in {path}" if path.is_file() else "no checkpoint was written yet"
    detail = f"step={state.step}, {found}, lr={state.config.lr}, clip={state.config.clip}"
    return f"train {state.task.name}: loss, gradient and parameters are finite (got {detail}); {kept}; try a smaller lr"


@contextmanager
def seeded(seed: int, step: int, parameters: list[Tensor]) -> Iterator[None]:
    """Inside the block torch's generator is at the place of this step; outside it is where it was."""
    devices = sorted({p.device.index or 0 for p in parameters if p.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        # Mixed, so that seeds 0 and 1 do not share their steps
        torch.manual_seed((seed * 0x9E3779B97F4A7C15 + step) % 2**63)
        yield


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


class State:
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
        #: The first losses, and the last.
        self.losses: tuple[list[float], list[float]] = ([], [])
        #: Whether the optimiser is at work: what breaks then leaves parameters of two steps.
        self.is_stepping = False
        self._best_tensors: dict[str, Tensor] = {}
        self._start = time.monotonic()

    @property
    def stopped(self) -> bool:
        """Whether validation has not improved for too long."""
        return self.config.patience is not None and self.waited >= self.config.patience

    @property
    def status(self) -> str:
        """How training ended, see ``train_task``."""
        first, last = map(_mean, self.losses)
        improved = self.best is not None and self.best["step"] != self.history[0]["step"]
        if self.step >= 2 * FEW and not improved and last > first + WORSE * max(abs(first), 1.0):
            return "diverging"
        return "early_stop" if self.stopped and self.step < self.config.steps else "max_steps"

    @property
    def told_losses(self) -> str:
        """The first and the last loss."""
        first, last = map(_mean, self.losses)
        return f"a mean loss of {first:.4g} over the first {FEW} steps, {last:.4g} over the last"

    def note(self, loss: float) -> None:
        """One more loss."""
        first, last = self.losses
        if len(first) < FEW:
            first.append(loss)
        last.append(loss)
        del last[:-FEW]

    def check_finite(self, path: Path | None) -> None:
        """Refuse parameters that are not numbers.

        Raises:
            FloatingPointError: names the first, and the checkpoint that is kept.
        """
        for name, parameter in self.parameters.items():
            if not bool(torch.isfinite(parameter.detach()).all()):
                raise FloatingPointError(broken_message(self, path, f"{name} with values that are not finite"))

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
        with seeded(self.config.seed, -1, list(self.parameters.values())):
            found = processes.by_first(lambda: {name: float(value) for name, value in self.task.validate().items()})
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
        self.check_finite(path)
        tensors = {name: tensor.detach() for name, tensor in self.tensors().items()}
        for name, parameter in self.parameters.items():
            moments = self.optimiser.state[parameter]
            for key in ("exp_avg", "exp_avg_sq", "step"):
                if key in moments:
                    tensors[f"{key}/{name}"] = moments[key]
        tensors |= {f"best/{name}": tensor for name, tensor in self._best_tensors.items()}
        header = {**self._owner(), "step": self.step, "waited": self.waited, "best": self.best}
        header |= {
            "losses": self.losses,
            "history": self.history,
            "seconds": self.seconds + time.monotonic() - self._start,
        }
        kept = {name: tensor.cpu() for name, tensor in tensors.items()}
        write_tensors(kept, {**header, "content": tensors_digest(kept)}, path, f"train {self.task.name}")

    def load(self, path: Path) -> None:
        """Go on from a checkpoint."""
        tensors, header, checked = read_tensors(path, FORMAT, f"train {self.task.name}")
        if not checked:
            detail = f"train {self.task.name}: the checkpoint {path} was written without a checksum: it is not checked"
            warnings.warn(detail, UserWarning, stacklevel=2)
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
            first, last = header.get("losses", ((), ()))
            self.losses = [float(loss) for loss in first], [float(loss) for loss in last]
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise ValueError(f"train {self.task.name}: a whole checkpoint (got {error!r:.200} in {path})") from error

    def share(self) -> None:
        """Go on from where the first of several processes is, which alone reads checkpoints."""
        if processes.count() == 1:
            return
        moments = {n: self.optimiser.state[p] for n, p in self.parameters.items() if p in self.optimiser.state}
        counted = self.step, self.waited, self.best, self.history, self.seconds, self.losses
        tensors = {name: tensor.detach() for name, tensor in self.tensors().items()}
        shared = processes.by_first(lambda: (tensors, moments, self._best_tensors, counted))
        tensors, moments, self._best_tensors, counted = shared
        self.step, self.waited, self.best, self.history, self.seconds, self.losses = counted
        with torch.no_grad():
            for name, tensor in self.tensors().items():
                tensor.copy_(tensors[name])
        for name, values in moments.items():
            place = self.parameters[name].device
            self.optimiser.state[self.parameters[name]] = {
                key: value.to("cpu" if key == "step" else place) for key, value in values.items()
            }

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
