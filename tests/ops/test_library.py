"""How an op finds its kernels: who serves CUDA tensors where the compiled library and Triton both can."""

import importlib.util
import itertools
import os
import subprocess
import sys

import pytest
import torch

from fastedit.ops import _library

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

_NUMBERS = itertools.count()


def _compiled_op(monkeypatch, compiled, preferred):
    """Define an op of its own name, with a kernel for CUDA as the compiled library would register it."""
    monkeypatch.setattr(_library, "_TRITON", {})
    monkeypatch.setattr(_library, "_PREFERRED", preferred)
    name = f"served_{next(_NUMBERS)}"
    _library.define(name, "(Tensor x) -> Tensor", lambda x: x + 1, torch.empty_like)
    library = torch.library.Library("fastedit", "FRAGMENT")
    if compiled:
        library.impl(name, lambda x: x + 2, "CUDA")
    try:
        _library.serve_with_triton(name, "low_rank")
    except RuntimeError as error:
        skip_where_python_replaces_no_python(str(error))
        raise
    return name, library


def skip_where_python_replaces_no_python(told: str) -> None:
    """The compiled library's kernels, which Python's stand for here, torch 2.11 lets be replaced."""
    if "already a kernel registered from python" in told:
        pytest.skip("this torch lets no kernel of Python take the place of another of Python")


@pytest.mark.parametrize(
    ("compiled", "preferred", "server"),
    [(True, "csrc", "csrc"), (True, "triton", "triton"), (False, "csrc", "triton"), (False, "triton", "triton")],
)
@pytest.mark.filterwarnings("error")
def test_one_kernel_serves(monkeypatch, compiled, preferred, server):
    name, library = _compiled_op(monkeypatch, compiled, preferred)
    assert _library.implementations() == {name: {"cpu": "reference", "cuda": server}}
    del library


# registers a kernel for CUDA before the ops are imported, as the compiled library does
PROGRAM = """
import torch
library = torch.library.Library("fastedit", "FRAGMENT")
library.impl("low_rank", lambda *arguments: None, "CUDA")
from fastedit import ops
print(ops.implementations()["low_rank"]["cuda"])
"""


@pytest.mark.parametrize(("chosen", "served"), [("csrc", "csrc"), ("triton", "triton"), ("cuda", "")])
def test_the_choice_is_read_at_the_import(chosen, served):
    environment = {**os.environ, "FASTEDIT_CUDA": chosen}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    skip_where_python_replaces_no_python(done.stderr)
    assert done.stdout.strip() == served, done.stderr
    if not served:
        assert "ValueError: FASTEDIT_CUDA is csrc or triton (got FASTEDIT_CUDA=cuda)" in done.stderr


def test_what_a_block_has_no_room_for_is_served_by_the_reference():
    from triton.runtime.errors import OutOfResources

    def kernel(*_):
        raise OutOfResources(300_000, 232_448, "shared memory")

    x = torch.randn(3, 8)
    down, up, offsets = torch.randn(1, 8, 2), torch.randn(1, 2, 5), torch.tensor([0, 3])
    with pytest.warns(RuntimeWarning, match=r"low_rank: a block .* too large for this GPU; .*Required: 300000"):
        found = _library.launched("low_rank", kernel, x, down, up, offsets)
    torch.testing.assert_close(found, x @ down[0] @ up[0])
    # Halfway done it cannot be begun again
    with pytest.raises(
        RuntimeError, match=r"adam_step_: a block of the Triton kernel fits the GPU \(got out of resource"
    ):
        _library.launched("adam_step_", kernel)

    def broken(*_):
        raise ValueError("something else")

    with pytest.raises(ValueError, match="something else"):
        _library.launched("low_rank", broken, x)
    assert _library.launched("low_rank", lambda *given: len(given), x, down) == 2
