"""What routing costs with a thousand to a million stored edits, and how often it fires where it should not.

    python benchmarks/routing.py --stored 1000,10000,100000 --record        seconds, beside those of an answer
    python benchmarks/routing.py --firing 1,10,100,1000,10000 --record      true and false positives
    python benchmarks/routing.py --report

Questions and stored edits of the first ones are records of pocket-vqa, as ``long_sequence.py`` draws them; more than
``--drawn`` of them are those again with noise on the vectors, as large as the distance between two questions about one
scene: whether vectors are of pictures that were rendered does not change what it costs to compare them. All ways of
routing run in turns on the same states: all scores at once, claims from whole vectors, claims with a first pass over
reduced ones (what the engine does), and from an index. Unless the exact ones choose the same edits nothing is timed.
Times are those of the processor: what else runs on the machine does not count.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

if __name__ == "__main__":
    import _package  # noqa: F401

import fastedit
from benchmarks import record
from benchmarks.long_sequence import ROWS, consistent, held_memories
from benchmarks.memory import _status_mib
from fastedit.backbone import EditableModel, PackedState
from fastedit.backbone.packed_forward import packed_prefix, packed_start
from fastedit.data.report import target_key
from fastedit.deltas import EditDelta, Rows, split_point, stack
from fastedit.deltas.install import RowsHolder, prepared
from fastedit.deltas.questions import best_of
from fastedit.engine import provenance
from fastedit.methods.ldke.views import walked
from fastedit.pocket.edits import Record
from fastedit.pocket.world import render
from fastedit.requests import Query
from fastedit.routers import reduced
from fastedit.routers.classifier import ANSWER, Disentangler
from fastedit.routers.features import prompt_tokens
from fastedit.training import Artifact

RESULTS = record.RESULTS / "routing.jsonl"
QUESTIONS, RECALLED = 64, 400


def walked_state(model: EditableModel, spec: Any, queries: Sequence[Query]) -> PackedState:
    """Prompts at the point where a router reads them."""
    state = packed_start(model, model.encode(queries, answers=False))
    return packed_prefix(model, state, *split_point(spec))


def extended(fixed: dict[str, Tensor], count: int, noise: float, seed: int = 0) -> dict[str, Tensor]:
    """Vectors (count, ...) of so many stored edits: the first as they are, then again with noise, of their lengths."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, known in fixed.items():
        copies = [known[: min(count, len(known))]]
        for start in range(len(known), count, len(known)):
            part = known[: min(len(known), count - start)]
            moved = part + noise / part.shape[1] ** 0.5 * torch.randn(part.shape, generator=generator)
            copies.append(moved * (part.norm(dim=1) / moved.norm(dim=1).clamp(min=1e-12))[:, None])
        made[name] = torch.cat(copies)
    return made


def with_stored(holder: RowsHolder, fixed: dict[str, Tensor], records: Sequence[Record[Any]] = ()) -> None:
    """Let the router of a holder choose from other stored edits, which have no texts beyond the answers of records."""
    count = len(next(iter(fixed.values())))
    stacked: Any = holder.stacked
    stacked.fixed = fixed
    stacked.texts = [{ANSWER: target_key(each.target)} for each in records] or [{} for _ in range(count)]


def by_claims(holder: RowsHolder, state: PackedState) -> list[int]:
    """The edits that act, as the engine finds them."""
    holder.route(state)
    return holder.choice or []


@torch.no_grad()
def by_scores(holder: RowsHolder, state: PackedState) -> list[int]:
    """The edits that act, from the scores of all pairs."""
    router, fixed = holder.router, holder.stacked.fixed
    assert router is not None
    scores = router.scores(state, fixed, None)
    allowed = torch.where(scores >= router.threshold(fixed), scores, -torch.inf)
    return best_of(allowed, holder._of_texts()[1]).tolist()


@contextmanager
def searched(model: EditableModel, how: str) -> Iterator[None]:
    """Inside the block routers search as they do ("exact"), compare whole vectors ("whole"), or ask an index."""
    before = model.index_from, reduced.LEAST_ROWS
    try:
        model.index_from = 1 if how == "index" else None
        reduced.LEAST_ROWS = sys.maxsize if how == "whole" else before[1]
        yield
    finally:
        model.index_from, reduced.LEAST_ROWS = before


def in_turns(calls: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Median processor seconds of each call, after one that does not count."""
    seconds: list[list[float]] = [[] for _ in calls]
    for turn in range(repeats + 1):
        for own, call in zip(seconds, calls, strict=True):
            begin = time.process_time()
            call()
            if turn:
                own.append(time.process_time() - begin)
    return [statistics.median(own) for own in seconds]


def costs(
    model: EditableModel,
    deltas: Sequence[EditDelta],
    queries: Sequence[Query],
    stored: Sequence[int],
    *,
    noise: float = 0.3,
    repeats: int = 9,
    recalled: Sequence[Query] = (),
    index_to: int = 0,
    known: dict[str, Tensor] | None = None,
) -> list[dict[str, Any]]:
    """Processor seconds of an answer and of routing a question, by how many edits are stored and how many come at once.

    Args:
        queries: asked one at a time and all at once. recalled: asked of exact search and of an index.
        index_to: stored edits up to which an index is built; 0 builds none.
        known: what the router keeps of records, by name; those of the deltas by default. More are these with noise.
    Returns:
        Of every pair "answer_s", "read_s" (what the router reads of a prompt, without the stored edits), and of routing
        the whole "exact_s", "whole_s", "index_s" and "scores_s" (all pairs), as far as they were tried. Of an index
        "build_s", "index_bytes" of an edit, "recall": of questions on which exact search lets an edit act the share
        with the same edit, "fires": the share of all on which both let one act or neither, "wrong": another acts.
    Raises:
        RuntimeError: the exact ways of routing choose differently.
    """
    stacked: Any = stack(list(deltas))
    known = dict(stacked.fixed) if known is None else known
    found = []
    states = {count: walked_state(model, stacked.spec, list(queries[:count])) for count in (1, len(queries))}
    asked_state = walked_state(model, stacked.spec, list(recalled)) if recalled else None
    for count in stored:
        holder = prepared(model, stacked, Rows())
        with_stored(holder, extended(known, count, noise))
        size = sum(each.numel() * each.element_size() for each in stacked.fixed.values()) / count
        of_index = _index_of(model, holder, asked_state, count) if count <= index_to and asked_state is not None else {}
        for at_once, state in states.items():
            asked = list(queries[:at_once])
            ways: dict[str, Callable[[], Any]] = {
                "answer": lambda: model.generate(asked, max_new_tokens=4),  # noqa: B023
                "read": lambda: holder.router.classifier(prompt_tokens(state)),  # type: ignore[union-attr]  # noqa: B023
            }
            for how in ("exact", "whole", *(("index",) if of_index else ())):
                ways[how] = partial(_routed, model, holder, state, how)
            # The scores of all pairs of a million edits and 64 questions are more than there is memory for
            if count * at_once <= 1 << 23:
                ways["scores"] = partial(by_scores, holder, state)
            exact = {how: ways[how]() for how in ("exact", "whole", "scores") if how in ways}
            if any(chosen != exact["exact"] for chosen in exact.values()):
                raise RuntimeError(f"routing: exact ways choose differently (got stored={count}, {exact})")
            with torch.no_grad():
                seconds = dict(zip(ways, in_turns(list(ways.values()), repeats), strict=True))
            row = {f"{name}_s": each / at_once for name, each in seconds.items()}
            found.append({"stored": count, "at_once": at_once, **row, "bytes_per_edit": size, **of_index})
        model.tables = None
    return found


def _routed(model: EditableModel, holder: RowsHolder, state: PackedState, how: str) -> list[int]:
    with searched(model, how):
        return by_claims(holder, state)


def _index_of(model: EditableModel, holder: RowsHolder, asked: PackedState, count: int) -> dict[str, float]:
    """What it costs to build an index, and how what it lets act differs from exact search."""
    begin, memory = time.process_time(), _status_mib("VmRSS")
    named = _routed(model, holder, asked, "index")
    build_s, memory = time.process_time() - begin, _status_mib("VmRSS") - memory
    exact = _routed(model, holder, asked, "exact")
    pairs = list(zip(exact, named, strict=True))
    acts = [(one, other) for one, other in pairs if one >= 0]
    return {
        "build_s": build_s,
        "index_bytes": memory * 2**20 / count,
        "recall": sum(one == other for one, other in acts) / max(1, len(acts)),
        "fires": sum((one >= 0) == (other >= 0) for one, other in pairs) / len(pairs),
        "wrong": sum(other not in (one, -1) for one, other in pairs) / len(pairs),
    }


def remembered(
    model: EditableModel, records: Sequence[Record[Any]], stacked: Any, classifier: Disentangler, path: Path | None
) -> dict[str, Tensor]:
    """What the router keeps of records, (N, ...) by name; in a file where one is named, read from it if it is there."""
    if path is not None and path.exists():
        kept: dict[str, Tensor] = torch.load(path)
        if len(kept["entity"]) >= len(records):
            return {name: each[: len(records)] for name, each in kept.items()}
    parts = []
    with torch.no_grad():
        for start in range(0, len(records), ROWS):
            queries = [Query(each.prompt, render(each.scene)) for each in records[start : start + ROWS]]
            tokens = walked(model, split_point(stacked.spec), queries)
            parts.append((*classifier(tokens), tokens.centre()))
    made = dict(zip(("entity", "relation", "image"), map(torch.cat, zip(*parts, strict=True)), strict=True))
    if path is not None:
        torch.save(made, path)
    return made


def firing(
    model: EditableModel,
    stacked: Any,
    memories: dict[str, Tensor],
    records: Sequence[Record[Any]],
    sizes: Sequence[int],
    asked: int,
) -> list[dict[str, Any]]:
    """Shares of questions that the right edit answers, that any does, and of foreign ones that any does.

    Of every size twice, for the same questions: as the artifact says ("agreement" True where it has one), and by the
    classifier's threshold alone (False).

    Args:
        stacked: deltas whose router is asked. memories, records: of the longest sequence and at least ``asked`` more,
            whose questions are foreign to all.
        sizes: how many of the first are stored. asked: questions of each kind.
    """
    longest = max(sizes)
    foreign = _walked_states(model, stacked.spec, [_asked(records[n])["own"] for n in range(longest, longest + asked)])
    found = []
    for size in sizes:
        numbers = list(range(size - min(size, asked), size))
        views: dict[str, list[tuple[int, Query]]] = {}
        for number in numbers:
            for kind, query in _asked(records[number]).items():
                views.setdefault(kind, []).append((number, query))
        states = {kind: _walked_states(model, stacked.spec, [q for _, q in pairs]) for kind, pairs in views.items()}
        for agreement in (True, False):
            holder = prepared(model, stacked, Rows())
            with_stored(holder, {name: each[:size] for name, each in memories.items()}, records[:size])
            router: Any = holder.router
            if not agreement:
                router.agreement = None
            elif router.agreement is None:
                continue
            row: dict[str, Any] = {"stored": size, "agreement": agreement, "asked": len(numbers)}
            for kind, pairs in views.items():
                picked = [edit for state in states[kind] for edit in by_claims(holder, state)]
                row[f"{kind}_any"] = sum(edit >= 0 for edit in picked) / len(picked)
                row[f"{kind}_right"] = sum(e == n for e, (n, _) in zip(picked, pairs, strict=True)) / len(picked)
            picked = [edit for state in foreign for edit in by_claims(holder, state)]
            found.append(
                {**row, "foreign": len(picked), "foreign_any": sum(edit >= 0 for edit in picked) / len(picked)}
            )
    return found


def _walked_states(model: EditableModel, spec: Any, queries: Sequence[Query]) -> list[PackedState]:
    with torch.no_grad():
        return [walked_state(model, spec, queries[start : start + 64]) for start in range(0, len(queries), 64)]


def _asked(each: Record[Any]) -> dict[str, Query]:
    """What an edit is to act on: its question, in another and in an unseen wording, and about another picture."""
    image = render(each.scene)
    found = {"own": Query(each.prompt, image), "reworded": Query(each.rephrase, image)}
    found["picture"] = Query(each.prompt, render(each.rephrased))
    unseen = next((one.prompt for one in each.further if one.kind == "text_generality_unseen"), None)
    return found if unseen is None else {**found, "unseen": Query(unseen, image)}


def show(stored: Sequence[dict[str, Any]], console: Console) -> None:
    """Print stored outcomes, a table a kind."""
    for kind in ("costs", "firing"):
        for outcome in (row for row in stored if row["kind"] == kind):
            names = list(dict.fromkeys(name for row in outcome["rows"] for name in row))
            table = Table(
                *names, title=f"{kind}: {outcome['method']} on {outcome['model']}, {outcome['machine']['cpu']}"
            )
            for row in outcome["rows"]:
                table.add_row(*(_shown(row.get(name)) for name in names))
            console.print(table)


def _shown(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def main(
    stored: Annotated[str, typer.Option(help="how many edits, comma-separated: what routing costs")] = "",
    sizes: Annotated[str, typer.Option("--firing", help="how many edits: how often it fires")] = "",
    asked: Annotated[int, typer.Option(help="questions of each kind", min=1)] = 500,
    drawn: Annotated[int, typer.Option(help="stored edits that are records", min=1)] = 2000,
    artifact: Annotated[Path | None, typer.Option(help="ldke's classifier; made there if absent")] = None,
    train_records: Annotated[int, typer.Option(min=1)] = 2000,
    memories: Annotated[Path | None, typer.Option(help="keep what is stored of records here")] = None,
    index_to: Annotated[int, typer.Option(help="stored edits up to which an index is tried", min=0)] = 100_000,
    model: Annotated[str, typer.Option()] = "pocket-llava",
    store: Annotated[bool, typer.Option("--record", help="append to benchmarks/results/")] = False,
    only_report: Annotated[bool, typer.Option("--report", help="run nothing")] = False,
) -> None:
    """Time routing, or count how often it fires."""
    console = Console()
    outcomes: list[dict[str, Any]] = []
    if not only_report:
        loaded = fastedit.load(model)
        classifier = _classifier(loaded, artifact, train_records)
        counts, lengths = ([int(each) for each in text.split(",") if each] for text in (stored, sizes))
        records = list(itertools.islice(consistent("pocket-vqa"), max([drawn, *(size + asked for size in lengths)])))
        heads = Disentangler.of(classifier, loaded.device)
        common = {"method": "ldke", "model": model, "machine": record.machine(), "versions": provenance.versions()}
        common |= {"threads": torch.get_num_threads(), "drawn": drawn, "time": provenance.utc_now()}
        common |= {"commit": record.commit_with_changes(provenance.commit()), "model_fingerprint": loaded.fingerprint}
        if counts:
            deltas = held_memories(loaded, records[: min(drawn, 2)] if memories else records[:drawn], classifier)
            queries = [Query(each.prompt, render(each.scene)) for each in records[: QUESTIONS // 2]]
            queries += [Query(each.locality.prompt, render(each.scene)) for each in records[: QUESTIONS // 2]]
            recalled = [Query(each.prompt, render(each.scene)) for each in records[drawn - RECALLED // 2 : drawn]]
            recalled += [Query(each.rephrase, render(each.rephrased)) for each in records[: RECALLED // 2]]
            known = None if memories is None else remembered(loaded, records, stack(deltas[:1]), heads, memories)
            rows = costs(loaded, deltas, queries, counts, recalled=recalled, index_to=index_to, known=known)
            outcomes.append({"kind": "costs", **common, "rows": rows})
        if lengths:
            stacked = stack(held_memories(loaded, records[:2], classifier))
            kept = remembered(loaded, records, stacked, heads, memories)
            rows = firing(loaded, stacked, kept, records, lengths, asked)
            trained = {"agreement": classifier.config.get("agreement")}
            outcomes.append({"kind": "firing", **common, **trained, "rows": rows})
        if store:
            with RESULTS.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(outcome) + "\n" for outcome in outcomes)
    elif RESULTS.exists():
        outcomes = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    show(outcomes, console)


def _classifier(model: EditableModel, path: Path | None, train_records: int) -> Artifact:
    if path is not None and path.exists():
        return fastedit.load_artifact(path, model)
    pool = fastedit.read_edits("pocket-vqa", split="train", limit=train_records)
    return fastedit.train(model, "ldke", pool, out=path, show_progress=False)


if __name__ == "__main__":
    typer.run(main)
