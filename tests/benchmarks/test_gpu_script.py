"""The script for a machine with a GPU: its lines run here in small, and the parts that it stands on."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import kernel_timing, kernels, record, roofline, serving, summary
from benchmarks.kernel_cases import low_rank
from fastedit import ops
from fastedit.engine.profiling import utilisation
from fastedit.engine.profiling.flops import Peak

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
PEAK = Peak(2e3, 4.0, "float32")
interpreted = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton is absent or does not interpret",
)


def rehearse(out, *stages, **environment):
    """Run stages of the script in small; return its exit status and what it printed."""
    own = {"FASTEDIT_GPU_REHEARSAL": "1", "OUT": str(out), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FASTEDIT_")}
    done = subprocess.run(
        [str(SCRIPT), *stages], env={**inherited, **own, **environment}, capture_output=True, text=True, timeout=600
    )
    return done.returncode, done.stdout + done.stderr


def test_the_script_parses():
    assert os.access(SCRIPT, os.X_OK)
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


@pytest.mark.slow
def test_a_rehearsal_ends_in_a_table_with_every_op(tmp_path):
    status, told = rehearse(tmp_path, "kernels", "table")
    assert status == 0, told + (tmp_path / "gpu-kernels.log").read_text()
    table = told.splitlines()
    assert len(table) < 60
    for stem in kernels.stems():
        names = [case["name"] for case in kernels.cases_of(stem, "cpu", 0.01)]
        for name in (name.partition("@")[0] for name in names):
            (line,) = (line for line in table if line.startswith(name + "@"))
            assert f" {serving.server(stem, 'cpu')} " in line
    assert any(line.startswith("gpu.sh: kernels: ok") for line in table)
    # rows of such sizes are in the folder that was named, and nowhere else
    (rows,) = tmp_path.glob("*.jsonl.gz")
    assert all("@" in row.case for row in record.read(rows))


def test_a_failure_is_named_and_does_not_stop_the_next_stage(tmp_path):
    status, told = rehearse(tmp_path, "kernels", "table", FASTEDIT_GPU_OPS="softmax")
    assert status == 1
    assert "gpu.sh: kernels: FAILED (softmax)" in told
    assert "gpu.sh: table: ok" in told


def test_unknown_stages_are_refused(tmp_path):
    status, told = rehearse(tmp_path, "kernel")
    assert status == 2
    assert "stages are build test kernels models table (got kernel)" in told


def test_a_machine_without_a_gpu_is_refused_unless_rehearsed(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    status, told = rehearse(tmp_path, "table", FASTEDIT_GPU_REHEARSAL="")
    assert status == 2
    assert "no CUDA device" in told


@interpreted
def test_triton_serves_inside_the_block_and_nowhere_else(monkeypatch):
    case = low_rank.make_case("low_rank", (3, 5), 12, 2, 9)
    module = importlib.import_module("fastedit.kernels.low_rank")
    calls = []
    for name in ("low_rank", "low_rank_backward"):
        own = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, own=own, name=name: (calls.append(name), own(*a))[1])
    assert serving.others("low_rank", "cpu") == ["triton"]
    before = case["run"]()
    assert calls == []
    with serving.served_by_triton("low_rank", "cpu"):
        inside = case["run"]()
    assert calls == ["low_rank", "low_rank_backward"]
    after = case["run"]()
    assert calls == ["low_rank", "low_rank_backward"]
    for one, other, third in zip(before, inside, after, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
        assert torch.equal(one, third)


def test_nobody_else_serves_without_an_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert serving.others("low_rank", "cpu") == []


def test_a_wrong_second_implementation_is_not_timed(monkeypatch):
    case = next(iter(kernels.cases_of("low_rank", "cpu", 0.01)))
    own = ops.low_rank
    right = []

    def wrong_inside(*arguments):
        # the first call is the op itself, the second what else serves it
        right.append(1)
        return own(*arguments) * (1.0 if len(right) == 1 else 1.01)

    monkeypatch.setattr(ops, "low_rank", wrong_inside)
    monkeypatch.setattr(serving, "others", lambda stem, device: ["triton"])
    monkeypatch.setattr(serving, "served_by_triton", lambda stem, device: kernels.nullcontext())
    with pytest.raises(AssertionError, match="triton: result 0: error"):
        kernels.measure("low_rank", case, "cpu", kernel_timing.Clock(), None, (0.0, 1, False))


def test_a_baseline_that_cannot_run_is_left_out_and_counts(monkeypatch, capsys):
    def too_large():
        raise RuntimeError("out of memory\nand more")

    case = next(iter(kernels.cases_of("low_rank", "cpu", 0.01)))
    case["baselines"]["loop"] = too_large
    case["check"] = lambda: None
    monkeypatch.setattr(kernels, "cases_of", lambda *_: [case])
    rows, status = kernels.measure_all(["low_rank"], "cpu", 0.01, (0.0, 1, False))
    assert status == kernels.WRONG
    assert {row.implementation for row in rows} >= {"fastedit", "bmm"}
    assert "loop" not in {row.implementation for row in rows}
    assert "loop is left out: RuntimeError: out of memory" in " ".join(capsys.readouterr().out.split())


def test_a_wrong_result_leaves_the_other_cases(monkeypatch, capsys):
    wrong, right = (dict(next(iter(kernels.cases_of("low_rank", "cpu", 0.01)))) for _ in range(2))

    def fails():
        raise AssertionError("result 0: error 1 exceeds 0")

    wrong |= {"check": fails, "name": "wrong"}
    monkeypatch.setattr(kernels, "cases_of", lambda *_: [wrong, right])
    rows, status = kernels.measure_all(["low_rank"], "cpu", 0.01, (0.0, 1, False))
    assert status == kernels.DISAGREE
    assert {row.case for row in rows} == {right["name"]}
    assert "wrong: not timed, the result is wrong" in capsys.readouterr().out


def test_fractions_are_of_the_machine():
    # 8 GiB in two seconds of a machine that copies 4 GiB/s; 1 GFLOP at 2,000 GFLOP/s
    found = kernels.fractions({"bytes": 8 * 2**30, "flops": 10**9}, PEAK, 2.0)
    assert found == {"copy_fraction": 1.0, "matmul_fraction": pytest.approx(1 / 4000)}


@pytest.mark.parametrize("stem", kernels.stems())
def test_cases_say_what_cannot_be_done_without(stem):
    for case in kernels.cases_of(stem, "cpu", 0.01):
        assert case["name"].endswith("@0.01")
        assert case.get("bytes", 0) + case.get("flops", 0) > 0
    full = kernels.cases_of(stem, "cpu", 1.0)
    # sizes are the GPU's until they are scaled; nothing is drawn before the first call
    assert all("@" not in case["name"] for case in full)


def test_bytes_are_those_of_the_tensors():
    case = low_rank.make_case("low_rank", (3, 5), 12, 2, 9)
    x, down, up, _, grad = case["inputs"]()
    outputs = case["run"]()
    assert case["bytes"] == sum(t.numel() * t.element_size() for t in (x, down, up, grad, *outputs))


def test_rows_name_device_and_server(monkeypatch):
    monkeypatch.setattr(record, "driver_version", lambda: "1.2.3")
    case = next(iter(kernels.cases_of("low_rank", "cpu", 0.01)))
    rows = kernels.rows_of(case, "low_rank", {"fastedit": [0.5], "loop": [1.0]}, {}, "cpu", PEAK)
    assert all(row.config["device"] == "cpu" for row in rows)
    assert rows[0].config["served_by"] == serving.server("low_rank", "cpu")
    found = {(row.implementation, row.metric): row.value for row in rows}
    assert found["fastedit", "copy_fraction"] == 2 * found["loop", "copy_fraction"] > 0
    assert found["machine", "copy_bandwidth_gib_per_s"] == 4.0
    cells = summary.kernel_line(rows).split()
    assert cells[1:3] == [serving.server("low_rank", "cpu"), "500.000"]
    assert cells[-2:] == ["loop", "2.00"]


def test_the_larger_share_is_named():
    case = {**next(iter(kernels.cases_of("low_rank", "cpu", 0.01))), "bytes": 2**30, "flops": 10**12}
    rows = kernels.rows_of(case, "low_rank", {"fastedit": [1.0]}, {}, "cpu", PEAK)
    # a quarter of the copies, half of the products
    assert kernels.floor_text(rows, "fastedit") == "50% matmul"
    assert kernels.floor_text(rows, "nobody") == ""


def test_rows_of_the_cpu_do_not_name_a_gpu(monkeypatch):
    from fastedit.engine import provenance

    monkeypatch.setattr(provenance, "machine", lambda: {"cpu": "A CPU", "threads": 2, "gpu": "A GPU"})
    assert record.machine("cpu") == {"cpu": "A CPU", "threads": 2}


def test_a_copy_of_the_tree_is_told_its_commit(monkeypatch):
    monkeypatch.setenv("FASTEDIT_COMMIT", "abc")
    assert record.commit_with_changes("") == "abc"


def test_rehearsed_peaks_keep_to_themselves(monkeypatch):
    monkeypatch.setattr(utilisation, "SIDES", {"cpu": (128,)})
    peaks = [roofline.measure_peak(dtype, seconds=0.01, scale=0.01) for dtype in ("float32", "bfloat16")]
    rows = roofline.rows_of(peaks, "cpu", 0.01)
    assert {row.case for row in rows} == {"machine_float32@0.01", "machine_bfloat16@0.01"}
    assert record.check(rows) == rows


def test_precision_is_put_back():
    assert torch.get_float32_matmul_precision() == "highest"
    with utilisation._precision("high"):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == "highest"
