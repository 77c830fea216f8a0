"""Kernels compiled without a GPU, each once a session, for the tests that look at their machine code."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def compiled_form():
    """Return a function of an op's name: its kernels' forms and, in sentences, what is not as it must be."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    results = {}

    def compiled(stem):
        if stem not in results:
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
            results[stem] = rows, done.stderr.splitlines() if done.returncode else []
        return results[stem]

    return compiled
