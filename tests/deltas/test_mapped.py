"""Stored deltas as one stack: what acts is read, what does not is not, and both are as if all were in memory."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fastedit
from fastedit.backbone import Site
from fastedit.backbone.token_layout import TokenLayout
from fastedit.deltas import DeltaSpec, EditDelta, StoredDeltas, TokenSpans, installed, stack
from fastedit.deltas.install import RowsHolder
from fastedit.deltas.kinds import is_mapped, new_stack
from fastedit.deltas.mapped import MappedStack
from fastedit.deltas.questions import QUESTIONS
from fastedit.deltas.rows import Rows
from tests.engine.stock_calls import engine_logits, fitted, load, questions, stock_answers

D_IN, D_OUT = 9, 5
SITES = tuple(Site(layer, "down", f"{layer}.down", D_IN, D_OUT) for layer in (1, 2, 4))
LOCALIZED = DeltaSpec("localized", SITES, {"slots": 2, "rank": 2, "router": "classifier", "entity": 4})
CODEBOOK = DeltaSpec("codebook", (Site(1, "down", "d", 9, 9),), {"values": 3, "router": "ball", "positions": "answer"})


def deltas(count: int, spec: DeltaSpec = LOCALIZED, first: int = 0) -> list[EditDelta]:
    """Random ones; each stands beside two of the sites."""
    shapes = new_stack(spec, 0, trainable=False).stored_shapes()
    made = []
    for number in range(first, first + count):
        generator = torch.Generator().manual_seed(number)
        tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        if "layers" in tensors:
            tensors["layers"] = torch.tensor([1.0 + number % 3, 1.0 + (number + 1) % 3])
        made.append(EditDelta(spec, tensors, "f" * 64, f"edit-{number}", {QUESTIONS: f"question {number}"}))
    return made


class Counted(Sequence[EditDelta]):
    """Deltas as a store hands them out; notes which were read."""

    is_mapped = True

    def __init__(self, held: Sequence[EditDelta]) -> None:
        self.held, self.reads = list(held), []
        self.ids = [each.id for each in held]

    def __len__(self) -> int:
        return len(self.held)

    def __getitem__(self, index: Any) -> Any:
        self.reads.append(index)
        return self.held[index]

    def __iter__(self) -> Iterator[EditDelta]:
        self.reads.append("all")
        return iter(self.held)


def spans(choice: Sequence[int], counts: Sequence[int], size: int, *, alone: bool) -> TokenSpans:
    made = TokenSpans.chosen(choice, counts, size, None, alone=alone)
    made.layout = TokenLayout(tuple(counts), tuple(max(1, count - 2) for count in counts))
    return made


@pytest.mark.parametrize("spec", [LOCALIZED, CODEBOOK], ids=lambda spec: spec.kind)
def test_outputs_are_those_of_the_stack_in_memory(spec: DeltaSpec, tmp_path: Path) -> None:
    held = deltas(7, spec)
    stored = StoredDeltas.create(tmp_path)
    stored.append([held[1], held[0], held[5]], [1, 0, 5])
    stored.append([held[2], held[3], held[4], held[6]], [2, 3, 4, 6])
    eager, mapped = stack(held), stack(stored)
    assert isinstance(mapped, MappedStack)
    assert not isinstance(eager, MappedStack)
    assert mapped.size == 7
    assert mapped.texts == eager.texts
    assert all(torch.equal(mapped.fixed[name], tensor) for name, tensor in eager.fixed.items())
    counts = (3, 4, 2, 5, 3, 6)
    for choice in ([4, -1, 0, 4, 6, 1], [2, 2, 2, 2, 2, 2], [6, 5, 3, 1, -1, 0]):
        whole, alone = spans(choice, counts, 7, alone=False), spans(choice, counts, 7, alone=True)
        assert alone.edits == tuple(sorted({each for each in choice if each >= 0}))
        assert len(alone.offsets) == len(alone.edits) + 1
        assert torch.equal(whole.order, alone.order)
        for site in spec.sites:
            tokens = len(whole.order)
            x, output = torch.randn(tokens, site.d_in), torch.randn(tokens, site.d_out)
            number = spec.sites.index(site)
            expected = eager.delta(number, x, whole, output)
            assert torch.equal(mapped.delta(number, x, alone, output), expected)
            assert torch.equal(mapped.delta(number, x, whole, output), expected)
    x = torch.randn(6, SITES[0].d_in)
    if spec is LOCALIZED:
        rows = Rows((0, 1, 0, 0, 2, 0, 0))
        assert torch.equal(mapped.delta(0, x, rows, x), eager.delta(0, x, rows, x))


@pytest.mark.parametrize("method", ["grace", "ldke", "serac"])
def test_a_model_answers_as_with_the_deltas_in_memory(method: str, tmp_path: Path) -> None:
    name = "random:llava-tiny"
    model, held = load(name), fitted(name, method)
    stored = StoredDeltas.create(tmp_path)
    stored.append(held)
    asked = questions(model)
    base = model.generate(asked, max_new_tokens=5)
    with fastedit.applied(model, held):
        answers, logits = model.generate(asked, max_new_tokens=5), engine_logits(model, asked)
        key = model.active_key
    for _ in range(2):
        with fastedit.applied(model, stored):
            assert is_mapped(stored)
            assert model.active_key == key
            assert torch.equal(engine_logits(model, asked), logits)
            assert model.generate(asked, max_new_tokens=5) == answers
    if method != "serac":
        with fastedit.attached(model, stored) as hf:
            assert stock_answers(model, hf, asked) == answers
    assert answers != base, "the case needs a delta that is felt"
    assert model.generate(asked, max_new_tokens=5) == base


def test_what_has_to_be_looked_at_whole_is_held_in_memory() -> None:
    assert not is_mapped(deltas(3))
    side = {"router": "distance", "tokens": "all", "keep": 0.5, "alpha": 1.0, "beta": 1.0, "gamma": 1.0, "weight": 1.0,
            "share": 0.5}  # fmt: skip
    for spec in (
        DeltaSpec("side", SITES[:1], side),
        DeltaSpec("low_rank", SITES, {"rank": 2, "router": "classifier"}),
        replace(LOCALIZED, options={"slots": 2, "rank": 2, "entity": 4}),
    ):
        held = Counted(deltas(2, spec))
        assert not is_mapped(held)
        assert not isinstance(stack(held), MappedStack)


def test_only_what_acts_is_read_and_kept_within_a_budget() -> None:
    held = deltas(6)
    store = Counted(held)
    size = sum(part.numel() * 4 for part in held[0].tensors.values())
    mapped = MappedStack(store, new_stack, kept_bytes=2 * size)
    assert store.reads == [0, "all"]
    x = torch.randn(4, D_IN)
    for edits in ((1,), (1,), (2,), (1,), (3,), (1,), (2,)):
        mapped.delta(0, x, TokenSpans([0, 4], edits=edits), x)
    # Two of them stay: 2 was dropped for 3
    assert store.reads[2:] == [1, 2, 3, 2]
    assert mapped._recent.n_bytes == 2 * size


def test_threads_share_a_stack() -> None:
    held = deltas(12)
    mapped, eager = MappedStack(Counted(held), new_stack, kept_bytes=5000), stack(held)
    x, wrong = torch.randn(4, D_IN), []

    def ask(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(60):
            edits = tuple(sorted(torch.randperm(12, generator=generator)[:2].tolist()))
            choice = [edits[0], edits[1]]
            expected = eager.delta(0, x, spans(choice, (3, 1), 12, alone=False), x)
            if not torch.equal(mapped.delta(0, x, spans(choice, (3, 1), 12, alone=True), x), expected):
                wrong.append(choice)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_stack_grows_by_what_is_new() -> None:
    held = deltas(9)
    mapped = stack(Counted(held[:5]))
    before = {name: tensor.clone() for name, tensor in mapped.fixed.items()}
    versions = [mapped]
    for size in (6, 7, 8, 9):
        store = Counted(held[:size])
        versions.append(stack(store, earlier=versions[-1]))
        assert store.reads == [0, 0, size - 1]
    # The rows of the last ones are one block of memory
    assert versions[-1].fixed["entity"].data_ptr() == versions[1].fixed["entity"].data_ptr()
    # Two that grow from one do not write into each other
    others = deltas(2, first=50)
    branch = stack(Counted([*held[:6], *others]), earlier=versions[1])
    undone = Counted([*held[:3], others[0], *held[4:9]])
    changed = stack(undone, earlier=versions[-1])
    assert undone.reads == [0, 0, 3]
    fewer = Counted(held[1:4])
    expected = [
        (branch, [*held[:6], *others]), (changed, list(undone.held)), (stack(fewer, earlier=changed), held[1:4]),
        *zip(versions, [held[:size] for size in (5, 6, 7, 8, 9)], strict=True),
    ]  # fmt: skip
    for found, whole in expected:
        eager = stack(whole)
        assert found.ids == [each.id for each in whole]
        assert found.texts == eager.texts
        assert all(torch.equal(found.fixed[name], tensor) for name, tensor in eager.fixed.items())
    assert all(torch.equal(mapped.fixed[name], tensor) for name, tensor in before.items())
    assert fewer.reads == [0, 0, 2]


def test_a_delta_that_is_another_one_by_now_is_refused() -> None:
    store = Counted(deltas(3))
    mapped = stack(store)
    store.held[1] = deltas(1, first=9)[0]
    x = torch.randn(4, D_IN)
    with pytest.raises(ValueError, match=r"stay as they were while they act \(got another content of delta 1"):
        mapped.delta(0, x, TokenSpans([0, 4], edits=(1,)), x)
    mixed = Counted([*deltas(2), *deltas(1, CODEBOOK)])
    with pytest.raises(ValueError, match=r"stack: deltas share one spec \(delta 2 has"):
        stack(mixed)


def test_deltas_in_storage_are_checked_before_they_act(tmp_path: Path) -> None:
    name = "random:llava-tiny"
    model, held = load(name), fitted(name, "grace")
    strange = Counted([held[0], replace(held[1], model_fingerprint="0" * 64)])
    with (
        pytest.raises(ValueError, match="a delta belongs to the model it was fitted on"),
        fastedit.applied(model, strange),
    ):
        pass
    later = Counted([held[0], replace(held[1], fitted_on=("1:abc",))])
    with (
        pytest.raises(ValueError, match=r"deltas\[1\] .* was fitted on top of 1 earlier"),
        fastedit.applied(model, later),
    ):
        pass
    with fastedit.applied(model, later, check_sequence=False):
        pass


def test_a_store_is_stacked_once_for_all_calls(tmp_path: Path) -> None:
    name = "random:llava-tiny"
    model, held = load(name), fitted(name, "grace")
    store = Counted(held)
    for _ in range(3):
        with fastedit.applied(model, store):
            pass
    assert store.reads.count("all") == 1
    stored = StoredDeltas.create(tmp_path)
    stored.append(held[:1])
    with fastedit.applied(model, stored):
        first = model.active_key
    stored.append(held[1:])
    with fastedit.applied(model, stored):
        second = model.active_key
    with fastedit.applied(model, held):
        assert first != second == model.active_key


def test_texts_are_looked_at_once_a_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("random:llava-tiny")
    held = fitted("random:llava-tiny", "grace")
    asked: list[int] = []
    from fastedit.deltas import install
    from fastedit.deltas import questions as module

    monkeypatch.setattr(install, "answering", lambda texts: (asked.append(len(texts)), module.answering(texts))[1])
    with installed(model, stack(held), Rows()) as holder:
        assert isinstance(holder, RowsHolder)
        for _ in range(3):
            model.answer(None, "what is it ?", max_new_tokens=3)
    assert asked == [2]


MEMORY = """
import sys, torch
from tests.deltas.test_mapped import D_IN, D_OUT, SITES, deltas
from fastedit.backbone import Site
from fastedit.deltas import DeltaSpec, EditDelta, TokenSpans, stack

WIDE = tuple(Site(layer, "down", f"{layer}.down", 2048, 1024) for layer in (1, 2, 4))
SPEC = DeltaSpec("localized", WIDE, {"slots": 2, "rank": 2, "router": "classifier", "entity": 4})

class Made:
    is_mapped = True
    def __init__(self, size): self.size = size
    def __len__(self): return self.size
    def __getitem__(self, number):
        if number >= self.size: raise IndexError
        return next(iter(deltas(1, SPEC, number)))

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

torch.set_num_threads(1)
stack(Made(50))
before = resident()
held = stack(Made(int(sys.argv[1])))
x = torch.randn(2, 2048)
for edit in range(0, len(held.ids), len(held.ids) // 40):
    held.delta(0, x, TokenSpans([0, 2], edits=(edit,)), x)
print(resident() - before, sum(part.numel() * 4 for part in held.deltas[0].tensors.values()))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to see resident memory")
def test_memory_is_not_that_of_edits_that_do_not_act() -> None:
    grown = {}
    for count in (400, 4000):
        command = [sys.executable, "-c", MEMORY, str(count)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        grown[count], size = map(int, output.split())
    # 4,000 would be 200 MB; what acted was the same number of edits in both
    assert grown[4000] - grown[400] < 0.05 * 3600 * size
