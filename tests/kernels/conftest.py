"""Kernels compiled without a GPU, each once a run, for the tests that look at their machine code."""

import fcntl
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def compiled_form(tmp_path_factory):
    """Return a function of an op's name: its kernels' forms and, in sentences, what is not as it must be."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    # of pytest-xdist the workers' folders lie beside each other, in that of their run
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def compiled(stem):
        with (shared / f"compiled_{stem}.json").open("a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            known = file.read()
            if known:
                return json.loads(known)
            # a process of its own, where Triton does not interpret; of this tree, whichever is installed
            environment = {
                **os.environ,
                "TRITON_INTERPRET": "0",
                "TRITON_DEFAULT_FP_FUSION": "1",
                "PYTHONPATH": str(ROOT),
            }
            command = [sys.executable, "benchmarks/compiled_form.py", stem, "--json"]
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
            rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
            assert rows, done.stderr[-3000:]
            result = rows, done.stderr.splitlines() if done.returncode else []
            json.dump(result, file)
            return result

    return compiled
