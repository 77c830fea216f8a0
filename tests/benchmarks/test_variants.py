"""The engine run otherwise: what a name means, what is compared with what, and what its rows say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks import gate, harness, implementations, record, throughput
from benchmarks.cases import CASES, Case
from benchmarks.gate import GateError
from benchmarks.outcome import Fitted
from benchmarks.variants import as_run, is_variant, same_work
from fastedit.backbone import EditableModel, load
from fastedit.engine.profiling.flops import Peak
from fastedit.methods import LoRAConfig
from fastedit.requests import EditRequest


@pytest.fixture(autouse=True)
def quick_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine itself is not under test: half as fast in float32 as in bfloat16."""
    peaks = {"float32": 50.0, "bfloat16": 100.0}
    monkeypatch.setattr(harness, "measure_peak", lambda dtype, device: Peak(peaks[dtype], 10.0, dtype))


def test_names_say_what_is_changed(tiny: Case) -> None:
    case = replace(tiny, method="odedit+lora", options={"penalty": "paper", "rank": 2}, quantize="nf4")
    other = as_run(case, "engine:kl+lora/kl_rephrases=true")
    assert (other.method, other.options) == ("kl+lora", {"rank": 2, "kl_rephrases": True})
    exact = as_run(case, "engine@float64")
    assert (exact.dtype, exact.quantize, exact.method) == ("float64", "none", "odedit+lora")
    singles = as_run(replace(tiny, edits=9, batch_size=4), "engine/batch=1/edits=3")
    assert (singles.batch_size, singles.edits) == (1, 3)
    assert as_run(tiny, "engine/edits=99").edits == tiny.edits
    all_of_it = as_run(tiny, "engine:lora@bfloat16/steps=1/rank=3")
    assert (all_of_it.method, all_of_it.dtype, all_of_it.steps, all_of_it.options) == (
        "lora",
        "bfloat16",
        1,
        {"rank": 3},
    )
    for name in ("engine", "plain_loop", "peft"):
        assert as_run(tiny, name) is tiny
        assert not is_variant(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("engine@float8", "dtype is one of"),
        ("engine:lorra", "'lorra' is not known"),
        ("engine/batch=one", "batch is a number"),
        ("engine/batch=0", "batch_size is at least 1"),
        ("engine/ranks=2", "field 'ranks' is not known"),
    ],
)
def test_mistakes_in_names_are_named(tiny: Case, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_run(replace(tiny, method="lora"), name)


def test_only_other_work_escapes_the_gate(tiny: Case) -> None:
    assert same_work(tiny, "engine/batch=1/edits=1")
    assert same_work(tiny, "plain_loop")
    for name in ("engine:lora", "engine@float64", "engine/steps=1", "engine/lr=0.5"):
        assert not same_work(tiny, name)
    case = replace(tiny, baselines=("engine/batch=1", "engine:lora", "plain_loop"))
    assert gate.compared(case) == ["engine/batch=1", "plain_loop", "engine"]
    assert gate.compared(replace(tiny, baselines=("engine:lora",))) == []


def test_batches_that_do_not_equal_singles_are_refused(tiny: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def leaking(model: EditableModel, edits: Sequence[EditRequest], case: Case) -> Fitted:
        found = implementations.engine(model, edits, case)
        return replace(found, deltas=found.deltas[::-1])

    case = replace(tiny, baselines=("engine/batch=1",))
    assert gate.check_exact(case).reference == "engine/batch=1"
    monkeypatch.setattr(implementations, "IMPLEMENTATIONS", {"engine": leaking})
    # Reversed in both of a batch of two, in none of the singles: every edit alone is a run of its own below
    monkeypatch.setattr(implementations, "run", _each_alone(implementations.run))
    with pytest.raises(GateError, match="engine and engine/batch=1 do not fit the same delta"):
        gate.check_exact(case)


def _each_alone(run: Any) -> Any:
    def alone(name: str, model: EditableModel, edits: Sequence[EditRequest], case: Case) -> Fitted:
        if name == "engine":
            return run(name, model, edits, case)  # type: ignore[no-any-return]
        parts = [run(name, model, [edit], case) for edit in edits]
        return Fitted([d for p in parts for d in p.deltas], [o for p in parts for o in p.outcomes], {})

    return alone


def test_rows_of_variants_are_per_edit(tiny: Case) -> None:
    names = ("engine:kl+lora/kl_rephrases=true", "engine/batch=1/edits=2", "engine@bfloat16")
    case = replace(tiny, method="odedit+lora", edits=3, repeats=1, baselines=names)
    found = harness.run_case(case, with_memory=False)
    rows = {(row.implementation, row.metric): row for row in found.rows}
    for name, edits in (("engine", 3), (names[0], 3), (names[1], 2), (names[2], 3)):
        rate, total = rows[name, "edits_per_s"].value, rows[name, "run_s"].value
        assert rate * total == pytest.approx(edits)
        assert record.edits_of(rows[name, "run_s"]) == edits
        assert 0 <= rows[name, "token_accuracy"].value <= 1
    assert rows["engine", "edits_per_s"].baseline == names[0]
    # Fewer views, fewer edits: each is measured against its own necessary work and its own dtype's peak
    needed = rows["machine", "necessary_gflop"].value
    assert rows[names[1], "necessary_gflop"].value == pytest.approx(needed * 2 / 3, rel=0.1)
    assert rows[names[2], "matmul_peak_gflop_per_s"].value == 100.0
    low = rows[names[2], "necessary_gflop"].value / (100.0 * rows[names[2], "run_s"].value)
    assert rows[names[2], "nfu"].value == pytest.approx(low)


def test_both_models_of_a_dtype_variant_stay_loaded(tiny: Case) -> None:
    models = harness.Models(replace(tiny, dtype="bfloat16", baselines=("engine@float32", "engine/batch=1")))
    assert models.of("engine").dtype != models.of("engine@float32").dtype
    assert models.of("engine") is models.of("engine/batch=1") is models.of("plain_loop")


def test_parameters_are_counted_unpacked(tiny: Case) -> None:
    pytest.importorskip("bitsandbytes")
    plain, packed = load(tiny.model), load(tiny.model, quantize="nf4")
    stored = sum(p.numel() for p in packed.hf.parameters())
    assert stored < harness.count_parameters(plain) == harness.count_parameters(packed)


def test_sweeps_without_baselines_are_gated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gated: list[tuple[str, tuple[str, ...]]] = []
    check = gate.check_exact

    def seen(case: Case) -> gate.GateReport:
        gated.append((case.name, case.baselines))
        return check(case)

    monkeypatch.setattr(gate, "check_exact", seen)
    words = ["--quick", "--edits", "2", "--batch-size", "2", "--steps", "2", "--repeats", "1", "--no-memory"]
    sweeps = ["--baselines", "none", "--sweep", "method=odedit+ft,ft", "--sweep", "layers=1,2"]
    page = tmp_path / "page.html"
    words += [*sweeps, "--json", str(tmp_path / "rows.json"), "--html", str(page)]
    result = CliRunner().invoke(throughput.app, words)
    assert result.exit_code == 0, result.output
    assert [baselines for _, baselines in gated] == [(), ("plain_loop",), (), ()]
    rows = record.read(tmp_path / "rows.json")
    assert {row.implementation for row in rows} == {"engine", "machine"}
    assert [name.rpartition("/")[2] for name, _ in gated] == ["method=odedit+ft", "method=ft", "layers=1", "layers=2"]
    assert all(row.value > 0 for row in rows if row.metric == "parameters")
    assert "<svg" in page.read_text()


def test_named_comparisons_name_what_they_compare() -> None:
    assert CASES["odedit-lora-last2"].baselines[0] == "engine:kl+lora/kl_rephrases=true"
    same = as_run(CASES["odedit-lora-last2"], CASES["odedit-lora-last2"].baselines[0])
    alone = CASES["kl-lora-last2"]
    assert (same.method, same.options) == (alone.method, alone.options)
    assert as_run(CASES["lora-last2-fp32-of-nf4"], "engine@float32").quantize == "none"
    singles = as_run(CASES["pocket-lora-256"], CASES["pocket-lora-256"].baselines[0])
    assert (singles.batch_size, singles.edits) == (1, 32)


def test_after_image_case_is_sound() -> None:
    if "positions" not in {field.name for field in fields(LoRAConfig)}:
        pytest.skip("lora has no field 'positions'")
    assert CASES["lora-last2-after-image"].plan().name == "lora"
