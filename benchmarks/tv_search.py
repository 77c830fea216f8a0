"""Does the total-variation penalty of ``odedit+x`` earn its place over ``kl+x`` on the same data? On train splits.

    python benchmarks/tv_search.py --edits 64 --pairs pocket-llava/pocket-vqa      a first look at every setting
    python benchmarks/tv_search.py --edits 400 --only "kl; scalar .1"              some settings on all pairs
    python benchmarks/tv_search.py --record                                       all settings, kept under results/
    python benchmarks/tv_search.py --report                                        tables of what is there

Edits are the first of a train split, the pool is the rest of it behind ``POOL``; the eval split is never read. A cell
is one setting on one model and set; each leaves one JSON file, and what is there is not run again. One thread, at low
priority.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

if __name__ == "__main__":
    import _package  # noqa: F401

import fastedit
from benchmarks import record
from benchmarks.quality_cases import FIVE
from benchmarks.quality_verdicts import over_pairs
from fastedit.evaluation import Score, bootstrap_difference
from fastedit.methods import resolve
from fastedit.methods.registry import OBJECTIVES
from fastedit.objectives import Losses, TokenBatch
from fastedit.requests import EditRequest

MODELS = ("pocket-llava", "pocket-blip2", "pocket-qwen2vl")
DATA = ("pocket-vqa", "pocket-caption")
PAIRS = tuple(f"{model}/{data}" for data in DATA for model in MODELS)
#: Where cells are kept that were recorded, with one value an edit.
STORED = record.RESULTS / "tv_search.jsonl.gz"
#: Records of a train split that are edits in some search; the pool begins behind them.
POOL = 600
#: The six that are averaged: those of the field, and the edit's question about another image.
SIX = (*FIVE, "near")

#: All the steps, whether an edit is right or not: what there is to gain behind the point at which fits usually end.
ALL_STEPS: Mapping[str, Any] = {"stop_loss": None}
NO_TV: Mapping[str, Any] = {"dual": "constant", "scale": 0.0}
SCALAR: Mapping[str, Any] = {"dual": "scalar", "scale": 0.1}
NO_MMD: Mapping[str, Any] = {"weights": (1.0, 1.0, 0.0)}
#: What ``odedit+x`` weighs MMD by default.
LITTLE_MMD = (1.0, 1.0, 0.01)
NETWORK: Mapping[str, Any] = {"dual": "network", "scale": 0.1, "weights": LITTLE_MMD}

#: By name, the objective and its settings. ``kl`` is the control: the same views, without MMD, TV and multiplier; a
#: setting of several views, or of all steps, stands beside the control that has as many. ``share`` keeps the penalty at
#: a share of the risk all along, ``late`` begins in the middle, where most edits are right. ``guarded`` begins after a
#: fifth of the steps and backs off where an answer is lost again, as by default.
SETTINGS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "kl": ("kl", {"kl_rephrases": True}),
    "kl, KL of weight 2": ("kl", {"kl_rephrases": True, "kl_weight": 2.0}),
    "kl, KL of weight 4": ("kl", {"kl_rephrases": True, "kl_weight": 4.0}),
    "kl, weight decay 1": ("kl", {"kl_rephrases": True, "weight_decay": 1.0}),
    "kl, weight decay 4": ("kl", {"kl_rephrases": True, "weight_decay": 4.0}),
    "kl, weight decay 10": ("kl", {"kl_rephrases": True, "weight_decay": 10.0}),
    "kl, weight decay 25": ("kl", {"kl_rephrases": True, "weight_decay": 25.0}),
    "kl, 3 views": ("kl", {"kl_rephrases": True, "n_views": 3}),
    "kl, all steps": ("kl", {"kl_rephrases": True, **ALL_STEPS}),
    "no TV": ("odedit", NO_TV),
    "no TV, no MMD": ("odedit", {**NO_TV, **NO_MMD}),
    "no TV, MMD .1": ("odedit", {**NO_TV, "weights": (1.0, 1.0, 0.1)}),
    "no TV, MMD .01": ("odedit", {**NO_TV, "weights": LITTLE_MMD}),
    "constant .1, MMD .1": ("odedit", {"dual": "constant", "scale": 0.1, "weights": (1.0, 1.0, 0.1)}),
    "constant .1": ("odedit", {"dual": "constant", "scale": 0.1}),
    "constant 1": ("odedit", {"dual": "constant", "scale": 1.0}),
    "share .03": ("odedit", {"dual": "constant", "scale": 0.03, "calibration": 1000}),
    "share .1": ("odedit", {"dual": "constant", "scale": 0.1, "calibration": 1000}),
    "share .3": ("odedit", {"dual": "constant", "scale": 0.3, "calibration": 1000}),
    "share 1": ("odedit", {"dual": "constant", "scale": 1.0, "calibration": 1000}),
    "scalar .03": ("odedit", {"dual": "scalar", "scale": 0.03}),
    "scalar .1": ("odedit", SCALAR),
    "scalar .1, to 100": ("odedit", {**SCALAR, "dual_lr": 0.2, "max_ratio": 100.0}),
    "scalar .1, no MMD": ("odedit", {**SCALAR, **NO_MMD}),
    "scalar .1, risk_env": ("odedit", {**SCALAR, "penalty": "risk_env"}),
    "scalar .1, paper": ("odedit", {**SCALAR, "penalty": "paper"}),
    "scalar .1, token": ("odedit", {**SCALAR, "penalty": "token"}),
    "scalar .1, warm-up .2": ("odedit", {**SCALAR, "warmup": 0.2}),
    "network .1": ("odedit", {"dual": "network", "scale": 0.1}),
    "network .1, MMD .01": ("odedit", NETWORK),
    "network .1, MMD .01, backs off": ("odedit", {**NETWORK, "backoff": 0.5}),
    "network .1, MMD .01, guarded": ("odedit", {**NETWORK, "backoff": 0.5, "warmup": 0.2}),
    "network .1, MMD .01, backs off, weight decay 4": ("odedit", {**NETWORK, "backoff": 0.5, "weight_decay": 4.0}),
    "no TV, MMD .01, weight decay 4": ("odedit", {**NO_TV, "weights": LITTLE_MMD, "weight_decay": 4.0}),
    "detached .1, MMD .01, backs off": ("odedit", {**NETWORK, "dual": "network-detached", "backoff": 0.5}),
    "scalar .1, MMD .01, backs off": ("odedit", {**NETWORK, "dual": "scalar", "backoff": 0.5}),
    "constant .1, MMD .01, backs off": ("odedit", {**NETWORK, "dual": "constant", "backoff": 0.5}),
    "constant .3, MMD .01, backs off": ("odedit", {**NETWORK, "dual": "constant", "scale": 0.3, "backoff": 0.5}),
    "constant .1, MMD .01": ("odedit", {"dual": "constant", "scale": 0.1, "weights": LITTLE_MMD}),
    "scalar .1, MMD .01": ("odedit", {**SCALAR, "weights": LITTLE_MMD}),
    "detached .1, MMD .01": ("odedit", {"dual": "network-detached", "scale": 0.1, "weights": LITTLE_MMD}),
    "detached .1": ("odedit", {"dual": "network-detached", "scale": 0.1}),
    "no TV, 3 views": ("odedit", {**NO_TV, "n_views": 3}),
    "scalar .1, 3 views": ("odedit", {**SCALAR, "n_views": 3}),
    "no TV, all steps": ("odedit", {**NO_TV, **ALL_STEPS}),
    "scalar .1, all steps": ("odedit", {**SCALAR, **ALL_STEPS}),
    "scalar .1, late, all steps": ("odedit", {**SCALAR, **ALL_STEPS, "warmup": 0.5}),
    "scalar 1, late, all steps": ("odedit", {"dual": "scalar", "scale": 1.0, **ALL_STEPS, "warmup": 0.5}),
}


def control_of(name: str) -> str:
    """The control that has the data, the steps and the decay of a setting; of a control with decay, the one without."""
    objective, settings = SETTINGS[name]
    views = settings.get("n_views", 1)
    if objective == "odedit" and "weight_decay" in settings:
        return f"kl, weight decay {settings['weight_decay']:g}"
    if "stop_loss" in settings:
        return "kl, all steps"
    return "kl" if views == 1 else f"kl, {views} views"


@dataclasses.dataclass
class Curves:
    """What the multiplier did in some fits; one list of (step, λ, T, total) an edit."""

    edits: list[list[tuple[int, float, float, float]]] = dataclasses.field(default_factory=list)
    _open: dict[int, list[tuple[int, float, float, float]]] = dataclasses.field(default_factory=dict)

    def note(self, steps: Sequence[int], losses: Losses) -> None:
        """One evaluation of all slots; a slot whose steps stand still is free."""
        columns = (losses.parts.get(name) for name in ("lambda", "tv"))
        multipliers, variations = ([0.0] * len(steps) if each is None else each.tolist() for each in columns)
        for slot, taken in enumerate(steps):
            if taken == 0:
                self._open[slot] = []
                self.edits.append(self._open[slot])
            curve = self._open.get(slot)
            if curve is not None and (not curve or curve[-1][0] < taken):
                curve.append((taken, multipliers[slot], variations[slot], float(losses.total.detach()[slot])))

    def summary(self) -> dict[str, Any]:
        """Medians over edits: λ at the end over its start, and the penalty's share of the risk at both."""
        whole = [curve for curve in self.edits if curve and curve[-1][1] > 0]
        if not whole:
            return {"steps": _median([curve[-1][0] for curve in self.edits if curve])}
        begins = [next(point for point in curve if point[1] > 0) for curve in whole]
        return {
            "steps": _median([curve[-1][0] for curve in self.edits if curve]),
            "ratio": _median([curve[-1][1] / begin[1] for curve, begin in zip(whole, begins, strict=True)]),
            "first_share": _median([_share(begin) for begin in begins]),
            "last_share": _median([_share(curve[-1]) for curve in whole]),
            "first_tv": _median([begin[2] for begin in begins]),
            "last_tv": _median([curve[-1][2] for curve in whole]),
        }


def _share(point: tuple[int, float, float, float]) -> float:
    penalty = point[1] * point[2]
    return penalty / max(point[3] - penalty, 1e-9)


def _median(values: Sequence[float]) -> float:
    return float(torch.tensor(list(values), dtype=torch.float64).median()) if values else float("nan")


@contextmanager
def watched() -> Iterator[Curves]:
    """Inside the block every fit under ODEdit's objective tells how its multiplier went."""
    curves, plain = Curves(), OBJECTIVES["odedit"]

    def build(config: Any, steps: int) -> Any:
        objective = plain.build(config, steps)
        forward = type(objective).__call__

        class Watched(type(objective)):  # type: ignore[misc]
            def __call__(self, tokens: TokenBatch, steps: Any) -> Losses:
                losses: Losses = forward(self, tokens, steps)
                curves.note(steps.tolist(), losses)
                return losses

        objective.__class__ = Watched
        return objective

    OBJECTIVES["odedit"] = dataclasses.replace(plain, build=build)
    try:
        yield curves
    finally:
        OBJECTIVES["odedit"] = plain


def trimmed(edit: EditRequest) -> EditRequest:
    """An edit without what the six scores do not ask."""
    probes = tuple(probe for probe in edit.probes if probe.kind == "near")
    return dataclasses.replace(edit, probes=probes, portability=())


def run_cell(
    model: Any, edits: Sequence[EditRequest], pool: Sequence[EditRequest], name: str, base: str
) -> dict[str, Any]:
    """Fit and score one setting; plain values."""
    objective, settings = SETTINGS[name]
    if objective == "odedit":
        # From the first step to the last, all risks alike as in equation (9), where a setting does not say otherwise
        settings = {"warmup": 0.0, "backoff": 1.0, "weights": (1.0, 1.0, 1.0), **settings}
    if hasattr(resolve(f"{objective}+{base}", {}).config, "weight_decay"):
        # None where a setting does not name it; `lora` has some by default
        settings = {"weight_decay": 0.0, **settings}
    begin = time.process_time()
    with watched() as curves:
        run = fastedit.edit(
            model, [trimmed(edit) for edit in edits], f"{objective}+{base}", batch_size=64, pool=pool,
            show_progress=False, **settings,
        )  # fmt: skip
    return {
        "per_edit": {name: [edit.strict.get(name) for edit in run.edit_scores] for name in names_of(run)},
        "steps": [outcome.steps for outcome in run.outcomes],
        "statuses": sorted({outcome.status for outcome in run.outcomes}),
        "curves": curves.summary() if objective == "odedit" else {},
        "cpu_s": time.process_time() - begin,
        "settings": {"objective": objective, **settings},
        "model_fingerprint": model.fingerprint,
        "commit": run.provenance.get("commit"),
    }


def names_of(run: Any) -> list[str]:
    """The scores that any edit has."""
    return sorted(
        {name for edit in run.edit_scores for name in edit.strict if name in (*SIX, "text_generality_unseen")}
    )


def mean_of_six(cell: Mapping[str, Any]) -> list[float | None]:
    """By edit the mean of those of the six that it has."""
    columns = [cell["per_edit"][name] for name in SIX if name in cell["per_edit"]]
    present = [[value for value in row if value is not None] for row in zip(*columns, strict=True)]
    return [sum(row) / len(row) if row else None for row in present]


def path_of(out: Path, pair: str, base: str, edits: int, name: str) -> Path:
    """The file of a cell."""
    label = name.replace(", ", "-").replace(" ", "_")
    return out / f"{pair.replace('/', '--')}--{base}--{edits}--{label}.json"


def cells_of(out: Path, base: str, edits: int) -> list[dict[str, Any]]:
    """The cells of a folder, in the order of settings and pairs."""
    paths = (path_of(out, pair, base, edits, name) for name in SETTINGS for pair in PAIRS)
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]


def stored_cells(path: Path = STORED) -> list[dict[str, Any]]:
    """The cells that were recorded."""
    return [json.loads(line) for line in record.unpacked(path).splitlines()] if path.exists() else []


def store(cells: Sequence[Mapping[str, Any]], path: Path = STORED) -> Path:
    """Record cells; one of the same setting, pair, method and number of edits on the same weights is replaced."""
    keys = ("setting", "pair", "base", "edits", "model_fingerprint")
    known = {tuple(cell[key] for key in keys): cell for cell in (*stored_cells(path), *cells)}
    path.write_bytes(record.packed("".join(json.dumps(cell) + "\n" for cell in known.values()), path))
    return path


def table(measured: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown: by setting the difference to its control, in the mean over pairs and by pair."""
    cells = {(cell["setting"], cell["pair"]): cell for cell in measured}
    pairs = [pair for pair in PAIRS if any(pair == other for _, other in cells)]
    heads = ["setting", "mean of six", "minus control", *pairs, "unseen", "near", "λ end/start", "share of R", "steps"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name in SETTINGS:
        here = {pair: cells[name, pair] for pair in pairs if (name, pair) in cells}
        if here:
            beside = {pair: cells[control_of(name), pair] for pair in here if (control_of(name), pair) in cells}
            lines.append("| " + " | ".join([name, *_cells(here, beside, pairs)]) + " |")
    return lines


def _cells(here: Mapping[str, Any], beside: Mapping[str, Any], pairs: Sequence[str]) -> list[str]:
    shared = [pair for pair in here if pair in beside]
    apart = {pair: bootstrap_difference(mean_of_six(here[pair]), mean_of_six(beside[pair])) for pair in shared}
    sides = [(mean_of_six(here[pair]), mean_of_six(beside[pair])) for pair in shared]
    total = [_mean(mean_of_six(cell)) for cell in here.values()]
    columns = [
        [_mean(cell["per_edit"][score]) for cell in here.values() if score in cell["per_edit"]]
        for score in ("text_generality_unseen", "near")
    ]
    curves = [cell["curves"] for cell in here.values() if "ratio" in cell["curves"]]
    steps = _mean([step for cell in here.values() for step in cell["steps"]])
    told = [_mean([curve[key] for curve in curves]) for key in ("ratio", "first_share", "last_share")]
    return [
        f"{_mean(total):.3f}",
        _interval(over_pairs(sides)) if sides else "",
        *(_interval(apart[pair]) if pair in apart else "" for pair in pairs),
        *(f"{_mean(column):.3f}" if column else "" for column in columns),
        *([f"{told[0]:.2f}", f"{told[1]:.2g} to {told[2]:.2g}"] if curves else ["", ""]),
        f"{steps:.1f}",
    ]


def _mean(values: Sequence[float | None]) -> float:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else float("nan")


def _interval(found: Score) -> str:
    text = f"{found.mean:+.4f} ({found.low:+.4f} to {found.high:+.4f})"
    return f"**{text}**" if found.low > 0 else text


def main(
    edits: Annotated[int, typer.Option(min=1, max=POOL, help="of every cell")] = 400,
    base: Annotated[str, typer.Option(help="the method beneath")] = "lora",
    pairs: Annotated[str, typer.Option(help="model/set, several by commas")] = ",".join(PAIRS),
    only: Annotated[str, typer.Option(help="names of settings, several by semicolons; empty: all")] = "",
    out: Annotated[Path, typer.Option(help="folder of the cells")] = Path("runs/tv_search"),
    report: Annotated[bool, typer.Option("--report", help="run nothing")] = False,
    recorded: Annotated[bool, typer.Option("--record", help="keep the cells in benchmarks/results/")] = False,
) -> None:
    """Search settings of the penalty."""
    chosen = [name.strip() for name in only.split(";") if name.strip()] or list(SETTINGS)
    unknown = [name for name in chosen if name not in SETTINGS]
    if unknown:
        raise typer.BadParameter(f"tv_search: settings are {list(SETTINGS)} (got {unknown})")
    if not report:
        os.nice(5)
        torch.set_num_threads(1)
        out.mkdir(parents=True, exist_ok=True)
        for pair in pairs.split(","):
            _run_pair(pair, chosen, base, edits, out)
    cells = cells_of(out, base, edits)
    print("\n".join(table(cells)))
    if recorded:
        print(f"rows: {store(cells)}")


def _run_pair(pair: str, names: Sequence[str], base: str, edits: int, out: Path) -> None:
    waiting = [name for name in names if not path_of(out, pair, base, edits, name).exists()]
    if not waiting:
        return
    name_of_model, _, data = pair.partition("/")
    model = fastedit.load(name_of_model)
    records = fastedit.read_edits(data, split="train")
    for name in waiting:
        cell = run_cell(model, records[:edits], records[POOL:], name, base)
        named = {"setting": name, "pair": pair, "base": base, "edits": edits}
        path = path_of(out, pair, base, edits, name)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({**named, **cell}), encoding="utf-8")
        partial.replace(path)
        print(f"{pair} {name}: {_mean(mean_of_six(cell)):.4f}, {cell['cpu_s']:.0f} s of CPU", flush=True)


if __name__ == "__main__":
    typer.run(main)
