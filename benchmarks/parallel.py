"""Edits in several processes: whether any is lost where workers are killed, and how much faster two are than one.

    python benchmarks/parallel.py kills --engine ray --nodes 3 --edits 400 --kills 20 --record
    python benchmarks/parallel.py efficiency --edits 400 --record
    python benchmarks/parallel.py report

Workers are watched by ``fastedit.engine.parallel.dispatch.watched_by``; nothing of a run is changed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

if __name__ == "__main__":
    import _package  # noqa: F401

import torch

import fastedit
from benchmarks import record
from fastedit import EditRequest
from fastedit.backbone import EditableModel
from fastedit.engine import Run, provenance
from fastedit.engine.parallel.dispatch import Dispatch, Taken, watched_by
from fastedit.engine.parallel.shards import image_keys

RESULTS = record.RESULTS / "parallel.jsonl"
#: Nodes of a simulated cluster have room for one worker; one that is gone is missed soon.
NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 100 << 20}
HEALTH = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 5}


class Watch:
    """What came back, and the processes that are at work; ``fastedit``'s watcher of a run's workers."""

    def __init__(self) -> None:
        self.at_work: Dispatch | None = None
        self.taken: list[Taken] = []

    def began(self, dispatch: Dispatch) -> None:
        self.at_work = dispatch

    def took(self, taken: Taken) -> None:
        self.taken.append(taken)


class Killer(threading.Thread):
    """Kills workers of a run at random moments, so many times.

    Args:
        watch: of the run. kills: how often. most_s: longest wait between two, seconds. seed: of moments and workers.
    """

    def __init__(self, watch: Watch, kills: int, most_s: float, seed: int) -> None:
        super().__init__(daemon=True)
        self.watch, self.kills, self.most_s, self.rng, self.done = watch, kills, most_s, random.Random(seed), 0
        self.is_over = threading.Event()

    def run(self) -> None:
        while self.done < self.kills and not self.is_over.wait(self.rng.uniform(0.1, self.most_s)):
            at_work = self.watch.at_work
            processes = list(at_work.processes.values()) if at_work is not None else []
            if processes:
                with suppress(ProcessLookupError):
                    os.kill(self.rng.choice(processes), signal.SIGKILL)
                    self.done += 1


class Nodes(Watch):
    """Also takes a node off a simulated cluster after a third of the shards, and adds one after half of them."""

    def __init__(self, cluster: Any, shards: int) -> None:
        super().__init__()
        self.cluster, self.shards, self.changes = cluster, shards, [self._remove, self._add]

    def took(self, taken: Taken) -> None:
        super().took(taken)
        if self.changes and len(self.taken) >= self.shards // (4 - len(self.changes) if len(self.changes) == 1 else 3):
            self.changes.pop(0)()

    def _remove(self) -> None:
        self.cluster.remove_node(self.cluster.nodes[0], allow_graceful=False)

    def _add(self) -> None:
        self.cluster.add_node(**NODE)


@contextmanager
def cluster_of(nodes: int) -> Iterator[Any]:
    """A Ray cluster of so many nodes on this machine, and a head where nothing is made."""
    import ray
    from ray.cluster_utils import Cluster

    head = {**NODE, "num_cpus": 0, "include_dashboard": False, "_system_config": HEALTH}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.nodes = [cluster.add_node(**NODE) for _ in range(nodes)]
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def kills(
    model: EditableModel,
    edits: Sequence[EditRequest],
    given: Mapping[str, Any],
    *,
    engine: str,
    workers: int,
    count: int,
    every_s: float,
    nodes: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Edit while workers are killed; what is committed then, beside what one process makes.

    Args:
        model: in float64, so that results can be compared. given: arguments of ``fastedit.edit``.
        count: kills. every_s: longest wait between two. nodes: of a simulated cluster, of which one goes and another
            one comes; 0 without.
    """
    here = fastedit.edit(model, edits, **given)
    shards = len(edits) // given["batch_size"]
    with cluster_of(nodes) if nodes else nullcontext() as cluster:
        watch = Nodes(cluster, shards) if nodes else Watch()
        killer = Killer(watch, count, every_s, seed)
        killer.start()
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder, fastedit.open_ledger(folder, model) as ledger:
            with watched_by(watch), warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always", RuntimeWarning)
                run = fastedit.edit(
                    model, edits, engine=engine, workers=workers, mode="single", ledger=ledger, **given
                )  # fmt: skip
            killer.is_over.set()
            seconds = time.perf_counter() - start
            # Before the ledger is closed, in whose files deltas lie
            compared = differences(run, here)
            committed = Counter(
                name for event in ledger.history() if event.action == "edit" for name in event.detail["edits"]
            )
            sound = ledger.verify().sound
    return {
        "engine": engine, "edits": len(edits), "workers": workers, "nodes": nodes, "kills": killer.done,
        "node_changes": 2 - len(watch.changes) if isinstance(watch, Nodes) else 0,
        "workers_lost": run.provenance["workers"]["lost"], "committed": len(committed),
        "committed_twice": sum(times > 1 for times in committed.values()),
        "set_aside": len(run.provenance.get("set_aside", [])), **compared, "ledger_sound": sound, "seconds": seconds,
        "warnings": sorted({str(each.message)[:120] for each in told}),
    }  # fmt: skip


def differences(run: Run, wanted: Run) -> dict[str, Any]:
    """How many edits of one run another one lacks, and how far those that both have are from each other."""
    made = {delta.request_id: number for number, delta in enumerate(run.deltas)}
    apart, answers = [], 0
    for number, delta in enumerate(wanted.deltas):
        place = made.get(delta.request_id)
        if place is None:
            continue
        tensors = run.deltas[place].tensors
        apart.append(max(float((tensors[part] - known).abs().max()) for part, known in delta.tensors.items()))
        if wanted.edit_scores:
            answers += run.edit_scores[place].answers != wanted.edit_scores[number].answers
    return {
        "lost": len(wanted.deltas) - len(apart), "largest_difference": max(apart, default=0.0),
        "unequal": sum(each > 1e-8 for each in apart), "answers_differ": answers,
    }  # fmt: skip


def efficiency(
    model: EditableModel,
    edits: Sequence[EditRequest],
    given: Mapping[str, Any],
    *,
    engine: str = "processes",
    counts: Sequence[int] = (1, 2),
    ledger: bool = False,
) -> dict[str, Any]:
    """Seconds of several workers beside one, as many threads each; starting and loading apart.

    A run begins where the first shard does, and ends where the last one is kept. ``shard_s`` are a worker's own
    seconds, ``commit_s`` the writer's, to a ledger or to memory, ``images_twice`` the share of images that more than
    one worker saw.
    """
    rows = []
    for workers in counts:
        watch = Watch()
        with (
            watched_by(watch),
            tempfile.TemporaryDirectory() as folder,
            fastedit.open_ledger(folder, model) if ledger else nullcontext() as kept,
        ):
            run = fastedit.edit(model, edits, engine=engine, workers=workers, mode="single", ledger=kept, **given)
        shard_s = [sum(taken.result.seconds.values()) for taken in watch.taken]
        begun = min(taken.at - own for taken, own in zip(watch.taken, shard_s, strict=True))
        seconds = max(taken.at + taken.commit_s for taken in watch.taken) - begun
        rows.append(
            {
                "workers": workers, "seconds": seconds, "edits_per_s": len(edits) / seconds, "shards": len(watch.taken),
                "shard_s": shard_s, "shard_edits": [len(taken.result.made) for taken in watch.taken],
                "commit_s": [taken.commit_s for taken in watch.taken], "bytes": [taken.size for taken in watch.taken],
                "images_twice": seen_twice(edits, watch.taken),
                "seconds_by_phase": run.provenance["workers"]["seconds"],
            }
        )  # fmt: skip
    return {
        "engine": engine, "edits": len(edits), "ledger": ledger, "threads": torch.get_num_threads(), "rows": rows,
        "speedup": rows[0]["seconds"] / rows[-1]["seconds"],
    }  # fmt: skip


def seen_twice(edits: Sequence[EditRequest], taken: Sequence[Taken]) -> float:
    """Share of the images that more than one worker saw, whose features were computed more than once."""
    workers: dict[str, set[int]] = {}
    for each in taken:
        for number in each.result.made:
            for key in image_keys(edits[number]):
                workers.setdefault(key, set()).add(each.place)
    return sum(len(places) > 1 for places in workers.values()) / max(1, len(workers))


def show(outcome: Mapping[str, Any]) -> None:
    """Print an outcome, lists as their medians."""
    for name, value in outcome.items():
        if name != "rows":
            print(f"{name}: {value}")
    for row in outcome.get("rows", ()):
        print(
            {k: f"median {statistics.median(v):.4g} of {len(v)}" if isinstance(v, list) else v for k, v in row.items()}
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kills", "efficiency", "report"))
    parser.add_argument("--engine", default="processes", choices=("processes", "ray"))
    parser.add_argument("--model", default="pocket-llava")
    parser.add_argument("--method", default="odedit+lora")
    parser.add_argument("--edits", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, help="of a fit; the method's own if absent")
    parser.add_argument("--workers", type=int, default=2, help="of kills")
    parser.add_argument("--counts", default="1,2", help="of workers, for efficiency")
    parser.add_argument("--beside", type=int, default=0, help="how many other runs go on, for the row")
    parser.add_argument("--ledger", action="store_true", help="let efficiency commit to a ledger")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--every-s", type=float, default=20.0, help="longest wait between two kills")
    parser.add_argument("--nodes", type=int, default=0, help="of a simulated Ray cluster: one goes, another one comes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results/")
    options = parser.parse_args()
    if options.what == "report":
        for line in RESULTS.read_text(encoding="utf-8").splitlines():
            show(json.loads(line))
        return
    model = fastedit.load(options.model, dtype="float64" if options.what == "kills" else "float32")
    edits = fastedit.read_edits("pocket-vqa", limit=options.edits)
    pool = fastedit.read_edits("pocket-vqa", split="train", limit=200)
    given = {"method": options.method, "batch_size": options.batch_size, "pool": pool, "show_progress": False}
    if options.steps is not None:
        given["steps"] = options.steps
    described = {key: value for key, value in given.items() if key not in ("pool", "show_progress")}
    outcome = {"kind": options.what, "model": options.model, **described, "machine": record.machine()}
    outcome |= {"versions": provenance.versions(), "time": provenance.utc_now()}
    outcome |= {"commit": record.commit_with_changes(provenance.commit())}
    if options.what == "kills":
        outcome |= kills(
            model, edits, given, engine=options.engine, workers=options.workers, count=options.kills,
            every_s=options.every_s, nodes=options.nodes, seed=options.seed,
        )  # fmt: skip
    else:
        counts = [int(count) for count in options.counts.split(",")]
        outcome |= {"beside": options.beside}
        outcome |= efficiency(model, edits, given, engine=options.engine, counts=counts, ledger=options.ledger)
    show(outcome)
    if options.record:
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(outcome) + "\n")


if __name__ == "__main__":
    main()
