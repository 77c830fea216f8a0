"""Ops called by several Python threads at once, side by side in C++: every result is that of a call alone."""

import subprocess
import sys
import threading

import pytest
import torch

from fastedit import _native, ops
from fastedit.testing import (
    adam_step_inputs,
    key_value_inputs,
    low_rank_inputs,
    mmd2_inputs,
    nearest_keys_inputs,
    risk_inputs,
    topk_agreement_inputs,
)

THREADS, ROUNDS = 4, 12


def _gradient(function, *leaves):
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    return torch.autograd.grad(function(*leaves), leaves)


def _work(seed):
    """Return functions that compute something of every op with numbers of their own."""
    # logits large enough for memory that is kept between calls
    logits, target, segments, n, kind = risk_inputs(16, 9000 + 64 * seed, 3, "ce", torch.float32, seed=seed)
    x, down, up, starts = low_rank_inputs((5, 3), 24, 4, 20, torch.float32, seed=seed)
    token, keys, bias, values, begins, _, _ = key_value_inputs((5, 3), 24, 4, 20, torch.float32, seed=seed)
    groups = mmd2_inputs((4, 60), (5, 30), 9, torch.float32, seed=seed)
    queries, stored = nearest_keys_inputs(12, 500, 16, torch.float32, seed=seed)
    before, after = topk_agreement_inputs(6, 400, torch.float32, seed=seed)

    def step():
        state = [t.clone() for t in adam_step_inputs(4, 5000, torch.float32, seed=seed)]
        return [ops.adam_step_(*state, clip=1.0), *state]

    def reused():
        first = ops.workspace(x, (700, 400)).fill_(seed)
        total = first.sum()
        del first
        return [total, ops.workspace(x, (700, 400)).fill_(seed + 1).sum()]

    return [
        lambda: _gradient(lambda z: sum(t.sum() for t in ops.risk(z, target, segments, n, kind)), logits),
        lambda: _gradient(lambda a, b: ops.low_rank(x, a, b, starts).square().sum(), down, up),
        lambda: _gradient(lambda k: ops.key_value(token, k, bias, values, begins, "silu").square().sum(), keys),
        lambda: _gradient(lambda a: ops.mmd2(a, *groups[1:])[0].sum(), groups[0]),
        lambda: ops.nearest_keys(queries, stored, 5),
        lambda: ops.topk_agreement(before, after, 7),
        step,
        reused,
    ]


@pytest.mark.parametrize("inner", [1, 2], ids=["a thread each", "threads of their own"])
def test_results_are_those_of_one_thread(inner):
    before = torch.get_num_threads()
    torch.set_num_threads(inner)
    try:
        works = [_work(seed) for seed in range(THREADS)]
        goals = [[[t.clone() for t in function()] for function in work] for work in works]
        wrong = []
        start = threading.Barrier(THREADS)

        def run(place):
            torch.set_num_threads(inner)
            start.wait()
            try:
                for turn in range(ROUNDS):
                    # each in another order, so that all kinds meet
                    for step in range(len(works[place])):
                        own = (step + turn * (place + 1)) % len(works[place])
                        results = works[place][own]()
                        if not all(torch.equal(*pair) for pair in zip(results, goals[place][own], strict=True)):
                            wrong.append((place, turn, own))
                    if turn % 4 == 3:
                        ops.release_workspaces()
            except Exception as error:
                wrong.append((place, repr(error)))

        threads = [threading.Thread(target=run, args=(place,)) for place in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
    finally:
        torch.set_num_threads(before)


_PROGRAM = """
import threading
import torch
from fastedit import ops

torch.set_num_threads(1)
stop = threading.Event()
wrong = []

def churn(seed):
    # blocks of all sizes, from before the allocator was exchanged and from after, freed by whoever drops them last
    generator = torch.Generator().manual_seed(seed)
    held = []
    while not stop.is_set():
        size = int(torch.randint(1, 600_000, (1,), generator=generator))
        held.append((torch.full((size,), float(seed)), seed))
        shared.append(held[-1][0])
        if len(held) > 6:
            tensor, value = held.pop(0)
            if not bool((tensor == value).all()):
                wrong.append(value)
        if len(shared) > 8:
            shared.pop(0)

shared = []
threads = [threading.Thread(target=churn, args=(seed,)) for seed in range(1, 4)]
for thread in threads:
    thread.start()
turns = 0
while turns < 60:
    ops.keep_freed_memory((turns % 5 + 1) << 22)
    ops.release_workspaces()
    ops.workspace(torch.ones(1), (500, 300 + turns)).fill_(1.0)
    turns += 1
stop.set()
for thread in threads:
    thread.join()
print(len(wrong))
"""


_HAMMER = """
import threading
import torch
from fastedit import ops

torch.set_num_threads(1)
like = torch.ones(1)
take = torch.ops.fastedit.workspace.default
# many free blocks: whoever looks for one looks for long
[take(like, [500, 300 + size % 97]) for size in range(400)].clear()
wrong = []

def hammer(seed):
    for turn in range(6000):
        one, other = take(like, [500, 300 + turn % 97]), take(like, [500, 300 + turn % 89])
        one[0, 0] = other[0, 0] = seed
        del other
        if float(one[0, 0]) != seed:
            wrong.append(turn)
        if turn % 500 == seed:
            ops.release_workspaces()

threads = [threading.Thread(target=hammer, args=(seed,)) for seed in range(1, 5)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(len(wrong))
"""


@pytest.mark.skipif(_native.LIBRARY is None, reason="no compiled library")
@pytest.mark.parametrize("program", [_PROGRAM, _HAMMER], ids=["allocator", "blocks"])
def test_memory_has_one_owner_at_a_time(program):
    """keep_freed_memory while others allocate and free what is older; and blocks that many take and drop at once."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "0"
