"""The search for a setting of the penalty: what a cell holds, what its table says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fastedit
from benchmarks import tv_search
from benchmarks.tv_search import (
    DATA,
    MODELS,
    PAIRS,
    SETTINGS,
    cells_of,
    control_of,
    mean_of_six,
    path_of,
    run_cell,
    table,
)
from fastedit.methods import resolve
from tests.engine.conftest import make_edits


def test_settings_stand_beside_a_control_with_the_same_data() -> None:
    assert len(PAIRS) == len(MODELS) * len(DATA)
    for name, (objective, settings) in SETTINGS.items():
        plan = resolve(f"{objective}+lora", dict(settings))
        control = SETTINGS[control_of(name)]
        beside = resolve(f"{control[0]}+lora", dict(control[1]))
        assert plan.build_objective(50).roles == beside.build_objective(50).roles, name
        if objective == "odedit":
            assert plan.config == beside.config, name
    assert {settings.get("dual") for _, settings in SETTINGS.values()} >= {
        "network", "network-detached", "scalar", "constant",
    }  # fmt: skip


def test_a_cell_tells_how_the_multiplier_went() -> None:
    model, edits = fastedit.load("random:llava-tiny"), make_edits(6)
    climbing = run_cell(model, edits[:3], edits[3:], "scalar .1", "lora")
    still = run_cell(model, edits[:3], edits[3:], "no TV", "lora")
    control = run_cell(model, edits[:3], edits[3:], "kl", "lora")
    decayed = run_cell(model, edits[:3], edits[3:], "kl, weight decay 4", "lora")
    assert (control["settings"]["weight_decay"], decayed["settings"]["weight_decay"]) == (0.0, 4.0)
    assert "weight_decay" not in run_cell(model, edits[:1], edits[3:], "kl", "wise")["settings"]
    assert climbing["curves"]["ratio"] > 1.5
    assert climbing["curves"]["first_share"] == pytest.approx(0.1, rel=1e-3)
    assert "ratio" not in still["curves"]
    assert control["curves"] == {}
    assert len(mean_of_six(climbing)) == 3
    assert climbing["steps"] != []
    assert climbing["cpu_s"] > 0
    json.dumps([climbing, still, control])


def test_the_table_has_differences_by_pair_and_over_all(tmp_path: Path) -> None:
    def cell(name: str, pair: str, right: list[float], *, curves: bool = True) -> None:
        values = dict.fromkeys(tv_search.SIX, right)
        named = {"setting": name, "pair": pair, "base": "lora", "edits": 20, "model_fingerprint": "m"}
        told = {"ratio": 2.0, "first_share": 0.1, "last_share": 0.25} if curves else {}
        text = json.dumps({**named, "per_edit": values, "steps": [9] * len(right), "curves": told})
        path_of(tmp_path, pair, "lora", 20, name).write_text(text)

    for pair, better in zip(PAIRS[:2], (1.0, 0.75), strict=True):
        cell("kl", pair, [0.5] * 20, curves=False)
        cell("scalar .1", pair, [better] * 20)
    head, rule, control, row = table(cells_of(tmp_path, "lora", 20))
    assert head.startswith(
        "| setting | mean of six | minus control | pocket-llava/pocket-vqa | pocket-blip2/pocket-vqa |"
    )
    assert control.startswith("| kl | 0.500 | +0.0000")
    assert row.startswith("| scalar .1 | 0.875 | **+0.3750 (+0.3750 to +0.3750)** | **+0.5000")
    assert "| 2.00 | 0.1 to 0.25 | 9.0 |" in row
    stored = tmp_path / "cells.jsonl.gz"
    for _ in range(2):
        tv_search.store(cells_of(tmp_path, "lora", 20), stored)
    assert table(tv_search.stored_cells(stored)) == [head, rule, control, row]
