"""Every Triton kernel compiles for sm_80 and sm_90, which needs no GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import compiled_form as forms

ROOT = Path(__file__).resolve().parents[2]
KERNELS = sorted(path.stem for path in (ROOT / "kernels").glob("*.py") if not path.stem.startswith("_"))

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

# In a process of its own, where Triton does not interpret. Prints kernel name -> size of the machine code.
COMPILE = """
import importlib, json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
module = importlib.import_module("fastedit.kernels." + sys.argv[1])
sizes = {}
for target, dtype in (pair.split(":") for pair in sys.argv[2].split(",")):
    for kernel, signature, constants in module.ahead_of_time(dtype):
        source = ASTSource(kernel, signature, constexprs=constants)
        done = triton.compile(source, target=GPUTarget("cuda", int(target), 32))
        sizes[f"{kernel.__name__}:{target}:{dtype}"] = len(done.asm["cubin"])
print(json.dumps(sizes))
"""


def _launched(stem):
    """Return the kernels that a module launches: launches are written name[grid](...)."""
    source = (ROOT / "kernels" / f"{stem}.py").read_text(encoding="utf-8")
    return {line.strip().split("[")[0] for line in source.splitlines() if "_kernel[" in line}


@pytest.mark.slow
@pytest.mark.parametrize("stem", sorted(set(KERNELS) & set(forms.stems())))
def test_launches_compile_for_both_targets(stem, compiled_form):
    rows, _ = compiled_form(stem)
    pairs = {}
    for row in rows:
        pairs.setdefault(row["kernel"], set()).add((row["target"], row["dtypes"].split("/")[0]))
    # a kernel that is launched must be in the list, in both dtypes that the engine passes
    assert _launched(stem) <= set(pairs)
    for kernel, compiled in pairs.items():
        assert compiled >= {(80, "bf16"), (90, "bf16"), (90, "fp32")}, kernel


@pytest.mark.parametrize("stem", sorted(set(KERNELS) - set(forms.stems())))
def test_compiles_for_both_targets(stem):
    pairs = "80:bf16,90:bf16,90:fp32"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, stem, pairs], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    sizes = json.loads(done.stdout.splitlines()[-1])
    names = {name.split(":")[0] for name in sizes}
    # a kernel that is launched must be in the list
    assert _launched(stem) <= names
    assert len(sizes) == 3 * len(names)
    assert min(sizes.values()) > 0
