"""The comparison of methods: its cases, its tables, what it calls reached."""

from __future__ import annotations

import dataclasses
import gzip
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import fastedit
from benchmarks import long_sequence, quality, quality_figures, quality_maps, quality_outcomes, quality_run, tv_search
from benchmarks.quality_cases import (
    CONTROL,
    DATA,
    EVERY_SET,
    FIVE,
    METHODS,
    MODELS,
    SCORES,
    UNFITTED,
    Case,
    ablations,
    cross_task,
    sequential,
    single,
)
from benchmarks.quality_figures import draw
from benchmarks.quality_outcomes import mean_of_five, stored_beside
from benchmarks.quality_tables import (
    Outcome,
    differences,
    load_outcomes,
    markdown,
    pairs,
    rows_of,
    verdicts,
)
from benchmarks.quality_verdicts import over_methods
from fastedit.methods import METHODS as REGISTERED
from fastedit.methods import resolve
from fastedit.training import Artifact, save_artifact
from tests.engine.conftest import make_edits


def outcome(method: str, right: Sequence[float], *, table: str = "single", near: float = 1.0, **case: Any) -> Outcome:
    """A made-up outcome: every edit has one value under all scores, ``near`` apart."""
    named = dataclasses.replace(Case(table, "pocket-llava", "pocket-vqa", method, edits=len(right)), **case)
    values: dict[str, list[float | None]] = {name: list(right) for name in (*SCORES, "mean_of_five")}
    values["near"] = [near] * len(right)
    values["mean_of_six"] = [(5 * value + near) / 6 for value in right]
    mean = sum(right) / len(right)
    scores = {name: {"mean": mean, "low": mean, "high": mean, "n": len(right)} for name in SCORES}
    scores["near"] = {"mean": near, "low": near, "high": near, "n": len(right)}
    return {
        "case": {**dataclasses.asdict(named), "name": named.name},
        "scores": {"strict": scores, "legacy": scores},
        "checkpoints": {"1": {"strict": scores, "legacy": scores}} if table == "sequential" else {},
        "per_edit": values,
        "tags": [["hard"] if number % 2 else [] for number in range(len(right))],
        "rates": {"near": {"mean": 0.01, "low": 0.0, "high": 0.02, "n": 4}} if method == "ldke" else {},
        "timing": {"seconds_per_edit": 0.5, "wall_s": 1.0, "train_s": 3.0, "seconds": {}, "peak_memory_mib": 9.0},
        "provenance": {"commit": "abc", "versions": {"torch": "2"}, "seed": 0},
    }  # fmt: skip


def test_cases_are_unique_and_every_method_is_there() -> None:
    every = [*single(10), *sequential(1000, METHODS), *cross_task(20, METHODS), *ablations(10)]
    assert len({case.name for case in every}) == len(every)
    assert set(METHODS) == set(REGISTERED)
    for case in every:
        resolve(case.method, dict(case.settings))
        assert all(gap < case.edits for gap in case.score_at)
    methods = {case.method for case in single(10)}
    assert methods == {*METHODS, *(f"{p}+{name}" for name in METHODS if name not in UNFITTED for p in ("kl", "odedit"))}
    seen = {
        case.method.partition("+")[0]: resolve(case.method, dict(case.settings)).build_objective(5).roles
        for case in single(10)
        if case.method.endswith("+lora")
    }
    assert seen["kl"] == seen["odedit"], "a control sees the same data"
    assert quality.cases_of(["single"], 10, 5) == single(10)
    with pytest.raises(ValueError, match=r"tables are single, .* \(got singel\)"):
        quality.cases_of(["singel"], 10, 5)


def test_groups_share_a_model_and_a_set() -> None:
    cases = single(10)
    groups = quality.groups_of(cases, 2)
    assert sorted(case.name for group in groups for case in group) == sorted(case.name for case in cases)
    assert all(len({(case.model, case.data) for case in group}) == 1 for group in groups)


def test_differences_are_of_the_same_edits() -> None:
    plain, better = outcome("lora", [0.0, 1.0] * 20), outcome("odedit+lora", [1.0, 1.0] * 20, near=0.5)
    other = outcome("odedit+ft", [1.0] * 40)
    ((one, two),) = pairs([plain, better, other])
    assert (one, two) == (plain, better)
    apart = differences(plain, better)
    assert apart["mean_of_five"].mean == pytest.approx(0.5)
    assert apart["mean_of_five"].low > 0.3
    assert apart["near"].mean == pytest.approx(-0.5)
    # Runs over other edits are no pair
    assert not pairs([plain, outcome("odedit+lora", [1.0] * 39)])


def test_what_is_reached_is_told_from_what_is_not() -> None:
    good = [outcome(name, [1.0] * 20) for name in ("ldke", "unike")]
    poor = [outcome("tpatcher", [0.9] * 20), outcome("odedit+tpatcher", [0.95] * 20)]
    found = {aim: (reached, told) for aim, reached, told in verdicts([*good, *poor])}
    assert [reached for reached, _ in found.values()] == [True, False, True, True]
    gained = next(told for aim, (_, told) in found.items() if aim.startswith("odedit"))
    assert gained == "1 of 1 (tpatcher)"
    # A single score below its bound is enough
    bad = [outcome("ldke", [1.0] * 20, near=0.89), *poor]
    assert not verdicts(bad)[0][1]
    hard = outcome("ldke", [1.0, 0.9] * 10)
    assert not next(reached for aim, reached, _ in verdicts([hard]) if aim.startswith("LDKE"))
    long = outcome("ldke", [1.0] * 1000, table="sequential")
    assert verdicts([long])[-1][1]
    forgetful = outcome("ldke", [0.89] * 1000, table="sequential")
    assert not verdicts([forgetful])[-1][1]


def test_tables_stand_in_the_order_of_the_cases() -> None:
    places = [(model, data) for data in DATA for model in MODELS]
    made = [outcome("lora", [1.0, 1.0], model=model, data=data) for model, data in reversed(places)]
    text = markdown(made, {})
    found = [text.index(f"## Single edits: {data} on {model}") for model, data in places]
    assert found == sorted(found)


def test_brute_force_takes_the_best_set_of_every_edit() -> None:
    sets = [
        outcome("ldke", right, near=0.0, table="ablation-ldke", label=label, settings={"route": False})
        for label, right in zip((*EVERY_SET, "voted 2"), ([1.0, 0.0], [0.0, 0.5], [0.0, 0.0], [0.5, 0.5]), strict=True)
    ]
    text = markdown(sets, {})
    # (5 * 1 + 0) / 6 of the first edit by one set, (5 * 0.5 + 0) / 6 of the second by another
    assert "mean of the five and near 0.625 (" in text
    assert "last 2 0.417, voted 2 0.417." in text
    assert "Brute force" not in markdown(sets[1:], {})


def test_the_document_and_the_pictures_have_everything(tmp_path: Path) -> None:
    outcomes = [
        outcome("lora", [0.0, 1.0]), outcome("odedit+lora", [1.0, 1.0]), outcome("ldke", [1.0, 1.0]),
        outcome("lora", [1.0, 1.0, 1.0], table="sequential"),
        outcome("odedit+lora", [1.0, 0.0], table="ablation-odedit", label="without TV"),
    ]  # fmt: skip
    maps = [{"kinds": ["a (2)", "b (1)"], "values": [[0.2, 0.8], [0.6, 0.4]], "data": "d", "model": "m"}]
    drawn = draw(outcomes, tmp_path / "pictures", maps)
    assert len(drawn) == 3
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn.values())
    text = markdown(outcomes, {name: path.name for name, path in drawn.items()})
    expected = [
        "## Single edits: pocket-vqa on pocket-llava, 2 edits",
        "| odedit+lora |",
        "without TV",
        "0.500",
        "+0.500",
    ]
    expected += ["+0.500", "## In sequence", "## What routers let through", *(path.name for path in drawn.values())]
    for part in expected:
        assert part in text, part
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in lines)
    rows = rows_of(outcomes)
    assert len(rows) == len(outcomes)
    assert [row["minus"]["method"] for row in rows if "minus" in row] == ["lora"]
    assert rows[0]["scores"]["strict"]["reliability"] == [0.5, 0.5, 0.5, 2]
    changed = [{**rows[0], "mean_of_five": 0.25}]
    for name, read in (
        ("rows.jsonl", Path.read_bytes),
        ("rows.jsonl.gz", lambda path: gzip.decompress(path.read_bytes())),
    ):
        path = quality.write_rows(rows, tmp_path / name)
        assert quality.write_rows(changed, path) == path
        kept = [json.loads(line) for line in read(path).decode().splitlines()]
        assert [row["mean_of_five"] for row in kept] == [0.25, *(row["mean_of_five"] for row in rows[1:])]
        # On other weights it is another row
        quality.write_rows([{**rows[0], "weights": "other"}], path)
        assert len(read(path).splitlines()) == len(rows) + 1


def test_stored_rows_stand_beside_what_was_run() -> None:
    """Of the same model, set, weights and number of edits; in tables, and in no difference of edits."""
    run, *others = (
        {**outcome(name, [1.0, 0.0]), "weights": "w"} for name in ("kl+lora", "odedit+lora", "grace", "ldke")
    )
    rows = json.loads(json.dumps(rows_of([run, *others])))
    odedit, grace, ldke = rows[1:]
    other = [{**grace, "weights": "x"}, {**grace, "case": {**grace["case"], "edits": 3, "name": "fewer"}}]
    found = stored_beside([run], [rows[0], odedit, ldke, *other])
    assert [one["case"]["method"] for one in found] == ["odedit+lora", "ldke"]
    assert mean_of_five(found[0]) == pytest.approx(mean_of_five(others[0]))
    together = [run, *found]
    assert not pairs(together, against="kl")
    text = markdown(together, {})
    assert "| ldke | 0.500" in text
    assert rows_of([found[1]])[0]["scores"] == ldke["scores"]


def test_stored_sequences_stand_beside_new_singles_of_the_same_weights() -> None:
    run = outcome("lora", [1.0, 0.0])
    long = outcome("ldke", [1.0] * 1000, table="sequential")
    (row,) = json.loads(json.dumps(rows_of([long])))
    (found,) = stored_beside([run], [row, {**row, "weights": "x"}])
    assert found["checkpoints"]["1"]["strict"]["near"] == long["checkpoints"]["1"]["strict"]["near"]
    told = {aim: reached for aim, reached, _ in verdicts([run, found])}
    assert told["after 1000 edits in sequence reliability 0.9, locality 0.95"]


def test_a_case_with_other_settings_stands_for_no_method() -> None:
    found = [outcome("kl+lora", [0.5, 0.5]), outcome("odedit+lora", [0.0, 0.0])]
    tuned = outcome("odedit+lora", [1.0, 1.0], label="odedit+lora, tuned")
    for together in ([*found, tuned], [tuned, *found]):
        ((_, other),) = pairs(together, against="kl")
        assert mean_of_five(other) == 0.0
        assert "| odedit+lora, tuned |" in markdown(together, {})
        assert any("below it 1 of 1 (lora)" in told for _, _, told in verdicts(together))


def test_seconds_of_a_narrower_processor_are_marked() -> None:
    run = outcome("lora", [1.0])
    plain = quality_outcomes.seconds_of(run)
    narrow = {**run, "provenance": {**run["provenance"], "machine": {"cpu_capability": "AVX2"}}}
    assert quality_outcomes.seconds_of(narrow) == f"{plain} (AVX2)"
    assert f"| {plain} (AVX2) |" in markdown([narrow], {})


def test_hard_questions_are_told_of_a_stored_row_where_none_failed() -> None:
    run = outcome("lora", [1.0, 0.0])
    aim = "LDKE-style: locality 0.98 on hard negatives, generality 0.9"
    for right, expected in (([1.0, 1.0], True), ([1.0, 0.0], None)):
        stored = stored_beside([run], json.loads(json.dumps(rows_of([outcome("ldke", right)]))))
        told = {aim: reached for aim, reached, _ in verdicts([run, *stored])}
        assert told.get(aim) is expected


def test_a_case_is_run_scored_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edits = make_edits(4)

    def given(data: str, split: str, limit: int | None) -> list[fastedit.EditRequest]:
        assert data == "pocket-vqa"
        return edits[:limit] if split == "eval" else edits

    monkeypatch.setattr(quality_run, "records", given)
    monkeypatch.setattr(quality_run, "TIMED", 2)
    case = Case("sequential", "random:llava-tiny", "pocket-vqa", "lora", settings={"steps": 2}, edits=3, score_at=(1,))
    quality.run_these(json.dumps([dataclasses.asdict(case)]), tmp_path)
    (found,) = load_outcomes(tmp_path / "cases")
    assert found["case"]["name"] == case.name
    assert list(found["checkpoints"]) == ["1"]
    assert len(found["per_edit"]["mean_of_five"]) == 3
    five = [found["per_edit"][name][0] for name in FIVE]
    present = [value for value in five if value is not None]
    assert found["per_edit"]["mean_of_five"][0] == pytest.approx(sum(present) / len(present))
    assert found["timing"]["seconds_per_edit"] > 0
    assert found["timing"]["peak_memory_mib"] is None
    assert quality_run.peak_memory_mib(case, tmp_path / "artifacts") > 100
    # It is there: nothing is run again
    console = Console(record=True, width=200)
    assert quality.run_all([case], tmp_path, jobs=1, threads=1, console=console) == []
    assert "1 cases, 1 of them are there" in console.export_text()


def test_memory_is_that_of_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("single", "pocket-llava", "pocket-vqa", "lora", settings={"layers": (1,)}, edits=3)
    other = dataclasses.replace(case, method="ft")
    path = quality.file_of(case, tmp_path)
    path.parent.mkdir()
    made = outcome("lora", [1.0, 1.0, 1.0])
    made["timing"]["peak_memory_mib"] = None
    quality.write_outcome(made, path)
    asked = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(quality.case_of(json.loads(command[-1])))
        return subprocess.CompletedProcess(command, len(asked) == 1, "noise\n1234.5\n", "out of memory")

    monkeypatch.setattr(quality.subprocess, "run", run)
    for attempt in range(3):
        console = Console(record=True, width=200)
        quality.weigh_all([case, other], tmp_path, jobs=1, threads=1, console=console)
        kept = json.loads(path.read_text(encoding="utf-8"))["timing"]["peak_memory_mib"]
        assert kept == (None if attempt == 0 else 1234.5)
        assert ("out of memory" in console.export_text()) == (attempt == 0)
    assert asked == [case, case]


def test_layers_are_mapped_by_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edits = [
        dataclasses.replace(edit, tags=("hard", "colour") if n % 2 else ("shape",))
        for n, edit in enumerate(make_edits(5))
    ]
    monkeypatch.setattr(quality_maps, "records", lambda data, split, limit: edits)
    found = quality_maps.layer_map("random:llava-tiny", "pocket-vqa", 5, tmp_path / "maps" / "a.json")
    assert found["kinds"] == ["colour (2)", "shape (3)"]
    for values in found["values"]:
        assert sum(values) == pytest.approx(1.0)
        assert min(values) > 0
    assert quality_maps.layer_map("never loaded", "", 0, tmp_path / "maps" / "a.json") == found


def test_a_method_is_drawn_with_its_default_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def trade_off(group: Sequence[quality_outcomes.Outcome], title: str) -> Any:
        seen.append([each["case"]["label"] for each in group])
        return quality_figures.canvas(2, 2)[0]

    monkeypatch.setattr(quality_figures, "trade_off", trade_off)
    draw([outcome("ldke", [1.0]), outcome("ldke", [0.0], label="ldke, three views")], tmp_path)
    assert seen == [[""]]


def test_what_the_encoders_see_is_drawn(tmp_path: Path) -> None:
    shapes = {"semantic": (7, 5), "positive": (7, 5), "negative": (7, 5)}
    shapes |= {
        f"{name}.{n}": shape
        for name in ("enc_sem", "enc_tru")
        for n, shape in enumerate(((5, 5), (5,), (5, 4), (4,)))
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    tensors = {f"3:{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    path = save_artifact(Artifact("unike", "", {"layers": [3]}, tensors), tmp_path / "unike.safetensors")
    view = quality_maps.knowledge(path)
    assert {title: len(points) for title, (points, _) in view.items()} == {
        "states, questions and answers": 21,
        "semantic space, questions and answers": 21,
        "states, answers": 14,
        "truthful space, answers": 14,
    }
    assert all(len(points) == len(labels) for points, labels in view.values())
    assert set(view["truthful space, answers"][1]) == {"right answer", "wrong answer"}
    drawn = draw([], tmp_path, views={"a on b": view})
    assert drawn["spaces, a on b"].stat().st_size > 10_000


def test_icons_are_run_only_where_they_are_asked_for() -> None:
    cases = quality.cases_of(["icons"], 100, 50)
    assert {case.model for case in cases} == {"smol-llava"}
    assert {case.data for case in cases} == {"icon-entity", "icon-vqa", "icon-caption"}
    assert {case.table for case in cases} == {"single"}
    assert all(case.settings == CONTROL for case in cases if case.method == "kl+lora")
    assert {"lora", "kl+lora", "odedit+lora", "unike", "wise", "grace", "serac", "ldke"} <= {
        case.method for case in cases
    }
    assert not any(case.model == "smol-llava" for case in quality.cases_of(["single"], 100, 50))


def test_the_control_has_tables_and_a_verdict_over_all_pairs() -> None:
    """A gain on one set that is a loss on another is none."""
    sets = {"pocket-vqa": [1.0] * 40, "pocket-caption": [0.0] * 40}
    made = [outcome("kl+lora", [0.0, 1.0] * 20, data=data) for data in sets]
    made += [outcome("odedit+lora", right, data=data) for data, right in sets.items()]
    both = pairs(made, against="kl")
    assert [(plain["case"]["method"], other["case"]["method"]) for plain, other in both] == [
        ("kl+lora", "odedit+lora")
    ] * 2
    assert not pairs(made), "x itself was not measured"
    found = over_methods(both, "mean_of_six")["lora"]
    assert (found.mean, found.low < 0, found.high > 0) == (pytest.approx(0, abs=1e-9), True, True)
    controlled = [(reached, told) for aim, reached, told in verdicts(made) if "kl+x" in aim]
    assert controlled == [(False, "above it 0 of 1; below it 0 of 1")]
    assert [told for aim, _, told in verdicts(made[:1] + made[2:3]) if "kl+x" in aim] == [
        "above it 1 of 1 (lora); below it 0 of 1"
    ]
    text = markdown(made, {})
    assert "## odedit+x minus kl+x" in text
    assert "## odedit+x minus x" not in text
    assert text.index("### Mean over all pairs") < text.index("### pocket-vqa on pocket-llava, 40 edits")
    assert "| lora | **+0.500" in text
    (row,) = [row for row in rows_of(made) if row["case"]["data"] == "pocket-vqa" and "minus_control" in row]
    assert row["minus_control"]["method"] == "kl+lora"


def test_unseen_wordings_stand_beside_seen_ones() -> None:
    made = outcome("lora", [1.0, 0.0])
    assert "unseen wording" not in markdown([made], {})
    for name, mean in (("text_generality_unseen", 0.25), ("sibling", 0.75)):
        made["scores"]["strict"][name] = {"mean": mean, "low": 0.0, "high": 1.0, "n": 2}
    lines = markdown([made], {}).splitlines()
    at = lines.index("| method | T-Gen | sibling |")
    assert lines[at + 2] == "| lora | 0.500 / 0.250 | 0.750 |"


def test_what_other_scripts_stored_stands_in_the_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tv_search, "stored_cells", list)
    monkeypatch.setattr(long_sequence, "RESULTS", tmp_path / "none.jsonl")
    assert quality.stored_sections() == []
    cell = {"setting": "kl", "pair": tv_search.PAIRS[0], "base": "lora", "edits": 2, "steps": [3, 4], "curves": {}}
    cell["model_fingerprint"] = "0" * 64
    cell["per_edit"] = {name: [1.0, 0.0] for name in tv_search.SIX}
    monkeypatch.setattr(tv_search, "stored_cells", lambda: [cell])
    case = {"method": "ldke", "edits": 10, "settings": {}, "label": "ldke"}
    row = {"case": case, "scores": {"10": {"strict": {"reliability": {"mean": 0.5, "low": 0.4, "high": 0.6}}}}}
    (tmp_path / "some.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.setattr(long_sequence, "RESULTS", tmp_path / "some.jsonl")
    text = markdown([outcome("lora", [1.0])], {}, (), quality.stored_sections())
    assert "lora, 2 edits of each train split" in text
    assert "| kl | 0.500 |" in text
    assert "| ldke | 10 | 0.500 |" in text
    model = tv_search.PAIRS[0].partition("/")[0]
    assert f"Cells of `{model}` are of the weights that shipped before" in text
    assert quality.of_other_weights([cell | {"model_fingerprint": fastedit.load(model).fingerprint}]) == []


def test_verdicts_are_of_the_worst_pair() -> None:
    made = [outcome("ldke", [1.0] * 20), outcome("ldke", [0.9] * 20, data="pocket-caption")]
    (aim, reached, told), *_ = verdicts(made)
    assert "every pair" in aim
    assert not reached
    assert "pocket-caption on pocket-llava: Rel 0.900" in told
    assert verdicts(made[:1])[0][1]
    unike = [outcome("unike", [right] * 4, data=data) for data, right in zip(DATA, (1.0, 0.5), strict=True)]
    unike += [outcome("tpatcher", [0.7] * 4, data=data) for data in DATA]
    (found,) = [(reached, told) for aim, reached, told in verdicts(unike) if aim.startswith("UniKE")]
    assert found == (
        False,
        "pocket-vqa on pocket-llava: 1.000 and 0.700; pocket-caption on pocket-llava: 0.500 and 0.700",
    )
