"""Workers as actors of a Ray cluster, each where it finds its resources."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import torch

from fastedit.engine.parallel.worker import Worker


class RayActors:
    """Starts workers, for task after task. Joins the cluster that Ray finds, or starts one here.

    Args:
        resources: of each worker. device: of the run's model.
    """

    def __init__(self, resources: Mapping[str, float], device: torch.device) -> None:
        self._resources = {"CPU": 1, **resources}
        self._device = "cuda" if self._resources.get("GPU") else "cpu"
        if device.type == "cuda" and self._device == "cpu":
            raise ValueError(
                f"edit: resources say what a worker's model runs on, {{'GPU': 1}} (got resources={dict(resources)} "
                f"for a model on {device})"
            )
        import ray

        if not ray.is_initialized():
            ray.init(log_to_driver=False)
        self._require(ray.nodes())
        # An actor that dies is started again by the run, which knows what it was doing
        options: dict[str, Any] = {"max_restarts": 0, "max_task_retries": 0, "num_cpus": self._resources["CPU"]}
        options["num_gpus"] = self._resources.get("GPU", 0)
        options["resources"] = {name: n for name, n in self._resources.items() if name not in ("CPU", "GPU")}
        self._actor = ray.remote(**options)(_Actor)
        #: The present task in the object store.
        self.shared: Any = None

    def give(self, task: bytes) -> None:
        """What workers take up when they start, pickled; it travels once to each node."""
        import ray

        self.shared = ray.put(task)

    def close(self) -> None:
        """Let go of what was given."""
        self.shared = None

    def _require(self, nodes: list[dict[str, Any]]) -> None:
        """Refuse resources that no node has: Ray would wait for them forever."""
        there = [node["Resources"] for node in nodes if node["Alive"]]
        if not any(all(node.get(name, 0) >= n for name, n in self._resources.items()) for node in there):
            raise ValueError(
                f"edit: resources are what a node of the cluster has for each worker (got {self._resources}, and nodes "
                f"with {[{name: node.get(name, 0) for name in self._resources} for node in there]})"
            )

    def new_worker(self, _place: int) -> RayWorker:
        """A worker, wherever there is room for it."""
        threads = max(1, int(self._resources["CPU"]))
        return RayWorker(self, self._actor.remote(), self._device, threads)

    @staticmethod
    def is_lost(error: BaseException) -> bool:
        """Whether an error says that a worker's process, its node or its result is gone."""
        from ray.exceptions import RayError, RayTaskError

        return isinstance(error, RayError) and not isinstance(error, RayTaskError)


class RayWorker:
    """An actor (``dispatch.Handle``)."""

    def __init__(self, pool: RayActors, actor: Any, *begin: Any) -> None:
        self._pool, self._actor, self._begin = pool, actor, begin

    def start(self) -> Future[int]:
        """See ``Handle``."""
        return self._actor.begin.remote(self._pool.shared, *self._begin).future()  # type: ignore[no-any-return]

    def make(self, shard: bytes) -> Future[bytes]:
        """See ``Handle``."""
        return self._actor.make.remote(shard).future()  # type: ignore[no-any-return]

    def close(self) -> None:
        """See ``Handle``."""
        import ray

        ray.kill(self._actor)


class _Actor:
    """A worker's process on a node of the cluster."""

    def __init__(self) -> None:
        self._worker: Worker | None = None

    def begin(self, task: bytes, device: str, threads: int) -> int:
        if self._worker is None:
            self._worker = Worker(task, device, threads)
        else:
            self._worker.take_up(task)
        return os.getpid()

    def make(self, shard: bytes) -> bytes:
        assert self._worker is not None
        return self._worker.make(shard)
