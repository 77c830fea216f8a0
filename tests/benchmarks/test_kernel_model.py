"""benchmarks/kernel_model.py: the page says what its script makes, and the arithmetic of a launch holds."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from benchmarks import kernel_model as model
from benchmarks import summary
from benchmarks.record import Row

LAUNCH = model.Launch("_kernel", 132 * 8, 8, 1024, 32, 16, 4, "")


def test_the_page_has_every_case():
    lines = model.PAGE.read_text(encoding="utf-8").splitlines()
    for cells in model.floors():
        assert sum(line.startswith(cells) for line in lines) == 1, cells


def test_the_page_is_what_the_script_makes():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if f"Triton {model._triton()}," not in model.PAGE.read_text(encoding="utf-8"):
        pytest.skip("another Triton compiled the page")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "benchmarks/kernel_model.py", "--check"]
    done = subprocess.run(command, cwd=model.PAGE.parents[1], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("changes", "resident"),
    [
        ({}, 8),
        # registers by 8 a thread, shared memory with 1 KiB a program, warps, programs
        ({"registers": 33}, 6),
        ({"shared": 98304}, 2),
        ({"warps": 16}, 4),
        ({"warps": 1, "shared": 0}, 32),
    ],
    ids=str,
)
def test_programs_that_share_a_multiprocessor(changes, resident):
    assert replace(LAUNCH, **changes).resident == resident


def test_rounds_of_programs():
    assert LAUNCH.fill == 1.0
    assert replace(LAUNCH, programs=132 * 12).fill == 0.75
    assert replace(LAUNCH, programs=66).fill == 66 / (132 * 8)


def test_seconds_of_a_launch():
    assert LAUNCH.seconds(0.0, 0.0) == model.LAUNCH
    # a full machine copies at its rate; half of one program a multiprocessor has too little on its way
    assert LAUNCH.seconds(4.3e9, 0.0) == pytest.approx(model.LAUNCH + 1e-3)
    assert replace(LAUNCH, programs=66).seconds(4.3e9, 0.0) == pytest.approx(
        model.LAUNCH + 4.3e9 * model.LATENCY / (66 * 8 * 32 * 16 * 4)
    )
    fast = replace(LAUNCH, product="wgmma")
    assert fast.seconds(0.0, 790e9) == pytest.approx(model.LAUNCH + 1e-3 / 0.7)
    assert replace(fast, programs=66).seconds(0.0, 790e9) == pytest.approx(model.LAUNCH + 2e-3 / 0.7)


def test_the_summary_prints_predictions_beside_measurements():
    floor, likely = model.predictions()["mmd2_bf16"]
    assert 0.0 < floor < likely
    assert all(longer is not None and shortest < longer for shortest, longer in model.predictions().values())
    shared = ({}, {}, "0000000", 0, "2026-01-31T12:00:00+00:00")
    row = Row("mmd2_bf16", "fastedit", "run_s", "s", 2e-3, 2e-3, 2e-3, None, None, {}, *shared)
    assert f"floor {floor * 1e3:.3f} likely {likely * 1e3:.3f} |" in summary.kernel_line([row])
    assert "floor" not in summary.kernel_line([replace(row, case="mmd2_bf16@0.01")])
