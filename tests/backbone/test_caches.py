"""What is kept of the unedited model: budgets, moves to host memory, and what preparing edits makes of it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastedit
from fastedit import EditRequest
from fastedit.backbone import EditableModel, PackedState, load
from fastedit.backbone.caches import Caches, SpillCache, feature_cache
from fastedit.backbone.packed_forward import hold_constant, packed_prefix, packed_start, packed_tail
from fastedit.backbone.states import ImageFeatures
from fastedit.deltas import DeltaSpec
from fastedit.engine.memory.oom import release_memory
from fastedit.engine.profiling.timing import PhaseTimer
from fastedit.fitting import prepared
from fastedit.fitting.prepared import EditRows, prepare
from fastedit.fitting.views import TrainingView
from fastedit.objectives import Role
from fastedit.requests import Query

from .conftest import largest_gap, mixed_queries, picture

#: Stands for an accelerator: nothing is there to move back from it.
FAR_DEVICE = torch.device("meta")


@dataclass(frozen=True)
class Value:
    """Something of a size on a device."""

    name: str
    size: int
    device: torch.device = FAR_DEVICE
    moves: int = 0


def moved(value: Value, to: torch.device | str) -> Value:
    assert value.device != torch.device(to), "moved to where it is"
    return replace(value, device=torch.device(to), moves=value.moves + 1)


def new_cache(budget: int, host_budget: int) -> SpillCache[Value]:
    return SpillCache(budget, host_budget, lambda value: value.size, moved)


def filled(cache: SpillCache[Value], names: str, size: int = 1, device: torch.device = FAR_DEVICE) -> None:
    for name in names:
        cache.put(name, Value(name, size, device))


def test_the_least_recently_used_go_to_host_memory_and_come_back() -> None:
    cache = new_cache(3, 2)
    filled(cache, "abc")
    assert cache.get("a") == Value("a", 1)
    filled(cache, "d")
    # b was used least recently
    assert (cache.held_bytes, cache.far_bytes, len(cache)) == (3, 1, 4)
    back = cache.get("b")
    assert back is not None
    assert (back.device, back.moves) == (FAR_DEVICE, 2)
    # c made room for it; it is the newest
    assert (cache.held_bytes, cache.far_bytes, len(cache)) == (3, 1, 4)
    assert cache.get("a") == Value("a", 1), "not moved"
    assert cache.get("c").moves == 2  # type: ignore[union-attr]
    assert (cache.hits, cache.misses) == (4, 0)


def test_what_host_memory_has_no_room_for_is_dropped_oldest_first() -> None:
    cache = new_cache(2, 2)
    filled(cache, "abcdef")
    assert (cache.held_bytes, cache.far_bytes) == (2, 2)
    assert [name for name in "abcdef" if name in cache] == list("cdef")
    assert cache.get("a") is None
    assert cache.get_all(["b", "f"]) == [None, Value("f", 1)]
    assert (cache.hits, cache.misses) == (1, 2)


def test_where_the_device_is_the_host_nothing_is_moved() -> None:
    cache = new_cache(2, 100)
    filled(cache, "abc", device=torch.device("cpu"))
    assert [name for name in "abc" if name in cache] == ["b", "c"]
    assert (len(cache), cache.held_bytes, cache.far_bytes) == (2, 2, 0)


def test_what_is_too_large_is_not_kept_and_pushes_nothing_out() -> None:
    cache = new_cache(4, 2)
    filled(cache, "ab", 2)
    cache.put("large", Value("large", 5))
    cache.put("nothing", None)
    assert "large" not in cache
    assert "nothing" not in cache
    assert cache.get("a") == Value("a", 2)
    filled(cache, "c", 4)
    # Both made room; host memory has room for one
    assert [name for name in "abc" if name in cache] == ["a", "c"]
    filled(cache, "d", 1)
    assert "c" not in cache, "larger than all of host memory"
    assert (cache.held_bytes, cache.far_bytes) == (1, 2)
    nothing = new_cache(0, 0)
    filled(nothing, "a")
    assert len(nothing) == 0


def test_a_key_has_one_value() -> None:
    cache = new_cache(2, 3)
    filled(cache, "a", 2)
    filled(cache, "a", 1)
    assert (len(cache), cache.held_bytes) == (1, 1)
    filled(cache, "bc")
    # a lies in host memory, and is put again
    assert (cache.held_bytes, cache.far_bytes) == (2, 1)
    filled(cache, "a", 2)
    assert (len(cache), cache.held_bytes, cache.far_bytes) == (3, 2, 2)
    assert cache.get("a") == Value("a", 2)


def test_budgets_hold_whatever_happens() -> None:
    generator = random.Random(0)
    cache = new_cache(10, 7)
    sizes = {f"{number}": generator.randint(1, 5) for number in range(12)}
    for _ in range(600):
        name = generator.choice(list(sizes))
        if generator.random() < 0.5:
            cache.put(name, Value(name, sizes[name]))
            assert name in cache
        else:
            was = name in cache
            value = cache.get(name)
            assert was == (value is not None)
            assert value is None or (value.name, value.device) == (name, FAR_DEVICE)
        known = [name for name in sizes if name in cache]
        assert len(known) == len(cache)
        assert cache.held_bytes + cache.far_bytes == sum(sizes[name] for name in known)
        assert 0 <= cache.held_bytes <= 10
        assert 0 <= cache.far_bytes <= 7
    cache.clear()
    assert (len(cache), cache.held_bytes, cache.far_bytes) == (0, 0, 0)
    assert cache.hits > 50 < cache.misses


def test_every_kind_of_value_is_moved_whole() -> None:
    """Values whose tensors are on no device: they can be moved there, and are told from those of the host."""
    model = load("random:qwen3vl-tiny", dtype="float64")
    state = packed_prefix(model, packed_start(model, model.encode(mixed_queries(), answers=True)), 1, "attention")
    state, labels = hold_constant(model, state), torch.arange(3)
    caches = Caches(1 << 20)
    size = state.n_bytes + 3 * 8
    caches.states.put("state", (state, labels))
    caches.references.put("reference", torch.zeros(4, 5))
    features = ImageFeatures(torch.zeros(2, 3), (torch.zeros(2, 3),))
    images = feature_cache(1 << 20)
    images.put("image", features)
    assert (caches.states.held_bytes, caches.references.held_bytes, images.held_bytes) == (size, 80, 48)
    parts = [
        part
        for pair in (caches.states._move((state, labels), "meta"),)
        for part in (*vars_of(pair[0]), pair[1], caches.references._move(torch.zeros(4), "meta"))
    ]
    shifted = images._move(features, "meta")
    assert {part.device.type for part in (*parts, shifted.tokens, *shifted.deep)} == {"meta"}
    assert len(vars_of(state)) == len(parts) - 2 > 10
    caches.clear()
    assert len(caches.states) == len(caches.references) == 0


def vars_of(state: PackedState) -> list[Tensor]:
    """Every tensor of a state."""
    found = [state.hidden, state.position_ids, state.wanted, *(state.rotary or ()), *state.deep.values()]
    found += [part for pair in state.constant.values() for part in pair]
    return found if state.live is None else [*found, state.live]


LOCALITY = (
    TrainingView(Role.TEXT_LOCALITY, Query("what is the capital?", None, "Paris")),
    TrainingView(Role.IMAGE_LOCALITY, Query("what colour is it?", picture(9), "red and green")),
)
VIEWS = [
    (TrainingView(Role.EDIT, Query("what is it?", picture(1), "a cat")), *LOCALITY),
    (TrainingView(Role.EDIT, Query("who is it, and where?", picture(2), "nobody")), LOCALITY[1]),
]


def new_model(cache_mib: int) -> EditableModel:
    model = load("random:llava-tiny", dtype="float64")
    model.caches = Caches(cache_mib << 20)
    return model


class Watched:
    """A model of its own, with the rows that were walked to the split point and the calls of its head."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache_mib: int = 256) -> None:
        self.model = new_model(cache_mib)
        self.rows: list[int] = []
        self.logits: list[int] = []
        walk = prepared.packed_prefix

        def counted(model: EditableModel, state: PackedState, layer: int, stage: str) -> PackedState:
            self.rows.append(len(state))
            return walk(model, state, layer, stage)

        monkeypatch.setattr(prepared, "packed_prefix", counted)
        head = self.model.head
        self.model.head = lambda hidden: self.logits.append(len(hidden)) or head(hidden)  # type: ignore

    def prepare(self, views: Sequence[Any], layer: int = 2, positions: str = "all") -> list[EditRows]:
        spec = DeltaSpec("full", tuple(self.model.sites([layer], ["up"])), {"positions": positions})
        return prepare(self.model, spec, views, PhaseTimer())


def same(model: EditableModel, found: Sequence[EditRows], expected: Sequence[EditRows]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.role, other.role)
        assert largest_gap(packed_tail(model, one.state), packed_tail(model, other.state)) < 1e-12
        assert one.reference is not None
        assert other.reference is not None
        assert largest_gap(one.reference, other.reference) < 1e-12


@pytest.mark.parametrize("positions", ["all", "after_image"])
def test_locality_questions_are_prepared_once(monkeypatch: pytest.MonkeyPatch, positions: str) -> None:
    watched = Watched(monkeypatch)
    first = watched.prepare(VIEWS, positions=positions)
    assert watched.rows == [5]
    assert len(watched.logits) == 1
    model = watched.model
    tokens = [int((rows.role >= int(Role.TEXT_LOCALITY)).sum()) for rows in first]
    assert sum(watched.logits) == sum(tokens) == sum(len(rows.reference) for rows in first)  # type: ignore[arg-type]
    # Text alone has no constants
    assert [[start > 0 for start in rows.state.starts] for rows in first] == (
        [[False] * 3, [False] * 2] if positions == "all" else [[True, False, True], [True, True]]
    )
    again = watched.prepare(VIEWS, positions=positions)
    # Only the edits' own questions
    assert watched.rows == [5, 2]
    assert len(watched.logits) == 1
    same(model, again, first)
    assert [len(rows.state) for rows in again] == [3, 2]

    without = Watched(monkeypatch, cache_mib=0)
    for _ in range(2):
        same(model, without.prepare(VIEWS, positions=positions), first)
    assert without.rows == [5, 5]
    assert len(without.logits) == 2
    # The states of text alone have no constants, in whatever company
    alone = without.prepare([LOCALITY[:1]], positions=positions)
    mixed = watched.prepare([LOCALITY[:1], VIEWS[0]], positions=positions)
    same(model, alone, mixed[:1])


def test_states_are_kept_by_point_and_positions_and_logits_by_question(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    first = watched.prepare(VIEWS)
    for layer, positions in ((1, "all"), (2, "after_image"), (3, "all")):
        watched.rows.clear()
        for rows in ([5], [5, 2]):
            same(watched.model, watched.prepare(VIEWS, layer, positions), first)
            assert watched.rows == rows
    assert len(watched.logits) == 1
    other = replace(LOCALITY[0], query=replace(LOCALITY[0].query, answer="London or Rome"))
    another = replace(LOCALITY[1], query=replace(LOCALITY[1].query, image=picture(10)))
    watched.rows.clear()
    watched.prepare([(other, another)])
    assert watched.rows == [2]
    assert len(watched.logits) == 2


def test_what_is_kept_does_not_hold_on_to_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    watched.prepare(VIEWS)
    caches = watched.model.caches
    assert len(caches.states) == len(caches.references) == 2
    for state, labels in caches.states._near.values():
        for part in (*vars_of(state), labels):
            assert part.untyped_storage().nbytes() == part.numel() * part.element_size()
    for logits in caches.references._near.values():
        assert logits.untyped_storage().nbytes() == logits.numel() * logits.element_size()


@pytest.mark.parametrize("method", ["kl+lora", "odedit+ft"])
@pytest.mark.parametrize("positions", ["all", "after_image"])
def test_edits_do_not_depend_on_what_is_kept(method: str, positions: str) -> None:
    edits = [
        EditRequest(
            prompt=f"what is {number}?",
            target="a blue cat",
            # Every third edit is about text alone
            image=None if number % 3 == 0 else picture(number),
            locality_prompt=f"where is {number}?",
            locality_answer="here",
            image_locality_image=picture(20 + number),
            image_locality_prompt="what?",
            image_locality_answer="red",
            id=str(number),
        )
        for number in range(5)
    ]
    settings: dict[str, Any] = {"steps": 4, "lr": 1e-2, "layers": 2, "evaluate": False, "positions": positions}
    deltas = []
    for cache, size in ((256, 2), (256, 1), (0, 2), (0, 5)):
        model = new_model(cache)
        deltas.append(list(fastedit.edit(model, edits, method, batch_size=size, **settings).deltas))
        if size == 2:
            deltas.append(list(fastedit.edit(model, edits, method, batch_size=size, **settings).deltas))
        assert (model.caches.states.hits > 0) == (model.caches.references.hits > 0) == (cache > 0)
    assert min(delta.norm for delta in deltas[0]) > 0.01
    for others in deltas[1:]:
        for one, other in zip(deltas[0], others, strict=True):
            assert max(largest_gap(one.tensors[name], other.tensors[name]) for name in one.tensors) < 1e-8


@pytest.mark.parametrize("everything", [True, False])
def test_all_of_it_can_be_dropped(monkeypatch: pytest.MonkeyPatch, everything: bool) -> None:
    watched = Watched(monkeypatch)
    model = watched.model
    watched.prepare(VIEWS)
    model.reference_answers["what?", "", 3] = "that"
    kept = (model.images, model.image_features, model.caches.states, model.caches.references)
    assert all(each.held_bytes for each in kept)
    if everything:
        model.forget()
    else:
        release_memory(model)
    assert not any(each.held_bytes for each in kept)
    # Answers take next to nothing
    assert bool(model.reference_answers) != everything
    watched.prepare(VIEWS)
    assert watched.rows == [5, 5]
