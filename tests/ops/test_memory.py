"""What the compiled ops hold at their peak beyond their inputs, each in a fresh process; and a size that needs it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastedit import ops
from fastedit.testing import nearest_keys_inputs, providers, tolerance

MIB = 2**20
KINDS = ("ce", "forward_kl", "reverse_kl")

# VmHWM, not ru_maxrss: a child's ru_maxrss starts at the peak of the process that made it.
_MEASURE = """
import ctypes, gc
from pathlib import Path
import torch
torch.set_num_threads(1)

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))

def extra(call):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    kept = call()
    return status("VmHWM") - before
"""


def _extra_bytes(code):
    """Run code that ends in an expression for the KiB; return bytes."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the system does not tell a process its peak memory")
    *lines, last = code.strip().splitlines()
    script = "\n".join([_MEASURE, *lines, f"print({last})"])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return 1024 * int(done.stdout)


def _needs_compiled(op):
    if ops.implementations()[op]["cpu"] != "csrc":
        pytest.skip(f"the compiled library does not serve {op}")


def test_the_measure_sees_a_temporary():
    assert 40 * MIB <= _extra_bytes("extra(lambda: torch.ones(10 * 2**20).sum())") < 44 * MIB
    # before the measurement is before
    assert _extra_bytes("torch.ones(10 * 2**20).sum()\nextra(lambda: 0)") < MIB


@pytest.mark.parametrize("kind", KINDS)
def test_risk_holds_one_plane(kind):
    """The backward holds the gradient it returns and little else, the forward nothing of the size of the logits."""
    _needs_compiled("risk")
    code = f"""
from fastedit.testing import risk_inputs
forward, backward = torch.ops.fastedit.risk.default, torch.ops.fastedit.risk_backward.default
def step(tokens, vocabulary):
    inputs = risk_inputs(tokens, vocabulary, 4, "{kind}", torch.float32)
    logits, target, segments, _, kind = inputs
    stats = forward(*inputs)[2]
    one = torch.ones(4)
    return lambda: forward(*inputs), lambda: backward(one, one, logits, target, segments, stats, kind)
for run in step(8, 2000):
    run()
PASS
"""
    plane = 4 * 256 * 32_000
    assert _extra_bytes(code.replace("PASS", "extra(step(256, 32_000)[0])")) <= 0.1 * plane
    # all of the result is written, so at least that is there
    assert plane <= _extra_bytes(code.replace("PASS", "extra(step(256, 32_000)[1])")) <= 1.1 * plane


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_nearest_keys_holds_no_scores(metric):
    """4,096 queries, a million keys: their scores would take 16 GB."""
    _needs_compiled("nearest_keys")
    code = f"""
from fastedit import ops
from fastedit.testing import nearest_keys_inputs
ops.nearest_keys(*nearest_keys_inputs(64, 1000, 8, torch.float32), 8, "{metric}")
inputs = nearest_keys_inputs(4096, 10**6, 8, torch.float32)
extra(lambda: ops.nearest_keys(*inputs, 8, "{metric}"))
"""
    assert _extra_bytes(code) < 16 * MIB


def _scores(product, queries, keys):
    """Scores of all metrics, larger is better, from inner products (Q, K) and vectors (Q, d) and (1 or Q, K, d)."""
    q_square, k_square = queries.square().sum(-1)[:, None], keys.square().sum(-1)
    return {
        "dot": product,
        "cosine": product / q_square.sqrt() / k_square.sqrt(),
        "l2": 2.0 * product - q_square - k_square,
    }


def test_a_million_keys():
    compiled = [p for p in providers("nearest_keys") if "csrc" in p.id and not p.missing]
    if not compiled:
        pytest.skip("the compiled library does not serve nearest_keys")
    queries, keys = nearest_keys_inputs(64, 10**6, 256, torch.float32)
    wide = queries.double()
    best = {}
    for part in keys.split(20_000):
        part = part.double()
        for metric, scores in _scores(wide @ part.T, wide, part[None]).items():
            found = scores.topk(10, dim=1).values
            best[metric] = torch.cat([best[metric], found], 1).topk(10, dim=1).values if metric in best else found
    scale = 4.0 * float(queries.norm(dim=1).max() * keys[:1000].norm(dim=1).max())
    for metric, goal in best.items():
        bound = tolerance(torch.float32, 256) * (1.0 if metric == "cosine" else scale)
        for provider in compiled:
            values, indices = provider.function()(queries, keys, 10, metric)
            # the values are the ten best, and the keys named are ten and have them
            assert ((-values if metric == "l2" else values) - goal).abs().max() < bound, (provider.id, metric)
            named = keys[indices].double()
            of_named = _scores((named @ wide[:, :, None])[..., 0], wide, named)[metric]
            assert (of_named - goal).abs().max() < bound, (provider.id, metric)
            assert (indices.sort(dim=1).values.diff(dim=1) > 0).all()
            # the best lie everywhere among the keys
            assert indices.min() < 10**5
            assert indices.max() > 9 * 10**5
