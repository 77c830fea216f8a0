"""The op workspace: memory of dropped buffers serves later ones, and never two at once."""

import ctypes
import os
import subprocess
import sys

import pytest
import torch

from fastedit import _native, ops
from fastedit.testing import providers

SHAPES = ((3, 5), (0,), (0, 7), (), (1, 1), (1000, 3001))


@pytest.mark.parametrize("provider", providers("workspace"), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64], ids=str)
def test_shape_dtype_and_layout(provider, dtype, available):
    available(provider)
    # of the model only dtype and device are taken
    like = torch.zeros(4, 6, dtype=dtype, device=provider.device).T
    for shape in SHAPES:
        made = provider.function()(like, list(shape))
        assert made.shape == shape
        assert made.dtype == dtype
        assert made.device == like.device
        assert made.is_contiguous()
        assert made.fill_(1).sum() == made.numel()


def test_two_living_buffers_are_apart():
    like = torch.zeros(0)
    first, second = ops.workspace(like, (2000, 1500)).fill_(1), ops.workspace(like, (2000, 1500)).fill_(2)
    assert bool((first == 1).all())
    assert bool((second == 2).all())


def test_fake_tensors_have_the_same_shape():
    torch.library.opcheck(
        torch.ops.fastedit.workspace.default,
        (torch.zeros(2), [3, 4]),
        # contents are undefined: only schema and shapes can be checked
        test_utils=("test_schema", "test_faketensor"),
    )


def test_negative_sizes_are_refused():
    with pytest.raises(ValueError, match=r"workspace: sizes are not negative \(got size=\(2, -1\)\)"):
        ops.workspace(torch.zeros(0), (2, -1))


def test_release_returns_bytes():
    ops.release_workspaces()
    buffer = ops.workspace(torch.zeros(0), (4 << 20,))
    del buffer
    served = ops.implementations()["workspace"]["cpu"]
    assert ops.release_workspaces() == (16 << 20 if served == "csrc" else 0)


# Page faults of fifty more allocations of so many MiB, all touched, once a few have been freed; then the resident MiB
# that giving back what is kept saves
FAULTS = """
import resource, sys, torch
from fastedit import ops
torch.set_num_threads(1)
kept = ops.keep_freed_memory()
def touch():
    parts = [torch.empty(int(sys.argv[1]) << 18).fill_(1) for _ in range(3)]
for _ in range(5):
    touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    touch()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def resident():
    return int(open("/proc/self/statm").read().split()[1]) // 256
held = resident()
ops.release_workspaces()
print(kept, faults, held - resident())
"""


def faults(malloc: str, size_mib: int) -> tuple[str, int, int]:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, str(size_mib)],
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
        env={**os.environ, "FASTEDIT_MALLOC": malloc},
    )
    kept, count, given_back = done.stdout.split()
    return kept, int(count), int(given_back)


needs_glibc = pytest.mark.skipif(
    _native.LIBRARY is None or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"),
    reason="needs the compiled library and glibc",
)


@needs_glibc
@pytest.mark.parametrize("size_mib", [8, 40])
def test_freed_memory_is_kept_and_given_back_when_asked(size_mib):
    kept, count, given_back = faults("", size_mib)
    assert kept == "True"
    # thousands of pages would be touched anew each of the fifty times
    assert count < 100
    assert given_back >= 2 * size_mib


@needs_glibc
def test_the_variable_leaves_the_c_library_alone():
    # over 32 MiB glibc takes every block from the system, whatever lies on its heap
    kept, count, _ = faults("system", 40)
    assert kept == "False"
    # on huge pages 20 a block
    assert count > 2000


def test_refused_limits_and_variables(monkeypatch):
    with pytest.raises(ValueError, match=r"keep_freed_memory: limit_bytes is positive \(got limit_bytes=0\)"):
        ops.keep_freed_memory(0)
    monkeypatch.setenv("FASTEDIT_MALLOC", "jemalloc")
    with pytest.raises(ValueError, match=r"FASTEDIT_MALLOC is keep or system \(got FASTEDIT_MALLOC='?jemalloc"):
        ops.keep_freed_memory()


def test_without_a_compiled_library_nothing_is_kept(monkeypatch):
    monkeypatch.setattr(_native, "LIBRARY", None)
    assert ops.keep_freed_memory() is False
