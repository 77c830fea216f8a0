"""The vision side computed anew in a walk: the same numbers as the stock model, with whatever is hooked in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import fastedit
from fastedit import Query
from fastedit.backbone import SHAPES, EditableModel, PackedState
from fastedit.backbone.generation import Reader
from fastedit.backbone.packed_forward import packed_prefix, packed_start, packed_tail
from fastedit.backbone.vision import VISION, renewed, vision_sites, watched
from fastedit.deltas import DeltaSpec, Rows, installed, split_point
from fastedit.deltas.kinds import new_stack
from fastedit.testing import assert_close
from tests.engine.conftest import picture

TILED = {"llava-next-tiny", "llava-onevision-tiny"}
FAMILIES = [name for name in SHAPES if name.endswith("-tiny") and name not in TILED]
ASKED = [
    Query("What is it?", picture(1), "a cat"),
    Query("Who is that over there?", None, "me"),
    Query("What is it?", picture(2), "two"),
    Query("Why?", picture(1), "so"),
]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> EditableModel:
    return fastedit.load(f"random:{request.param}", dtype="float64")


def states(model: EditableModel, *, answers: bool = True) -> tuple[PackedState, PackedState]:
    encoded = model.encode(ASKED, answers=answers)
    start = packed_start(model, encoded)
    return start, watched(model, start, encoded)


def stacked(model: EditableModel, size: int, *, trainable: bool = False) -> Any:
    made = new_stack(DeltaSpec("full", tuple(vision_sites(model))), size, dtype=torch.float64, trainable=trainable)
    make = torch.Generator().manual_seed(5)
    for part in made.parts.values():
        part.copy_(0.3 * torch.randn(part.shape, generator=make, dtype=torch.float64) / part.shape[-1] ** 0.5)
    return made


@contextmanager
def written(model: EditableModel, delta: Any, edit: int) -> Iterator[None]:
    """The change inside of the weights themselves."""
    modules: list[Any] = [model.module(site) for site in delta.spec.sites]
    kept = [module.weight.data for module in modules]
    for module, weight, part in zip(modules, kept, delta.parts.values(), strict=True):
        module.weight.data = weight + part[edit]
    try:
        yield
    finally:
        for module, weight in zip(modules, kept, strict=True):
            module.weight.data = weight


def stock_logits(model: EditableModel, query: Query) -> torch.Tensor:
    """Of the stock model, at the labels of one question."""
    encoded = model.encode([query], answers=True)
    with torch.no_grad():
        logits = model.hf(**encoded.model_inputs).logits
    return logits[0, encoded.label_mask[0]]


def test_an_untouched_vision_side_gives_the_same_states(model: EditableModel) -> None:
    start, before = states(model)
    assert before.stage == VISION
    again = renewed(model, before)
    assert (again.layer, again.stage, again.seen) == (0, "attention", ())
    assert_close(again.hidden, start.hidden, length=64)
    text = start.counts[0], start.counts[0] + start.counts[1]
    assert torch.equal(again.hidden[slice(*text)], start.hidden[slice(*text)])
    assert_close(packed_tail(model, before), packed_tail(model, start), length=64)
    assert_close(packed_prefix(model, before, 1, "ffn").hidden, packed_prefix(model, start, 1, "ffn").hidden, length=64)


def test_the_towers_output_is_computed_once_per_image(model: EditableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model.forget()
    asked: list[int] = []
    look = model.adapter.look

    def counted(images: Any) -> Any:
        asked.append(len(images))
        return look(images)

    monkeypatch.setattr(model.adapter, "look", counted)
    _, first = states(model)
    assert sum(asked) == 2
    _, second = states(model)
    assert sum(asked) == 2
    assert first.seen[1] is None
    for one, other in zip(first.seen, second.seen, strict=True):
        assert one is other or torch.equal(one, other)
    model.forget()
    states(model)
    assert sum(asked) == 4


def test_states_can_be_taken_apart_and_put_together(model: EditableModel) -> None:
    _, before = states(model)
    rows = [before.of_row(row) for row in (2, 1, 0)]
    assert [part is None for row in rows for part in row.seen] == [False, True, False]
    joined = PackedState.cat(rows)
    whole = packed_tail(model, before)
    parts = torch.split(whole, list(before.wanted_counts))
    assert_close(packed_tail(model, joined), torch.cat([parts[2], parts[1], parts[0]]), length=64)
    copied = before.map(torch.clone)
    assert_close(packed_tail(model, copied), whole, length=64)
    tower = sum(part.numel() * part.element_size() for part in before.seen if part is not None)
    assert before.n_bytes - renewed(model, before).n_bytes == tower


def test_every_row_has_the_vision_side_of_its_edit(model: EditableModel) -> None:
    """What two edits say beside each other is what the stock model says with each written into its weights."""
    delta = stacked(model, 2)
    _, before = states(model)
    with installed(model, delta, Rows((3, 1))):
        logits = model.head(packed_tail(model, before))
    parts = torch.split(logits, list(before.wanted_counts))
    frozen = torch.split(model.head(packed_tail(model, before)), list(before.wanted_counts))
    for row, (query, edit) in enumerate(zip(ASKED, (0, 0, 0, 1), strict=True)):
        if query.image is None:
            assert torch.equal(parts[row], frozen[row])
            continue
        assert_close(frozen[row], stock_logits(model, query), length=1000)
        with written(model, delta, edit):
            assert_close(parts[row], stock_logits(model, query), length=1000)
        # the change is one that shows
        assert float((parts[row] - frozen[row]).abs().max()) > 1e-3


def test_gradients_are_those_of_the_weights(model: EditableModel) -> None:
    delta = stacked(model, 1, trainable=True)
    _, before = states(model)
    weigh = torch.randn(
        len(before.wanted), model.hidden_size, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    modules: list[Any] = [model.module(site) for site in delta.spec.sites]
    with written(model, delta, 0):
        for module in modules:
            module.weight.requires_grad_(True)
        expected = torch.autograd.grad((packed_tail(model, before) * weigh).sum(), [m.weight for m in modules])
        for module in modules:
            module.weight.requires_grad_(False)
    with installed(model, delta, Rows()):
        delta.begin_step()
        (packed_tail(model, before) * weigh).sum().backward()
        delta.end_step()
    for grad, wanted in zip(delta.part_grads.values(), expected, strict=True):
        assert_close(grad[0], wanted, length=1000)
    assert float(delta.grad.abs().max()) > 0


def test_questions_are_answered_as_with_written_weights(model: EditableModel) -> None:
    """Read, answered and decoded; features that were remembered before the edit do not get in the way."""
    delta = stacked(model, 1)
    delta.flat.mul_(10)
    asked = [Query(query.prompt, query.image) for query in ASKED]
    before = model.generate(asked, max_new_tokens=6)
    with installed(model, delta, Rows()):
        assert model.watching == 1
        edited = model.generate(asked, max_new_tokens=6)
    assert model.watching == 0
    assert model.generate(asked, max_new_tokens=6) == before
    model.forget()
    with written(model, delta, 0):
        expected = model.generate(asked, max_new_tokens=6)
    model.forget()
    assert edited == expected
    assert edited != before
    assert edited[1] == before[1]


def test_a_reader_reads_from_before_the_image_tokens(model: EditableModel) -> None:
    delta = stacked(model, 1)
    encoded = model.encode([Query(query.prompt, query.image) for query in ASKED], answers=False)
    reader = Reader(model, encoded, 4)
    plain = reader.read()
    reader.read_below(*split_point(delta.spec))
    assert_close(reader.read(), plain, length=64)
    with installed(model, delta, Rows()):
        edited = reader.read()
        assert_close(Reader(model, encoded, 4).read(), edited, length=64)
    assert not torch.equal(edited[0], plain[0])
    assert torch.equal(edited[1], reader.read()[1])


def test_sites_have_names_and_shapes(model: EditableModel) -> None:
    sites = vision_sites(model)
    assert {site.layer for site in sites} == {-1}
    for site in sites:
        module: Any = model.module(site)
        assert (site.d_out, site.d_in) == tuple(module.weight.shape)
    assert sites[-1].d_out == model.hidden_size
    assert vision_sites(model, [sites[-1].name]) == [sites[-1]]
    with pytest.raises(ValueError, match=r"vision names must be among .* \(got name='up'\)"):
        vision_sites(model, ["up"])


@pytest.mark.parametrize("name", sorted(TILED))
def test_tiled_images_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be edited"):
        vision_sites(fastedit.load(f"random:{name}"))
