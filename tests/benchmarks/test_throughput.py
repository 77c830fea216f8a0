"""The command line, end to end on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks import cases, gate, harness, implementations, memory, record, throughput
from benchmarks.cases import CASES, Case
from benchmarks.plot import figures_of
from benchmarks.report import page
from fastedit.backbone import load
from fastedit.engine.profiling.flops import Peak

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--quick", "--edits", "2", "--batch-size", "2", "--steps", "3", "--repeats", "2"]


@pytest.fixture(autouse=True)
def quick_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine itself is not under test."""
    monkeypatch.setattr(harness, "measure_peak", lambda dtype, device: Peak(100.0, 10.0, dtype))


def run(*words: str) -> Any:
    return CliRunner().invoke(throughput.app, list(words))


def test_script_runs_from_anywhere_and_writes_valid_json(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "throughput.py"), *TINY, "--no-memory", "--json", "rows.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert "edits/s" in done.stdout
    data = json.loads((tmp_path / "rows.json").read_text())
    assert isinstance(data, list)
    rows = record.read(tmp_path / "rows.json")
    speeds = {row.implementation: row for row in rows if row.metric == "edits_per_s"}
    assert speeds.keys() == {"engine", "plain_loop"}
    assert speeds["engine"].baseline == "plain_loop"
    assert speeds["engine"].ratio == pytest.approx(speeds["engine"].value / speeds["plain_loop"].value)
    assert speeds["plain_loop"].ratio is None
    phases = {row.metric for row in rows if row.implementation == "engine" and row.metric.startswith("phase_")}
    assert {"phase_prefix_s", "phase_tail_forward_s", "phase_backward_s", "phase_optimiser_s"} <= phases
    for row in rows:
        assert row.config["model"] == "random:qwen2vl-tiny"
        assert row.machine["cpu"]
        assert row.versions["torch"]
    assert str(tmp_path) not in (tmp_path / "rows.json").read_text()
    assert {"speed", "phases"} <= set(figures_of(rows))
    assert "<svg" in page(rows, figures_of(rows))


def test_broken_engine_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = implementations.engine
    table = {
        **implementations.IMPLEMENTATIONS,
        "engine": lambda model, edits, case: replace(found := engine(model, edits, case), deltas=found.deltas[::-1]),
    }
    monkeypatch.setattr(implementations, "IMPLEMENTATIONS", table)
    result = run(*TINY, "--no-memory", "--json", str(tmp_path / "rows.json"))
    assert result.exit_code == throughput.DISAGREE
    assert "not timed" in result.stdout
    assert not (tmp_path / "rows.json").exists()


def test_record_appends_and_evaluation_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(gate, "EDITS", 1)
    words = ["--edits", "1", "--repeats", "1", "--no-memory", "--evaluate", "--method", "lora", "--record"]
    result = run(*TINY, *words)
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.glob("*.jsonl.gz")
    rows = {(row.implementation, row.metric): row for row in record.read(path)}
    assert rows["engine", "phase_evaluation_s"].value > 0
    assert rows["plain_loop", "phase_evaluation_s"].value > rows["engine", "phase_evaluation_s"].value
    total = rows["plain_loop", "run_s"].value
    parts = sum(r.value for (n, m), r in rows.items() if n == "plain_loop" and m.startswith("phase_"))
    # Phases cover the run and do not overlap.
    assert 0.8 * total < parts <= total
    # NFU leaves evaluation out.
    spent = total - rows["plain_loop", "phase_evaluation_s"].value
    necessary = rows["machine", "necessary_gflop"].value
    assert rows["plain_loop", "nfu"].value == pytest.approx(necessary / (spent * 100.0))


def test_objectives_without_a_baseline_run_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    result = run(*TINY, "--repeats", "1", "--no-memory", "--method", "odedit+lora", "--json", str(path))
    assert result.exit_code == 0, result.output
    rows = record.read(path)
    assert {row.implementation for row in rows} == {"engine", "machine"}
    assert all(row.ratio is None for row in rows)
    plain = run(*TINY, "--repeats", "1", "--no-memory", "--method", "lora", "--json", str(path))
    assert plain.exit_code == 0
    by_case = {row.case: row.value for row in [*rows, *record.read(path)] if row.metric == "necessary_gflop"}
    odedit, lora = (v for v in by_case.values())
    # Locality and rephrased views are rows of their own, and need a reference besides.
    assert odedit > 2 * lora


def test_profile_names_operators_and_writes_traces(tmp_path: Path) -> None:
    words = [*TINY, "--repeats", "1", "--no-memory", "--profile", "--profile-dir", str(tmp_path)]
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert "aten::" in result.stdout
    traces = sorted(path.name for path in tmp_path.glob("trace-*.json"))
    assert len(traces) == 2
    assert json.loads((tmp_path / traces[0]).read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--case", "none"], "case is one of default"),
        (["--baselines", "other"], "baselines are plain_loop, peft"),
        (["--quick", "--baselines", "peft"], "peft cannot fit this method"),
        (["--quick", "--method", "kl+ft", "--baselines", "plain_loop"], "plain_loop cannot fit this method"),
        (["--quick", "--method", "lorra"], "'lorra' is not known"),
        (["--quick", "--dtype", "float8"], "dtype is one of"),
        (["--quick", "--sweep", "colour=1"], "field is one of"),
        (["--quick", "--model", "random:none"], "random shape must be one of"),
    ],
)
def test_mistakes_are_named(words: list[str], message: str) -> None:
    result = run(*words)
    assert result.exit_code == throughput.WRONG
    assert message in " ".join(result.stdout.split())


def test_compare_finds_a_regression(tmp_path: Path) -> None:
    def rows(commit: str, speed: float, day: int) -> list[record.Row]:
        shared: dict[str, Any] = {"config": {}, "machine": {}, "versions": {}, "commit": commit, "seed": 0}
        shared["time"] = f"2026-01-0{day}T00:00:00+00:00"
        base = record.Row("c", "plain_loop", "edits_per_s", "edits/s", 1.0, 1.0, 1.0, None, None, **shared)
        engine = record.Row("c", "engine", "edits_per_s", "edits/s", speed, speed, speed, "plain_loop", speed, **shared)
        return [base, engine]

    path = tmp_path / "rows.jsonl"
    record.append(rows("aaaa1", 8.0, 1), path)
    assert run("compare", "--base", "aaaa", "--results", str(path)).exit_code == throughput.WRONG
    record.append(rows("bbbb2", 7.5, 2), path)
    assert run("compare", "--base", "aaaa", "--results", str(path)).exit_code == 0
    # A ratio to something else says nothing about this one
    shared: dict[str, Any] = {"config": {}, "machine": {}, "versions": {}, "commit": "bbbb2", "seed": 0}
    shared["time"] = "2026-01-02T12:00:00+00:00"
    other = record.Row("c", "engine:lora", "edits_per_s", "edits/s", 9.0, 9.0, 9.0, None, None, **shared)
    slower = record.Row("c", "engine", "edits_per_s", "edits/s", 3.0, 3.0, 3.0, "engine:lora", 3 / 9, **shared)
    record.append([other, slower], path)
    assert run("compare", "--base", "aaaa", "--results", str(path)).exit_code == 0
    record.append(rows("cccc3", 5.0, 3), path)
    result = run("compare", "--base", "aaaa", "--results", str(path))
    assert result.exit_code == throughput.SLOWER
    assert "-37.5%" in result.stdout


def test_memory_is_of_a_process_of_its_own(tiny: Case) -> None:
    hoard = bytearray(600 << 20)
    found = memory.measure(tiny, "engine")
    assert 100 < found.peak_mib < 1200
    assert 0 < found.working_mib < found.peak_mib
    assert len(hoard) == 600 << 20
    with pytest.raises(RuntimeError, match="memory: engine ended with 1"):
        memory.measure(replace(tiny, model="random:none"), "engine")


def test_timed_runs_start_with_nothing_but_the_model(tiny: Case) -> None:
    model, edits = load(tiny.model), cases.edits_of(tiny)
    towers: list[int] = []
    handle = model.hf.model.visual.register_forward_hook(lambda *_: towers.append(1))
    try:
        timed = harness.Timed()
        for _ in range(2):
            harness._run_once(model, edits, replace(tiny, evaluate=True), "engine", timed)
    finally:
        handle.remove()
    # As many runs of the vision tower the second time as the first
    assert len(towers) > 0
    assert len(towers) % 2 == 0
    assert len(timed.seconds) == len(timed.phases) == 2
    implementations.forget(model)
    assert not model.reference_answers


def test_cases_are_sound_and_made_up_edits_repeat() -> None:
    for case in CASES.values():
        if "positions" in (case.options or {}):
            # In test_variants, where a method without this field is a skip
            continue
        assert case.plan().name == case.method
        json.dumps(case.config)
    a, b = cases.made_up_edits(3, seed=5), cases.made_up_edits(3, seed=5)
    assert [(e.prompt, e.target, e.id) for e in a] == [(e.prompt, e.target, e.id) for e in b]
    assert a[0].image.tobytes() == b[0].image.tobytes()  # type: ignore[union-attr]
    assert len({e.image.tobytes() for e in a}) == 3  # type: ignore[union-attr]
    assert [e.prompt for e in cases.made_up_edits(3, seed=6)] != [e.prompt for e in a]
    assert all(len(e.prompt.split()) >= 30 for e in cases.made_up_edits(3, words=30))


def test_cases_of_one_layer_name_it() -> None:
    wise, lora = CASES["wise-layer8"], CASES["lora-qv"]
    assert (wise.where, lora.where) == ("layer 8", "last 12 layers")
    assert wise.plan().config.layer == wise.overrides["layer"] == 8
    assert "layers" not in wise.overrides
    assert cases.one_batch(CASES["wise-layer8-singles"]) == 2, "its locality views are drawn from another edit"
    assert cases.one_batch(CASES["grace-layer8-singles"]) == 1


def test_sweeps_name_their_values() -> None:
    made = cases.sweep(CASES["quick"], "batch_size", ["1", "8"])
    assert [case.name for case in made] == ["quick/batch_size=1", "quick/batch_size=8"]
    assert [(case.batch_size, case.edits) for case in made] == [(1, 4), (8, 8)]
    assert cases.sweep(CASES["default"], "model", ["random:llava-1.5-7b"])[0].gate_model == "random:llava-tiny"


@pytest.mark.parametrize("script", ["throughput", "plot", "memory", "kernels"])
def test_scripts_shadow_nothing(script: str, tmp_path: Path) -> None:
    # As Python starts a script: its folder first on the path, where kernels.py lies.
    code = (
        "import sys, runpy, importlib.util\n"
        f"sys.path[0] = {str(ROOT / 'benchmarks')!r}\n"
        "sys.argv = ['x', '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / 'benchmarks' / (script + '.py'))!r}, run_name='__main__')\n"
        "except (SystemExit, IndexError):\n"
        "    pass\n"
        "import benchmarks.record\n"
        "spec = importlib.util.find_spec('kernels')\n"
        "print(spec and list(spec.submodule_search_locations or [spec.origin]))\n"
    )
    # From another folder: what lies in the working folder is not the script's doing.
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert str(ROOT) not in done.stdout.splitlines()[-1]
