"""Thousands of edits in one ledger: whether the last ones are as fast as the first, and whether memory grows.

    python benchmarks/endurance.py                         10,000 edits of the embedded model
    python benchmarks/endurance.py --edits 10000 --method grace --record
    python benchmarks/endurance.py --kills 1000 --flips 1000 --disk-full 50 --two 60 --open 100000 --record

Nothing of the run is changed to watch it: a thread reads the resident memory, and when an edit was done is when the
ledger says that it was committed. Image features are not remembered, so that images that come round again cost what
they did before. The second form tries what ledgers must stand (``ledger_trials.py``), and makes no long run.
"""

from __future__ import annotations

import bisect
import math
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if __name__ == "__main__":
    import _package  # noqa: F401

import itertools

import fastedit
from benchmarks import ledger_trials, record
from benchmarks.memory import _status_mib
from fastedit.backbone import EditableModel
from fastedit.evaluation.normalise import exact_match
from fastedit.ledger import Ledger
from fastedit.methods import resolve
from fastedit.methods.base import is_trained
from fastedit.requests import EditRequest, Query

PARTS = 10


@dataclass
class Watch:
    """Reads the resident memory of this process from a thread, for the length of a block.

    Args:
        interval_s: between two readings.
    """

    interval_s: float = 0.25
    times: list[float] = field(default_factory=list)
    rss_mib: list[float] = field(default_factory=list)

    def __enter__(self) -> Watch:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._read()

    def _watch(self) -> None:
        self._read()
        while not self._ended.wait(self.interval_s):
            self._read()

    def _read(self) -> None:
        self.rss_mib.append(_status_mib("VmRSS"))
        self.times.append(time.time())

    def at(self, moment: float) -> float:
        """Resident memory at a time: of the reading before it, of the first one where there is none."""
        return self.rss_mib[max(0, bisect.bisect_right(self.times, moment) - 1)]


@dataclass(frozen=True)
class Endured:
    """A finished run, in parts of equal numbers of edits.

    Args:
        edits: how many. seconds: of the whole run.
        edits_per_s: of every part. rss_mib: resident memory at the end of every part.
        peak_mib: highest reading. open_s: seconds to open the ledger. files, disk_mib: of the ledger, images included.
        delta_bytes: of the files of deltas, an edit. serve_s: seconds until what acts is ready to answer.
        held: share of sampled edits whose question gets their answer once all are made; reworded: whose rephrase does.
    """

    edits: int
    seconds: float
    edits_per_s: Sequence[float]
    rss_mib: Sequence[float]
    peak_mib: float
    open_s: float
    files: int
    disk_mib: float
    delta_bytes: float
    serve_s: float | None = None
    held: float | None = None
    reworded: float | None = None

    @property
    def rate_drift(self) -> float:
        """Speed of the last part over that of the first."""
        return self.edits_per_s[-1] / self.edits_per_s[0]

    @property
    def rss_drift(self) -> float:
        """Resident memory at the end of the last part over that at the end of the first."""
        return self.rss_mib[-1] / self.rss_mib[0]


def cycled(edits: Sequence[EditRequest], count: int) -> list[EditRequest]:
    """So many edits, from the start again where there are fewer; every one with an id and a question of its own."""
    found = []
    for number in range(count):
        edit, again = edits[number % len(edits)], number // len(edits)
        # A ledger makes no edit whose question is answered so already
        prompt = f"{edit.prompt} Again {again}?" if again else edit.prompt
        found.append(replace(edit, id=f"{edit.id}#{again}", prompt=prompt))
    return found


def endure(
    model: EditableModel,
    edits: Sequence[EditRequest],
    method: str,
    folder: Path,
    *,
    batch_size: int = 64,
    interval_s: float = 0.25,
    sample: int = 0,
    most_s: float = math.inf,
    **overrides: Any,
) -> Endured:
    """Make all edits in one call and say how it went along the way.

    Args:
        model, edits, method, overrides: of ``fastedit.edit``.
        folder: new or empty, for the ledger.
        batch_size: edits fitted together.
        interval_s: between two readings of the memory.
        sample: ask so many of the edits, evenly spaced, once all are made; 0 asks none.
        most_s: stop after so many seconds; what is committed by then counts.
    Raises:
        ValueError: fewer edits than parts.
    """
    if len(edits) < PARTS:
        raise ValueError(f"endurance: at least {PARTS} edits (got edits={len(edits)})")
    with fastedit.open_ledger(folder, model) as ledger:
        with Watch(interval_s) as watch:
            start = time.time()
            with stopping_after(most_s) as stopped:
                ledger.edit(
                    edits, method, batch_size=batch_size, evaluate=False, conflicts="last", show_progress=False,
                    **overrides,
                )  # fmt: skip
            end = time.time()
        # Before the first fit all images are stored
        done = commits(ledger)
        if done[-1][1] != len(edits) and not stopped:
            raise RuntimeError(f"endurance: {done[-1][1]} deltas of {len(edits)} edits")
        edits = edits[: done[-1][1]]
        listed = [path for path in folder.rglob("*") if path.is_file()]
    before = time.perf_counter()
    fastedit.open_ledger(folder, model).close()
    open_s = time.perf_counter() - before
    rates, memory = parts(done, watch, done[-1][1])
    size = sum(path.stat().st_size for path in listed) / 2**20
    deltas = sum(path.stat().st_size for path in listed if path.suffix == ".safetensors") / done[-1][1]
    found = Endured(done[-1][1], end - start, rates, memory, max(watch.rss_mib), open_s, len(listed), size, deltas)
    return replace(found, **holding(model, folder, edits, sample)) if sample else found


@contextmanager
def stopping_after(seconds: float) -> Iterator[list[bool]]:
    """End the block by an interrupt after so many seconds; yields a list that is no longer empty then."""
    stopped: list[bool] = []

    def stop(*_: object) -> None:
        stopped.append(True)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop) if seconds < math.inf else None
    try:
        if before is not None:
            signal.setitimer(signal.ITIMER_REAL, seconds)
        yield stopped
    except KeyboardInterrupt:
        if not stopped:
            raise
    finally:
        if before is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def holding(model: EditableModel, folder: Path, edits: Sequence[EditRequest], sample: int) -> dict[str, float]:
    """``serve_s``, ``held`` and ``reworded`` of ``Endured``: edits of a ledger asked with all that act."""
    chosen = [edits[len(edits) * number // sample] for number in range(min(sample, len(edits)))]
    with fastedit.open_ledger(folder, model) as ledger:
        begin = time.perf_counter()
        with fastedit.applied(model, ledger.active()):
            answered(model, [Query(chosen[0].prompt, chosen[0].image)])
            serve_s = time.perf_counter() - begin
            own = answered(model, [Query(each.prompt, each.image) for each in chosen])
            other = answered(model, [Query(each.rephrase or each.prompt, each.image) for each in chosen])
    pairs = [
        (exact_match(a, each.target), exact_match(b, each.target))
        for a, b, each in zip(own, other, chosen, strict=True)
    ]
    held, reworded = (statistics.fmean(map(float, hits)) for hits in zip(*pairs, strict=True))
    return {"serve_s": serve_s, "held": held, "reworded": reworded}


def answered(model: EditableModel, queries: Sequence[Query], at_once: int = 64) -> list[str]:
    """Greedy answers, so many questions at a time."""
    return [
        answer
        for start in range(0, len(queries), at_once)
        for answer in model.generate(list(queries[start : start + at_once]))
    ]


def commits(ledger: Ledger) -> list[tuple[float, int]]:
    """(when, edits committed by then), from when they were asked for on; at every commit."""
    history = ledger.history()
    events = [next(event for event in history if event.action == "ask")]
    events += [event for event in history if event.action == "edit"]
    return [(datetime.fromisoformat(event.time).timestamp(), number) for number, event in enumerate(events)]


def parts(done: Sequence[tuple[float, int]], watch: Watch, edits: int) -> tuple[list[float], list[float]]:
    """Edits per second within every part, and resident memory at its end.

    Args:
        done: (when, edits done by then), rising, from (start, 0) on. A part that ends inside a batch ends when that
            share of the batch's time was over.
        watch: readings of the memory.
        edits: all of them.
    """
    ends = [_moment(done, edits * number / PARTS) for number in range(PARTS + 1)]
    rates = [edits / PARTS / (after - before) for before, after in itertools.pairwise(ends)]
    return rates, [watch.at(end) for end in ends[1:]]


def _moment(done: Sequence[tuple[float, int]], wanted: float) -> float:
    for (before, had), (after, has) in itertools.pairwise(done):
        if wanted <= has:
            return before + (after - before) * (wanted - had) / (has - had)
    return done[-1][0]


def rows_of(found: Endured, config: dict[str, Any]) -> list[record.Row]:
    """One row for every number; a part is a case of its own."""
    shared = (config, *record.origin(int(config["seed"])))
    case = f"endurance({config['model']},{config['method']},edits={found.edits})"

    def row(name: str, metric: str, value: float) -> record.Row:
        unit = record.METRICS[metric]
        return record.Row(name, "engine", metric, unit, value, value, value, None, None, *shared)

    rows = [
        row(case, "edits_per_s", found.edits / found.seconds),
        row(case, "run_s", found.seconds),
        row(case, "rate_drift", found.rate_drift),
        row(case, "rss_drift", found.rss_drift),
        row(case, "peak_memory_mib", found.peak_mib),
        row(case, "open_s", found.open_s),
        row(case, "files", found.files),
        row(case, "disk_mib", found.disk_mib),
        row(case, "delta_bytes", found.delta_bytes),
    ]
    for metric in ("serve_s", "held", "reworded"):
        value = getattr(found, metric)
        if value is not None:
            rows.append(row(case, metric, value))
    for number, (rate, rss) in enumerate(zip(found.edits_per_s, found.rss_mib, strict=True), start=1):
        rows.append(row(f"{case}/tenth={number}", "edits_per_s", rate))
        rows.append(row(f"{case}/tenth={number}", "rss_mib", rss))
    return record.check(rows)


def show(found: Endured, console: Console) -> None:
    """Print a finished run."""
    table = Table("edits", title=f"{found.edits:,} edits in {found.seconds:,.0f} s", title_justify="left")
    table.add_column("edits/s", justify="right")
    table.add_column("resident MiB", justify="right")
    for number, (rate, rss) in enumerate(zip(found.edits_per_s, found.rss_mib, strict=True), start=1):
        table.add_row(f"to {found.edits * number // PARTS:,}", f"{rate:,.2f}", f"{rss:,.0f}")
    console.print(table)
    console.print(
        f"last tenth over first: speed {found.rate_drift:.3f}, memory {found.rss_drift:.3f}; "
        f"highest {found.peak_mib:,.0f} MiB; {found.files:,} files of {found.disk_mib:,.1f} MiB, opened in "
        f"{found.open_s * 1000:,.0f} ms; {found.delta_bytes:,.0f} bytes of deltas an edit"
    )
    if found.held is not None:
        console.print(
            f"of sampled edits {found.held:.3f} hold, {found.reworded:.3f} reworded; "
            f"ready to answer after {found.serve_s:,.1f} s"
        )


def try_ledgers(
    console: Console, seed: int, *, kills: int, seconds: float, flips: int, full: int, two: float, opened: int
) -> list[record.Row]:
    """Kill, flip bits, fill disks, read beside a writer, open many edits; prints what was found and returns rows."""
    config = {"model": "random:llava-tiny", "seed": seed, "edits": opened}
    shared = (config, *record.origin(seed))
    rows: list[record.Row] = []

    def row(name: str, metric: str, value: float) -> None:
        unit = record.METRICS[metric]
        rows.append(record.Row(name, "ledger", metric, unit, value, value, value, None, None, *shared))

    if kills:
        found = ledger_trials.kills(kills, seed, seconds)
        table = Table("work", "signal", "inside of", title="processes that were killed", title_justify="left")
        for heading in ("kills", "lost", "half", "unequal"):
            table.add_column(heading, justify="right")
        for each in found["rows"]:
            table.add_row(*map(str, each.values()))
            for metric in ("kills", "lost", "half", "unequal"):
                row(f"ledger/kills({each['work']},{each['signal']},{each['where']})", metric, each[metric])
        console.print(table, *found["problems"], sep="\n")
    trials = {
        f"ledger/flips({flips})": (flips, lambda: ledger_trials.bit_flips(flips, seed)),
        f"ledger/disk_full({full})": (full, lambda: ledger_trials.disk_full(full, seed)),
        f"ledger/two_processes({two:g}s)": (two, lambda: ledger_trials.two_processes(two)),
        f"ledger/open({opened})": (opened, lambda: ledger_trials.opening(opened)),
    }
    for name, (wanted, run) in trials.items():
        if wanted:
            trial = run()
            row(name, "tries", trial.tries)
            row(name, "problems", len(trial.problems))
            for metric, value in trial.numbers.items():
                row(name, metric, value)
            console.print(f"{name}: {trial.tries} tries, {len(trial.problems)} problems, {trial.numbers}")
            console.print(*trial.problems, sep="\n")
    return record.check(rows)


def file_system(folder: Path) -> str:
    """Kind of the file system that a folder is, or will be, on: "ext2/ext3", "tmpfs", which writes no disk ..."""
    there = next(each for each in (folder, *folder.resolve().parents) if each.exists())
    run = subprocess.run(["stat", "-f", "-c", "%T", str(there)], capture_output=True, text=True, check=True)
    return run.stdout.strip()


def main(
    edits: Annotated[int, typer.Option(help="how many; the train split comes round again", min=PARTS)] = 10_000,
    method: Annotated[str, typer.Option(help="ft, lora, odedit+lora ...")] = "lora",
    model: Annotated[str, typer.Option(help="pocket-llava, random:llava-tiny ...")] = "pocket-llava",
    layers: Annotated[int, typer.Option(help="the last so many layers are edited", min=1)] = 2,
    steps: Annotated[int, typer.Option(help="most optimiser steps", min=1)] = 20,
    batch_size: Annotated[int, typer.Option(help="edits fitted together", min=1)] = 64,
    interval: Annotated[float, typer.Option(help="seconds between two readings of the memory")] = 0.25,
    threads: Annotated[int | None, typer.Option(help="CPU threads; all cores if absent", min=1)] = None,
    sample: Annotated[int, typer.Option(help="ask so many edits at the end", min=0)] = 0,
    most: Annotated[float, typer.Option(help="stop after so many seconds, with what is made")] = math.inf,
    folder: Annotated[Path | None, typer.Option(help="keep the ledger here, a new folder; else it goes")] = None,
    train_steps: Annotated[int, typer.Option(help="of methods with trained parts", min=1)] = 20,
    kills: Annotated[int, typer.Option(help="kill so many processes that edit or train", min=0)] = 0,
    seconds: Annotated[float, typer.Option(help="longest time for the kills")] = float("inf"),
    flips: Annotated[int, typer.Option(help="turn so many bits, one at a time", min=0)] = 0,
    disk_full: Annotated[int, typer.Option(help="fill so many small disks (needs mount)", min=0)] = 0,
    two: Annotated[float, typer.Option(help="seconds of reading beside a writer", min=0)] = 0.0,
    opened: Annotated[int, typer.Option("--open", help="open a ledger of so many edits", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="of views")] = 0,
    json_path: Annotated[Path | None, typer.Option("--json", help="write the rows as a JSON list")] = None,
    out: Annotated[Path | None, typer.Option(help="folder for the figure")] = None,
    store: Annotated[bool, typer.Option("--record", help="append the rows to benchmarks/results/")] = False,
) -> None:
    """Edit for a long time, and say whether it gets slower or larger."""
    console = Console()
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    if kills or flips or disk_full or two or opened:
        tried = try_ledgers(
            console, seed, kills=kills, seconds=seconds, flips=flips, full=disk_full, two=two, opened=opened
        )
        if json_path is not None:
            console.print(f"rows: {record.write_json(tried, json_path)}")
        if store:
            console.print(f"rows appended to {record.append(tried)}")
        return
    config = {
        "model": model,
        "data": "pocket-vqa",
        "method": method,
        "layers": layers,
        "steps": steps,
        "edits": edits,
        "batch_size": batch_size,
        "interval_s": interval,
        "storage": file_system(folder or Path(tempfile.gettempdir())),
        "seed": seed,
    }
    wanted = cycled(fastedit.read_edits("pocket-vqa", split="train", limit=edits), edits)
    loaded = fastedit.load(model, image_cache_mib=0)
    plan = resolve(method, {})
    known = {each.name for each in fields(plan.config)}
    settings: dict[str, Any] = {"seed": seed}
    settings |= {name: value for name, value in (("layers", layers), ("steps", steps)) if name in known}
    if is_trained(plan.method):
        records = fastedit.read_edits("pocket-vqa", split="eval", limit=400)
        artifact = fastedit.train(loaded, method, records, trainer={"steps": train_steps}, show_progress=False)
        settings |= {"pool": records, "artifact": artifact}
    # Every library is imported and every buffer of a batch made before the first part.
    fastedit.edit(loaded, wanted[: max(2, batch_size)], method, batch_size=batch_size, evaluate=False, **settings)
    with tempfile.TemporaryDirectory() as temporary:
        place = folder or Path(temporary) / "edits"
        found = endure(
            loaded, wanted, method, place, batch_size=batch_size, interval_s=interval, sample=sample, most_s=most,
            **settings,
        )  # fmt: skip
    show(found, console)
    rows = rows_of(found, config)
    if json_path is not None:
        console.print(f"rows: {record.write_json(rows, json_path)}")
    if out is not None:
        from benchmarks.plot import figures_of, write_figures

        console.print(f"figures: {', '.join(map(str, write_figures(figures_of(rows), out)))}")
    if store:
        console.print(f"rows appended to {record.append(rows)}")


if __name__ == "__main__":
    typer.run(main)
