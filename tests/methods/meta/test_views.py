"""Views for meta-training, and rows that are kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import fastedit
from fastedit.backbone import EditableModel
from fastedit.deltas import DeltaSpec
from fastedit.methods.meta.views import MetaBatch, MetaViews, RowStore
from fastedit.objectives import Role
from tests.engine.conftest import make_edits

KINDS = ["reliability", "text_generality", "image_generality", "text_locality", "image_locality"]


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return fastedit.load("random:llava-tiny", dtype="float64")


def spec_of(model: EditableModel) -> DeltaSpec:
    return DeltaSpec("low_rank", tuple(model.sites([model.n_layers - 1], ["up", "down"])), {"rank": 1})


def test_a_record_gives_its_own_questions_and_probes() -> None:
    records = make_edits(3)
    views = MetaViews(records).of(1)
    assert [each.kind for each in views] == [*KINDS, "near", "blind", "same"]
    queries = {each.kind: each.view.query for each in views}
    record = records[1]
    assert (queries["reliability"].prompt, queries["reliability"].answer) == (record.prompt, record.target)
    assert queries["text_generality"].prompt == record.rephrase
    assert queries["image_generality"].image is record.image_rephrase
    assert queries["text_locality"].prompt == record.locality_prompt
    assert queries["near"].image is record.probes[0].image
    # The answer of a blind question is not known: what is said with the image is fed
    assert queries["blind"].answer == record.prediction
    assert {each.kind: each.view.role for each in views}["blind"] is Role.TEXT_LOCALITY
    assert {each.kind: each.view.role for each in views}["near"] is Role.IMAGE_LOCALITY


def test_what_a_record_lacks_is_drawn_from_the_others() -> None:
    bare = [
        replace(record, rephrase=None, image_rephrase=None, locality_prompt=None, locality_answer=None, probes=(),
                prompt="What is it?")
        for record in make_edits(3)
    ]  # fmt: skip
    bare[1] = replace(bare[1], locality_prompt="Capital?", locality_answer="Rome")
    views = {each.kind: each.view.query for each in MetaViews(bare).of(0)}
    assert sorted(views) == sorted([*KINDS, "near"])
    assert views["text_generality"].prompt != bare[0].prompt
    assert views["text_locality"].prompt == "Capital?"
    assert views["near"].prompt == bare[0].prompt
    assert views["near"].image in [bare[1].image, bare[2].image]
    without_image = replace(bare[0], image=None)
    kinds = [each.kind for each in MetaViews([without_image, bare[1]]).of(0)]
    assert "image_generality" not in kinds
    assert "near" not in kinds


def test_views_of_an_epoch_are_drawn_once_and_for_all() -> None:
    views = MetaViews(make_edits(3), seed=1)
    kinds = [each.kind for each in views.of(0)]
    drawn = [views.chosen(0, epoch, 2) for epoch in range(20)]
    assert drawn == [MetaViews(make_edits(3), seed=1).chosen(0, epoch, 2) for epoch in range(20)]
    for numbers in drawn:
        assert numbers == sorted(set(numbers))
        assert [kinds[n] for n in numbers[:4]] == KINDS[:4]
        assert len(numbers) == 6
    assert {kinds[n] for numbers in drawn for n in numbers} == set(kinds)
    assert len(views.chosen(0, 0, 9)) == len(kinds)


@pytest.mark.parametrize("room", [1 << 30, 0])
def test_kept_rows_are_those_made_anew(model: EditableModel, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RowStore(model, spec_of(model), MetaViews(make_edits(3)), room)
    wanted = [(0, 0), (2, 3), (1, 1)]
    first = store.get(wanted)
    if room:

        def no_work(*_args: object, **_settings: object) -> None:
            raise AssertionError("walked again")

        monkeypatch.setattr(EditableModel, "encode", no_work)
    second = store.get(wanted[::-1])[::-1]
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a.state.hidden, b.state.hidden)
        assert torch.equal(a.labels, b.labels)
        assert (a.reference is None) == (b.reference is None)
        if a.reference is not None and b.reference is not None:
            torch.testing.assert_close(a.reference, b.reference)
    # Kept rows own their memory
    if room:
        assert second[0].state.hidden.untyped_storage().nbytes() == second[0].state.hidden.nbytes


def test_room_is_not_overdrawn(model: EditableModel) -> None:
    views = MetaViews(make_edits(3))
    size = RowStore(model, spec_of(model), views, 0).get([(0, 0)])[0].state.n_bytes
    store = RowStore(model, spec_of(model), views, int(1.5 * size))
    store.get([(0, 0), (0, 1), (0, 2), (0, 3)])
    assert store.room >= 0
    assert len(store._kept) >= 1


def test_a_batch_knows_whose_its_tokens_are(model: EditableModel) -> None:
    store = RowStore(model, spec_of(model), MetaViews(make_edits(3)), 1 << 30)
    rows = store.get([(0, 0), (0, 3), (1, 0), (2, 4)])
    batch = MetaBatch.of(rows, [2, 1, 1], ["a", "b", "c", "d"])
    lengths = [len(each.labels) for each in rows]
    assert torch.bincount(batch.row).tolist() == lengths
    assert torch.bincount(batch.edit).tolist() == [lengths[0] + lengths[1], lengths[2], lengths[3]]
    assert batch.rows.counts == (2, 1, 1)
    assert batch.reference is not None
    assert len(batch.reference) == lengths[1] + lengths[3] == int((batch.role >= int(Role.TEXT_LOCALITY)).sum())
