"""Several processes that train one part together, as torchrun and accelerate launch start them.

Every process draws the whole batch, works at its own part of it, and takes the mean of all gradients, so that the state
of training is the same in each of them; the first one alone reads and writes files and validates.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed

T = TypeVar("T")
#: What torchrun and accelerate launch tell a process.
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: How long processes wait for the first one, which validates alone.
LONGEST = timedelta(hours=2)
_APART: ContextVar[bool] = ContextVar("fastedit_apart", default=False)


def join() -> None:
    """Make one group of this process and the others that were started with it; without others, or in one, nothing.

    The group stays until the process ends: a second one at the same launcher would meet the addresses of the first.

    Raises:
        ValueError: the variables that a launcher sets are incomplete.
    """
    if _APART.get() or _there() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing:
        raise ValueError(
            f"train: several processes are started by torchrun or accelerate launch, which set {', '.join(VARIABLES)} "
            f"(got WORLD_SIZE={os.environ['WORLD_SIZE']} and no {missing[0]})"
        )
    distributed.init_process_group(timeout=LONGEST)
    atexit.register(distributed.destroy_process_group)


def take_device() -> None:
    """Let "cuda" mean another GPU in each process of a machine that a launcher started."""
    if torch.cuda.is_available() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


def count() -> int:
    """How many processes train; 1 before ``join``."""
    return distributed.get_world_size() if _there() else 1


def rank() -> int:
    """The number of this process, from 0; also before it has joined the others."""
    if _APART.get():
        return 0
    return distributed.get_rank() if _there() else int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0


def require_alike(facts: Mapping[str, Any], device: torch.device) -> None:
    """Refuse processes that were asked for different work, or share a GPU.

    Args:
        facts: what must be equal, by name. device: of this process's model.
    Raises:
        ValueError: names the first difference; in every process.
    """
    if count() == 1:
        return
    gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None
    everyone: list[Any] = [None] * count()
    distributed.all_gather_object(everyone, (dict(facts), gpu))
    for name, value in everyone[0][0].items():
        for number, (others, _) in enumerate(everyone):
            if others[name] != value:
                raise ValueError(
                    f"train: processes that train together are given the same (got {name}={value!r:.100} in process "
                    f"0, {others[name]!r:.100} in process {number})"
                )
    gpus = [each for _, each in everyone if each is not None]
    shared = next((each for each in gpus if gpus.count(each) > 1), None)
    if shared is not None:
        holders = [number for number, (_, each) in enumerate(everyone) if each == shared]
        raise ValueError(
            f"train: each process has a GPU of its own; load the model on f'cuda:{{LOCAL_RANK}}' (got processes "
            f"{holders} on one)"
        )


def bounds(n: int) -> tuple[int, int]:
    """Where this process's part of n things begins and ends; parts follow one another, sizes differ by one at most."""
    if count() == 1:
        return 0, n
    return n * rank() // count(), n * (rank() + 1) // count()


def own(items: Sequence[T]) -> Sequence[T]:
    """This process's part of what all have."""
    start, end = bounds(len(items))
    return items[start:end]


def at_once(batch_size: int) -> int:
    """How many things of a whole batch of so many one process works at together, at least 1."""
    return max(1, batch_size // count())


def gathered(values: Tensor, start: int, total: int) -> Tensor:
    """Rows (total, ...) of all processes, in order, of which this one made ``values`` from row ``start`` on.

    What follows is computed by every process alike. Gradients reach the own rows, as many times as there are processes,
    so that the mean over processes is the gradient of the whole.
    """
    whole: Any = values if count() == 1 else _Gathered.apply(values, start, total)  # type: ignore[no-untyped-call]
    return cast(Tensor, whole)


class _Gathered(torch.autograd.Function):
    """See ``gathered``."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, start: int, total: int) -> Tensor:
        ctx.rows = slice(start, start + len(values))
        whole = values.new_zeros(total, *values.shape[1:])
        whole[ctx.rows] = values
        distributed.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return count() * grad[ctx.rows], None, None


def draw_apart() -> None:
    """Let what is drawn from torch's generator from here on differ between processes, within a step."""
    if count() > 1:
        torch.manual_seed(torch.initial_seed() + rank())


def mean(value: float) -> float:
    """Of a number that each process has, in float64."""
    if count() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64, device=_device())
    distributed.all_reduce(total)
    return float(total) / count()


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Let every process have the mean of all gradients; where no process has one there is none."""
    if count() == 1:
        return
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for parameter in parameters:
        groups.setdefault((parameter.device, parameter.dtype), []).append(parameter)
    for group in groups.values():
        grads = [torch.zeros_like(each) if each.grad is None else each.grad for each in group]
        known = group[0].new_tensor([each.grad is not None for each in group])
        flat = torch.cat([*(grad.reshape(-1) for grad in grads), known])
        distributed.all_reduce(flat)
        *parts, known = torch.split(flat, [*(each.numel() for each in group), len(group)])
        for parameter, part, processes in zip(group, parts, known.tolist(), strict=True):
            parameter.grad = part.view_as(parameter) / count() if processes else None


def by_first(make: Callable[[], T]) -> T:
    """What the first process makes, in all of them; the others wait. Travels by pickle."""
    if count() == 1:
        return make()
    told: list[Any] = [make() if is_first() else None]
    distributed.broadcast_object_list(told, 0)
    return cast(T, told[0])


@contextmanager
def apart(wanted: bool = True) -> Iterator[None]:
    """Inside the block, in this context, there are no other processes, if so wanted."""
    before = _APART.set(wanted or _APART.get())
    try:
        yield
    finally:
        _APART.reset(before)


def _there() -> bool:
    return not _APART.get() and distributed.is_available() and distributed.is_initialized()


def _device() -> torch.device:
    return torch.device("cuda" if distributed.get_backend() == "nccl" else "cpu")
