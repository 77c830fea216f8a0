"""How far edits scale: a simulation fed with what was measured, and a model on paper; writes a part of docs/scaling.md.

    python benchmarks/scaling.py            prints the tables
    python benchmarks/scaling.py --write    puts them into docs/scaling.md

Measured are the seconds of shards and of commits and the bytes of results (``parallel.py``, stored rows). The
simulation (simpy) draws shards from those of one worker and must come to the measured seconds of two.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    import _package  # noqa: F401

import simpy

from benchmarks import parallel, record, routing
from fastedit.routers.reduced import KEPT, LEAST_ROWS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"
ENDURANCE = record.RESULTS / "endurance.jsonl"
#: What an edit is to act on, by name in the rows of routing.
INSIDE = ("own_right", "reworded_right", "unseen_right", "picture_right")
BEGIN, END = "<!-- made by benchmarks/scaling.py -->", "<!-- end of what benchmarks/scaling.py made -->"
WORKERS = (1, 2, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Parts:
    """What a run is made of.

    Args:
        shard_s: seconds of shards on one worker, a distribution. commit_s: of the writer, for a shard.
        start_s: until a worker that was lost is there again.
    """

    shard_s: Sequence[float]
    commit_s: Sequence[float]
    start_s: float = 0.0


@dataclass(frozen=True)
class Gpu:
    """What a GPU reaches. Of an H100, by its data sheet; ``share`` of the peak is our assumption."""

    flop_per_s: float = 989e12
    bytes_per_s: float = 3.35e12
    share: float = 0.4


@dataclass(frozen=True)
class Shape:
    """A model and how it is edited: counts of an edit of pocket-vqa, and image tokens of LLaVA.

    Args:
        name: of the model. parameters: of its decoder. layer: of one layer with its head. n_layers: how many layers.
        gpus: that one copy lies on (bf16). delta_bytes: of an edit.
        tokens: of a question with its image. fitted, asked: rows that are fitted on, and asked before and after.
        steps: of a fit. answer: tokens of an answer. together: edits of a shard.
    """

    name: str
    parameters: float
    layer: float
    n_layers: int
    gpus: int
    delta_bytes: float
    tokens: int = 620
    fitted: int = 8
    asked: int = 20
    steps: int = 30
    answer: int = 4
    together: int = 16

    def gpu_seconds(self, gpu: Gpu) -> dict[str, float]:
        """GPU-seconds of an edit by phase: the larger of operations and bytes, at the share of the peak.

        Prefix and evaluation walk every row once, two operations a parameter and token; of what is asked, images are
        walked before and after. A step of a fit is three passes of the last layer and the head over label tokens of the
        whole shard, at least their weights read three times. A token of an answer reads all weights, for all of it.
        """
        flop, moved = gpu.flop_per_s * gpu.share, gpu.bytes_per_s * gpu.share
        labels = self.fitted * self.answer
        step = max(6 * self.layer * labels / flop, 3 * 2 * self.layer / (moved * self.together))
        return {
            "prefix": 2 * self.parameters * self.fitted * self.tokens / flop,
            "fit": self.steps * step,
            "read": 2 * 2 * self.parameters * self.asked * self.tokens / flop,
            "answers": 2 * self.answer * 2 * self.parameters / (moved * self.together),
        }


SHAPES = (
    Shape("7B (LLaMA-like, 32 layers of 4,096)", 6.7e9, 3.3e8, 32, 1, 3 * 8 * (4096 + 11008) * 4),
    Shape("13B (40 layers of 5,120)", 13e9, 4.8e8, 40, 1, 3 * 8 * (5120 + 13824) * 4),
    Shape("34B (60 layers of 7,168)", 34e9, 1.0e9, 60, 2, 3 * 8 * (7168 + 20480) * 4),
    Shape("70B (80 layers of 8,192)", 69e9, 1.1e9, 80, 4, 3 * 8 * (8192 + 28672) * 4),
)


def simulated(
    parts: Parts, shards: int, workers: int, *, mtbf_s: float | None = None, segments: bool = False, seed: int = 0
) -> float:
    """Seconds until so many shards are made and kept, as ``fastedit.engine.parallel.dispatch`` hands them out.

    A worker has its next shard once the writer, who keeps one at a time, has kept the one before. A worker that dies
    (times between are exponential) loses its shard, which waits again.

    Args:
        parts: measured. shards: to make. workers: at a time. mtbf_s: of one worker; None never dies.
        segments: each worker writes its own segments, and the writer a line for each shard (a tenth of its seconds).
        seed: of the draws.
    """
    rng, world = random.Random(seed), simpy.Environment()
    writer, left, kept = simpy.Resource(world), [shards], [0]
    ended = world.event()

    def worker() -> Iterator[Any]:
        while left[0]:
            left[0] -= 1
            seconds = rng.choice(parts.shard_s)
            dies = rng.expovariate(1 / mtbf_s) if mtbf_s is not None else float("inf")
            if dies < seconds:
                yield world.timeout(dies + parts.start_s)
                left[0] += 1
                continue
            commit = rng.choice(parts.commit_s)
            if segments:
                yield world.timeout(0.9 * commit)
            yield world.timeout(seconds)
            with writer.request() as turn:
                yield turn
                yield world.timeout(0.1 * commit if segments else commit)
            kept[0] += 1
            if kept[0] == shards:
                ended.succeed()

    def place() -> Iterator[Any]:
        # Who finds nothing left looks again: a shard may come back from a worker that died
        while kept[0] < shards:
            yield world.process(worker())
            if kept[0] < shards:
                yield world.timeout(statistics.mean(parts.shard_s) / 10)

    for _ in range(workers):
        world.process(place())
    world.run(ended)
    return float(world.now)


def on_paper(parts: Parts, workers: int) -> float:
    """Shards per second: of the workers, at most what the writer keeps."""
    shard, commit = statistics.mean(parts.shard_s), statistics.mean(parts.commit_s)
    return min(workers / (shard + commit), 1 / commit)


def redone(shard_s: float, mtbf_s: float, start_s: float) -> float:
    """Share of time lost to deaths: of a shard that ends with chance exp(-s / m), and of starting anew."""
    return shard_s / (2 * mtbf_s) + start_s / mtbf_s


def checked(outcome: Mapping[str, Any], repeats: int = 20) -> dict[str, float]:
    """The measured seconds of the most workers beside those that the simulation comes to.

    ``alone_s`` draws from the shards of one worker, which had the machine's memory and caches to itself; ``beside_s``
    from those of several, and shows whether what is handed out, waits and is kept is modelled as it is.
    """
    one, several = outcome["rows"][0], outcome["rows"][-1]

    def seconds(row: Mapping[str, Any]) -> float:
        parts = Parts(row["shard_s"], row["commit_s"])
        return statistics.mean(
            simulated(parts, several["shards"], several["workers"], seed=seed) for seed in range(repeats)
        )

    # Shards of one worker are of more edits, where there are fewer of them
    alone, beside = seconds(one) * one["shards"] / several["shards"], seconds(several)
    measured = several["seconds"]
    return {
        "workers": several["workers"], "measured_s": measured, "alone_s": alone, "beside_s": beside,
        "alone_off": alone / measured - 1, "beside_off": beside / measured - 1, "speedup": outcome["speedup"],
    }  # fmt: skip


def table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """A table of Markdown."""
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    return [*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows), ""]


def page(outcomes: Sequence[Mapping[str, Any]]) -> str:
    """The measured, simulated and computed part of the page."""
    pair = [each for each in outcomes if each["kind"] == "efficiency" and len(each["rows"]) > 1][-1]
    kept = [each for each in outcomes if each["kind"] == "efficiency" and each.get("ledger")]
    killed = [each for each in outcomes if each["kind"] == "kills"]
    lines = [BEGIN, "", "## Measured", ""]
    lines += _of_kills(killed) + _of_pair(pair)
    parts = parts_of(pair, kept[-1] if kept else pair)
    paper = _of_paper(kept[-1] if kept else pair)
    return "\n".join([*lines, *_of_simulation(pair, parts), *paper, *_of_routing(), *_of_endurance(), END])


def parts_of(pair: Mapping[str, Any], kept: Mapping[str, Any]) -> Parts:
    """Shards of one worker, and commits to a ledger where those were measured."""
    return Parts(pair["rows"][0]["shard_s"], kept["rows"][-1]["commit_s"], start_s=10.0)


def _of_kills(killed: Sequence[Mapping[str, Any]]) -> list[str]:
    if not killed:
        return []
    names = (
        "engine",
        "edits",
        "nodes",
        "kills",
        "workers_lost",
        "lost",
        "committed_twice",
        "unequal",
        "answers_differ",
    )
    lines = ["Workers killed at random while edits are made, beside one process (float64, 1e-8):", ""]
    return lines + table(
        [name.replace("_", " ") for name in names], [[each[name] for name in names] for each in killed]
    )


def _of_pair(pair: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{pair['edits']} edits of `{pair['model']}` by `{pair['method']}`, scored, on {pair['machine']['cpu']}, one "
        f"thread a worker, `engine={pair['engine']!r}`, starting and loading apart:", "",
    ]  # fmt: skip
    rows = [
        (row["workers"], f"{row['seconds']:.1f}", f"{row['edits_per_s']:.2f}", row["shards"],
         f"{statistics.median(row['shard_s']):.2f}", f"{1000 * statistics.median(row['commit_s']):.1f}",
         f"{statistics.median(row['bytes']) / 1024:.0f}", f"{100 * row['images_twice']:.1f} %")
        for row in pair["rows"]
    ]  # fmt: skip
    names = ("workers", "seconds", "edits/s", "shards", "s a shard", "commit ms", "KiB a result", "images seen twice")
    return [
        *lines,
        *table(names, rows),
        f"Two workers are {pair['speedup']:.2f} times as fast as one (target 1.85).",
        "",
    ]


def _of_simulation(pair: Mapping[str, Any], parts: Parts) -> list[str]:
    told = checked(pair)
    measured = f"{told['measured_s']:.1f}"
    shard, commit = statistics.mean(parts.shard_s), statistics.mean(parts.commit_s)
    lines = [
        "## Simulated", "",
        "A discrete simulation (`benchmarks/scaling.py`, simpy) hands out shards as the engine does, and draws their "
        "seconds and those of commits from what was measured.", "",
        *table(
            ("seconds drawn from", "simulated s", "measured s", "off"),
            [
                ("shards of one worker alone", f"{told['alone_s']:.1f}", measured, f"{100 * told['alone_off']:+.1f} %"),
                ("shards of two at a time", f"{told['beside_s']:.1f}", measured, f"{100 * told['beside_off']:+.1f} %"),
            ],
        ),
        "The difference of both is what two processes take from each other on one machine: memory, caches and what "
        "else ran.", "",
        f"4,096 shards like these ({shard:.2f} s, {1000 * commit:.1f} ms to commit to a ledger), speed-up over one "
        "worker; on paper it grows until (shard + commit) / commit workers. With deaths every worker dies once an "
        f"hour, and another one is there after {parts.start_s:.0f} s. With segments a worker writes its deltas to a "
        "file of its own, and the writer a line in one manifest, assumed to be a tenth of a commit: a design that is "
        "not built.", "",
    ]  # fmt: skip
    rows, alone = [], simulated(parts, 4096, 1)
    for workers in WORKERS:
        plain, dying, apart = (
            alone / simulated(parts, 4096, workers, mtbf_s=mtbf, segments=own)
            for mtbf, own in ((None, False), (3600.0, False), (None, True))
        )
        paper = on_paper(parts, workers) / on_paper(parts, 1)
        rows.append((workers, f"{paper:.1f}", f"{plain:.1f}", f"{dying:.1f}", f"{apart:.1f}"))
    lines += table(("workers", "on paper", "simulated", "with deaths", "with segments"), rows)
    return [*lines, f"One writer is enough for {shard / commit + 1:.0f} such workers.", ""]


def _of_paper(kept: Mapping[str, Any]) -> list[str]:
    """A million edits of large models."""
    gpu, row = Gpu(), kept["rows"][-1]
    per_edit = sum(row["commit_s"]) / sum(row["shard_edits"])
    lines = [
        "## A million edits on 512 GPUs, on paper", "",
        f"GPU-seconds of an edit are the larger of operations and bytes over {100 * gpu.share:.0f} % of an H100's peak "
        "(an assumption; nothing here was measured on a GPU). An edit has 8 rows to fit on and 20 to ask, of 620 "
        "tokens, 30 steps, 16 edits a shard; deltas are `lora` of rank 8 on the feed-forward maps of one layer, in "
        "float32.", "",
    ]  # fmt: skip
    rows = []
    for shape in SHAPES:
        phases = shape.gpu_seconds(gpu)
        seconds = sum(phases.values())
        workers = 512 // shape.gpus
        shard = shape.together * seconds / shape.gpus
        rows.append(
            (
                shape.name, shape.gpus, " + ".join(f"{value:.2f}" for value in phases.values()), f"{seconds:.2f}",
                f"{1e6 * seconds / 512 / 3600:.2f} h", f"{workers * shape.together / shard:.0f}",
                f"{1e6 * shape.delta_bytes / 1e12:.2f} TB", f"{shard:.0f} s",
                f"{100 * redone(shard, 24 * 3600.0, 300.0):.2f} %",
            )
        )  # fmt: skip
    lines += table(
        ("model", "GPUs a worker", "prefix + fit + read + answers", "GPU-s an edit", "time", "edits/s", "deltas",
         "a shard", "lost to deaths"), rows,
    )  # fmt: skip
    return [
        *lines,
        "Lost to deaths: a worker that dies once a day loses half a shard, and 5 minutes of loading. Shards are short "
        "beside that, so nothing within a shard is kept.", "",
        f"The writer took {1000 * per_edit:.2f} ms an edit here, with deltas of pocket size: at most "
        f"{1 / per_edit:,.0f} edits/s. Where the edits/s of the table come near, it is the bottleneck, the sooner the "
        "larger deltas are; then each worker has to write segments of its own, and the writer the manifest alone.", "",
    ]  # fmt: skip


def _of_routing() -> list[str]:
    """What it costs to find the edit that acts."""
    if not routing.RESULTS.exists():
        return []
    outcomes = [json.loads(line) for line in routing.RESULTS.read_text(encoding="utf-8").splitlines()]
    costs = [each for each in outcomes if each["kind"] == "costs" and "exact_s" in each["rows"][0]]
    firing = [each for each in outcomes if each["kind"] == "firing" and "agreement" in each]
    return [*_of_costs(costs), *_of_firing(firing)]


def _of_costs(outcomes: Sequence[dict[str, Any]]) -> list[str]:
    """Routing beside an answer, by how the stored edits are searched."""
    if not outcomes:
        return []
    last = outcomes[-1]
    alike = [each for each in outcomes if each["drawn"] == last["drawn"]]
    latest = {(row["stored"], row["at_once"]): row for each in alike for row in each["rows"]}
    ways = ("read_s", "whole_s", "exact_s", "index_s")
    rows, indexes = [], {}
    for (stored, at_once), row in sorted(latest.items()):
        cells = [f"{1000 * row[way]:.2f}" if way in row else "" for way in ways]
        shares = [f"{100 * row[way] / row['answer_s']:.0f} %" if way in row else "" for way in ways[2:]]
        rows.append((f"{stored:,}", at_once, f"{1000 * row['answer_s']:.2f}", *cells, *shares))
        if "recall" in row:
            shares = [f"{100 * row[name]:.1f} %" for name in ("recall", "fires", "wrong")]
            indexes[stored] = (f"{stored:,}", f"{row['build_s']:.1f}", *shares)
    names = ("stored edits", "at once", "answer", "reading", "whole", "reduced", "index", "reduced / answer")
    per_edit, reduced_bytes = 4 * (2 * 256 + 4096), 2 * KEPT
    weights = 2 * 6.74e9
    return [
        "## Finding the edit that acts", "",
        f"`{last['method']}` on `{last['model']}`, processor milliseconds of a question on {last['threads']} thread of "
        f"{last['machine']['cpu']}; the first {last['drawn']:,} stored edits are records, more are these with noise. "
        "`reading` is what the classifier reads of a prompt, whatever is stored; the ways behind it count it in: every "
        "stored vector whole, a first pass over reduced vectors that misses no claim (what the engine does from "
        f"{LEAST_ROWS:,} stored edits on), and an index of hnswlib (`model.index_from = ...`, off unless set).", "",
        *table((*names, "index / answer"), rows),
        "The target, 5 % of an answer at 100,000 stored edits, is missed: reading a prompt alone takes more of an "
        "answer of a model this small, and 13 MB of reduced vectors come from memory each time. Up to 100,000 they are "
        "about as fast as the index, and never miss; it is for more, and therefore off unless asked for.", "",
        *_of_more(outcomes, last, max(stored for stored, _ in latest)),
        "What the index names is scored exactly, and edits taken back are not among it. What it misses, of "
        f"{routing.RECALLED} questions: `recall` is the share with the same edit where exact search lets one act, "
        "`fires` the share on which both let one act or neither, `wrong` the share on which another one acts. It is "
        "built as edits are added, kept for all versions of a ledger, and built anew when a process opens one:", "",
        *table(("stored edits", "building s", "recall", "fires", "wrong"), list(indexes.values())),
        f"On paper a 7B model reads {weights / 1e9:.1f} GB of weights for each token of an answer, and routing among "
        f"100,000 stored edits {1e5 * reduced_bytes / 1e6:.1f} MB of reduced vectors once: "
        f"{100 * 1e5 * reduced_bytes / (4 * weights):.3f} % of an answer of four tokens (target 1 %), "
        f"{100 * 1e5 * 1024 / (4 * weights):.2f} % with whole ones. A stored edit keeps {per_edit / 1024:.0f} KiB for "
        "the router there.", "",
    ]  # fmt: skip


def _of_more(outcomes: Sequence[dict[str, Any]], last: dict[str, Any], most: int) -> list[str]:
    """What more stored edits cost, where fewer of them were records."""
    said = {
        row["stored"]: f"Of {row['stored']:,} stored edits, {each['drawn']:,} of them records, a question alone takes "
        f"{1000 * row['exact_s']:.1f} ms with reduced vectors, {100 * row['exact_s'] / row['answer_s']:.0f} % of an "
        f"answer, and {1000 * row['whole_s']:.1f} with whole ones; an index of so many was not tried."
        for each in outcomes
        for row in each["rows"]
        if each["drawn"] != last["drawn"] and row["stored"] > most and row["at_once"] == 1 and "recall" not in row
    }
    return [line for text in said.values() for line in (text, "")]


def _of_firing(outcomes: Sequence[dict[str, Any]]) -> list[str]:
    """How often an edit acts where it should, and where none should."""
    if not outcomes:
        return []
    last = outcomes[-1]
    alike = [each for each in outcomes if each["model_fingerprint"] == last["model_fingerprint"]]
    latest = {(row["stored"], row["agreement"]): row for each in alike for row in each["rows"]}
    rows = []
    for stored in sorted({stored for stored, _ in latest}):
        before, after = latest[stored, False], latest.get((stored, True), latest[stored, False])
        pairs = [(100 * before[kind], 100 * after[kind]) for kind in (*INSIDE, "foreign_any")]
        rows.append((f"{stored:,}", after["asked"], *(f"{one:.1f} → {two:.1f} %" for one, two in pairs)))
    names = (
        "stored edits",
        "asked",
        "own question",
        "reworded",
        "unseen wording",
        "another picture",
        "foreign question",
    )
    rate = (last["agreement"] or {}).get("false_rate", 0)
    return [
        "The more edits are stored, the likelier one of them claims a question that none was made for, nearly always "
        "by an image that the classifier finds alike and that is not. So images have to agree, the more, the more "
        f"edits are stored (`false_rate={rate:g}` of `ldke`, set on held-out training records). Share of questions on "
        "which the right edit acts, and of foreign ones on which any does, by the classifier's threshold alone → with "
        "agreement, on the same questions; of the stored edits the last are asked, and "
        f"{latest[max(latest)]['foreign']} records that are not stored:",
        "",
        *table(names, rows),
    ]


def _of_endurance() -> list[str]:
    """A long run into one ledger."""
    if not ENDURANCE.exists():
        return []
    rows = record.read(ENDURANCE)
    cases = [row for row in rows if row.metric == "delta_bytes"]
    if not cases:
        return []
    last = max(cases, key=lambda row: row.time)
    found = {row.metric: row.value for row in rows if row.case == last.case and row.time == last.time}
    tenths = [row for row in rows if row.case.startswith(f"{last.case}/tenth=") and row.time == last.time]
    rates, memory = ([row.value for row in tenths if row.metric == each] for each in ("edits_per_s", "rss_mib"))
    edits, config = round(found["edits_per_s"] * found["run_s"]), last.config
    stopped = "" if edits >= config["edits"] else f"of {config['edits']:,} "
    lines = [
        "## A long run", "",
        f"`benchmarks/endurance.py`: {edits:,} {stopped}edits of `{config['model']}` by `{config['method']}` in "
        f"{found['run_s']:,.0f} s, batches of {config['batch_size']} on one thread, into one ledger on "
        f"{config['storage']}; other work ran on the second core:", "",
        *table(
            ("tenth of the edits", *(str(number) for number in range(1, len(rates) + 1))),
            [("edits/s", *(f"{each:.1f}" for each in rates)), ("resident MiB", *(f"{each:,.0f}" for each in memory))],
        ),
        f"{found['delta_bytes']:,.0f} bytes of deltas an edit, {found['files']:,.0f} files and "
        f"{found['disk_mib']:,.0f} MiB in all, images and database included; opened in "
        f"{1000 * found['open_s']:,.0f} ms.",
    ]  # fmt: skip
    if "held" in found:
        lines[-1] += (
            f" Of sampled edits {100 * found['held']:.1f} % hold with all that act, {100 * found['reworded']:.1f} % "
            f"reworded; what acts was ready to answer after {found['serve_s']:,.0f} s, in which every delta's file is "
            "read and checked."
        )
    else:
        lines[-1] += (
            " Whether they hold was not asked: before it serves, `grace` looks at every pair of balls once, and every "
            "delta's file is read, which had not ended when this was written."
        )
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scaling.md")
    options = parser.parse_args()
    made = page([json.loads(line) for line in parallel.RESULTS.read_text(encoding="utf-8").splitlines()])
    if not options.write:
        print(made)
        return
    text = PAGE.read_text(encoding="utf-8")
    before = text.partition(BEGIN)[0].rstrip()
    PAGE.write_text(f"{before}\n\n{made}\n{text.partition(END)[2].lstrip()}", encoding="utf-8")


if __name__ == "__main__":
    main()
