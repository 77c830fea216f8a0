"""The simulation of many workers: against what can be said exactly, and what its page shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("simpy", reason="simpy is not installed")

from benchmarks import endurance, record, scaling
from benchmarks.scaling import Gpu, Parts

EQUAL = Parts([2.0], [0.1])


def test_workers_that_do_not_meet_add_up() -> None:
    # One worker: each shard and its commit in turn
    assert scaling.simulated(EQUAL, 10, 1) == pytest.approx(21.0)
    # Two begin together, so that the second waits for the first commit, once
    assert scaling.simulated(EQUAL, 10, 2) == pytest.approx(10.6)
    assert scaling.simulated(EQUAL, 10, 10) == pytest.approx(3.0)


def test_the_writer_is_where_it_stops() -> None:
    many = scaling.simulated(EQUAL, 400, 100)
    assert many == pytest.approx(2.0 + 400 * 0.1, rel=0.01)
    assert scaling.simulated(EQUAL, 400, 200) == pytest.approx(many, rel=0.01)
    assert scaling.on_paper(EQUAL, 100) == pytest.approx(10.0)
    assert scaling.on_paper(EQUAL, 2) == pytest.approx(2 / 2.1)
    assert scaling.simulated(EQUAL, 400, 100, segments=True) < 0.5 * many


def test_deaths_cost_what_they_should() -> None:
    parts = Parts([10.0], [0.0], start_s=5.0)
    plain, dying = (scaling.simulated(parts, 2000, 4, mtbf_s=mtbf) for mtbf in (None, 1000.0))
    assert dying / plain - 1 == pytest.approx(scaling.redone(10.0, 1000.0, 5.0), rel=0.35)


def test_seconds_of_an_edit_are_those_of_its_operations() -> None:
    shape = scaling.SHAPES[0]
    phases = shape.gpu_seconds(Gpu(flop_per_s=1e15, bytes_per_s=1e30, share=1.0))
    assert phases["prefix"] == pytest.approx(2 * 6.7e9 * 8 * 620 / 1e15)
    assert phases["read"] == pytest.approx(5 * phases["prefix"])
    slow = shape.gpu_seconds(Gpu(flop_per_s=1e30, bytes_per_s=1e12, share=1.0))
    assert slow["answers"] == pytest.approx(2 * 4 * 2 * 6.7e9 / 1e12 / 16)


def test_the_page_is_made_of_stored_rows() -> None:
    def row(workers: int, seconds: float) -> dict[str, Any]:
        return {
            "workers": workers, "seconds": seconds, "edits_per_s": 40 / seconds, "shards": 10, "shard_s": [2.0] * 10,
            "shard_edits": [4] * 10, "commit_s": [0.1] * 10, "bytes": [2048] * 10, "images_twice": 0.01,
        }  # fmt: skip

    common = {"model": "pocket-llava", "method": "lora", "machine": {"cpu": "a processor"}, "engine": "processes"}
    pair = {**common, "kind": "efficiency", "edits": 40, "rows": [row(1, 21.0), row(2, 11.0)], "speedup": 21 / 11}
    made = scaling.page([pair])
    assert "Two workers are 1.91 times as fast as one" in made
    # Both draw shards of 2 s: 10.6 s beside 11 s
    assert made.count("| 10.6 | 11.0 | -3.6 % |") == 2
    assert "One writer is enough for 21 such workers." in made
    assert made.startswith(scaling.BEGIN)
    assert made.endswith(scaling.END)


def test_firing_is_told_of_the_present_weights_in_order() -> None:
    def outcome(weights: str, *rows: tuple[int, bool, float]) -> dict[str, Any]:
        inside = dict.fromkeys(scaling.INSIDE, 0.9)
        told = [{"stored": n, "agreement": a, "asked": 5, "foreign": 7, **inside, "foreign_any": f} for n, a, f in rows]
        common = {"method": "ldke", "model": "pocket-llava", "agreement": {"false_rate": 0.02}}
        return {**common, "model_fingerprint": weights, "rows": told}

    made = scaling._of_firing(
        [
            outcome("a", (1, False, 0.5)),
            outcome("b", (9, False, 0.25), (10_000, False, 0.1), (10_000, True, 0.01)),
            outcome("b", (9, False, 0.125)),
        ]
    )
    rows = [line for line in made if line.startswith("| ") and "%" in line]
    same = "90.0 → 90.0 % | " * 4
    assert rows == [f"| 9 | 5 | {same}12.5 → 12.5 % |", f"| 10,000 | 5 | {same}10.0 → 1.0 % |"]
    assert "`false_rate=0.02`" in "\n".join(made)
    assert scaling._of_firing([]) == []


def test_costs_are_shown_by_way_of_searching() -> None:
    row = {"stored": 1000, "at_once": 1, "answer_s": 0.01, "read_s": 0.001, "whole_s": 0.004, "exact_s": 0.002}
    named = {"index_s": 0.001, "build_s": 3.0, "recall": 0.99, "fires": 0.98, "wrong": 0.0}
    common = {"method": "ldke", "model": "pocket-llava", "threads": 1, "machine": {"cpu": "X"}, "drawn": 10}
    made = scaling._of_costs(
        [
            {**common, "drawn": 5, "rows": [{**row, "stored": 7}]},
            {**common, "rows": [row, {**row, **named, "stored": 2000}]},
        ]
    )
    rows = [line for line in made if line.startswith("| ") and "," in line]
    assert rows == [
        "| 1,000 | 1 | 10.00 | 1.00 | 4.00 | 2.00 |  | 20 % |  |",
        "| 2,000 | 1 | 10.00 | 1.00 | 4.00 | 2.00 | 1.00 | 20 % | 10 % |",
        "| 2,000 | 3.0 | 99.0 % | 98.0 % | 0.0 % |",
    ]
    assert scaling._of_costs([]) == []


def test_a_long_run_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = endurance.Endured(20, 10.0, [2.0] * 10, [100.0] * 10, 110.0, 0.5, 30, 4.0, 512.0, 3.0, 0.975, 0.5)
    config = {"model": "pocket-llava", "method": "grace", "edits": 40, "seed": 0, "storage": "tmpfs", "batch_size": 4}
    path = tmp_path / "endurance.jsonl"
    monkeypatch.setattr(scaling, "ENDURANCE", path)
    assert scaling._of_endurance() == []
    record.append(endurance.rows_of(found, config), path)
    made = "\n".join(scaling._of_endurance())
    assert "20 of 40 edits of `pocket-llava` by `grace` in 10 s, batches of 4 on one thread" in made
    assert "512 bytes of deltas an edit" in made
    assert "97.5 % hold" in made
    assert made.count("| 2.0") == 10
