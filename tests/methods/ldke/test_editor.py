"""The LDKE-style editor: settings, whose layers are changed, what is routed out, what needs which trained part."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch

import fastedit
from fastedit import EditRequest
from fastedit.backbone import EditableModel
from fastedit.backbone.generation import Reader
from fastedit.deltas import split_point
from fastedit.fitting.prepared import EditRows, prepare
from fastedit.fitting.views import ViewSource
from fastedit.methods.base import Resources
from fastedit.methods.ldke import editor
from fastedit.methods.ldke.config import LDKEConfig, candidate_layers, wordings_of
from fastedit.methods.ldke.editor import LDKE
from fastedit.methods.ldke.localize import best_layers, layer_scores, random_layers, voted_layers
from fastedit.objectives import ROLES, Role
from fastedit.training import Artifact
from fastedit.training.config import MANY_RECORDS
from tests.engine.conftest import make_edits

TINY = "random:llava-tiny"
HASTY: dict[str, Any] = {"steps": 6, "batch_size": 4, "valid_every": 6, "warmup": 0}
SMALL: dict[str, Any] = {"candidates": (0, 1), "size": 16, "queries": 2, "key": 8}


class Untimed:
    def phase(self, _name: str) -> Any:
        return nullcontext()


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return fastedit.load(TINY)


@pytest.fixture(scope="module")
def artifact(model: EditableModel) -> Artifact:
    records = make_edits(10)[4:]
    return fastedit.train(model, "ldke", records, trainer=HASTY, show_progress=False, valid_records=2, top=1, **SMALL)


@pytest.fixture(scope="module")
def edits() -> list[EditRequest]:
    return make_edits(4)


def run(model: EditableModel, edits: list[EditRequest], **given: Any) -> Any:
    settings = {"steps": 4, "pool": make_edits(8)[4:], "show_progress": False, "batch_size": 4, **SMALL}
    return fastedit.edit(model, edits, "ldke", **{**settings, **given})


def rows_of(model: EditableModel, edits: list[EditRequest], pool: Any, **given: Any) -> tuple[Any, list[EditRows]]:
    spec = LDKE.spec(model, LDKEConfig(**{**SMALL, "top": 1, **given}))
    views = ViewSource(edits, pool)
    return spec.sites, prepare(model, spec, [views.views(n, ROLES) for n in range(len(edits))], Untimed())


@pytest.mark.parametrize(
    ("n_layers", "expected"),
    [
        (4, (1, 2, 3)),
        (3, (0, 1, 2)),
        (2, (0, 1)),
        (28, (7, 10, 13, 16, 18, 21, 24, 27)),
        (32, (8, 11, 15, 18, 21, 24, 28, 31)),
    ],
)
def test_candidates_lie_behind_the_first_quarter(n_layers: int, expected: tuple[int, ...]) -> None:
    assert candidate_layers(LDKEConfig(top=2), n_layers) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layers": "best"}, r"layers is one of \['auto', 'voted', 'random'\].*got layers='best'"),
        ({"score": "norm"}, "score is one of"),
        ({"groups": ("last", "first")}, "groups are of"),
        ({"groups": ()}, "groups are of"),
        ({"positions": "image"}, "positions is one of"),
        ({"top": 0}, "top is at least 1"),
        ({"rank": 0}, "rank is at least 1"),
        ({"n_views": 0}, r"n_views is at least 1.*got n_views=0"),
        ({"threshold": 1.0}, r"threshold is a probability \(got threshold=1.0\)"),
        ({"kl_weight": -1.0}, "kl_weight is not negative"),
        ({"alpha": 0.0}, "alpha is positive"),
    ],
)
def test_settings_are_checked(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LDKEConfig(**given)


def test_layers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="include an earlier layer than the last"):
        candidate_layers(LDKEConfig(candidates=1, top=1), 4)
    assert candidate_layers(LDKEConfig(candidates=1, top=1, route=False), 4) == (3,)
    with pytest.raises(ValueError, match=r"at most as many layers as there are candidates, \[2, 3\]"):
        candidate_layers(LDKEConfig(candidates=2, layers=3), 4)
    with pytest.raises(ValueError, match="layers lie in 0 to 3"):
        candidate_layers(LDKEConfig(candidates=(1, 7)), 4)


def test_layers_outside_of_the_candidates_are_refused(model: EditableModel) -> None:
    with pytest.raises(ValueError, match=r"layers are of the candidates \[1\]"):
        run(model, make_edits(2), candidates=(1,), layers=(0,), route=False)


def test_the_spec_says_what_the_router_keeps(model: EditableModel) -> None:
    spec = LDKE.spec(model, LDKEConfig(**SMALL, top=1))
    assert [site.layer for site in spec.sites] == [0, 1]
    assert split_point(spec) == (0, "ffn")
    assert spec.options["router"] == "classifier"
    assert (spec.options["entity"], spec.options["image"]) == (16, model.hidden_size)
    assert "router" not in LDKE.spec(model, LDKEConfig(**SMALL, top=1, route=False)).options


def test_an_edit_changes_the_layers_that_it_is_found_in(model: EditableModel, edits: list[EditRequest]) -> None:
    pool = make_edits(8)[4:]
    sites, rows = rows_of(model, edits, pool)
    for score in ("activation", "weight"):
        expected = best_layers(layer_scores(model, sites, rows, score=score, probes=0.25), 1)
        made = run(model, edits, route=False, top=1, score=score, probes=0.25)
        assert [tuple((d.tensors["layers"] - 1).int().tolist()) for d in made.deltas] == expected
        for delta in made.deltas:
            assert float(delta.tensors["up"].norm()) > 0


def test_other_ways_to_choose_layers(model: EditableModel, edits: list[EditRequest], artifact: Artifact) -> None:
    def chosen(**given: Any) -> list[tuple[int, ...]]:
        made = run(model, edits, route=False, steps=1, evaluate=False, **given)
        return [tuple((d.tensors["layers"] - 1).int().tolist()) for d in made.deltas]

    assert chosen(layers=1) == [(1,)] * 4
    assert chosen(layers=(0,)) == [(0,)] * 4
    assert chosen(layers=(0, 1)) == [(0, 1)] * 4
    # Where there is nothing to choose, nothing is looked for
    assert chosen(top=2) == [(0, 1)] * 4
    told = [f"0|{e.id}|{e.prompt}|{e.target}" for e in edits]
    assert chosen(layers="random", top=1) == [random_layers(2, 1, each) for each in told]
    pool = make_edits(8)[4:]
    spec_rows = rows_of(model, pool, None, layers="voted")
    records = ViewSource(pool, None, source="record")
    views = [records.views(n, ROLES) for n in range(4)]
    rows = prepare(model, LDKE.spec(model, LDKEConfig(**SMALL, top=1)), views, Untimed())
    expected = voted_layers(layer_scores(model, spec_rows[0], rows), 1)
    assert chosen(layers="voted", top=1) == [expected] * 4
    told_of = run(model, edits, route=False, steps=1, evaluate=False, layers="voted", top=1).provenance
    assert told_of["notes"] == {"localization": "voted"}
    with pytest.raises(ValueError, match=r"records vote for layers='voted'; give pool="):
        LDKE.setup(model, LDKEConfig(**SMALL, layers="voted", top=1, route=False), Resources())
    assert len(artifact.config["voted"]) == 1
    kept = LDKE.setup(model, LDKEConfig(**SMALL, layers="voted", top=1), Resources(artifact=artifact))
    assert kept.positions == tuple(artifact.config["voted"])


def test_where_all_candidates_are_taken_nothing_is_looked_for(
    model: EditableModel, edits: list[EditRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any, **__: Any) -> Any:
        raise AssertionError("a localization pass")

    monkeypatch.setattr(editor, "layer_scores", none)
    trainer = {"steps": 1, "batch_size": 4, "valid_every": None}
    made = fastedit.train(model, "ldke", make_edits(10), trainer=trainer, valid_records=2, **SMALL, top=2)
    assert "voted" not in made.config
    for layers in ("auto", "voted", "random", 1):
        settings = {"layers": layers, "top": 2, "route": False, "steps": 1, "evaluate": False}
        assert run(model, edits, **settings).provenance["notes"] == {"localization": "off"}
    with pytest.raises(AssertionError, match="a localization pass"):
        run(model, edits, top=1, route=False, steps=1, evaluate=False)


def test_what_is_routed_out_is_untouched_to_the_bit(
    model: EditableModel, edits: list[EditRequest], artifact: Artifact
) -> None:
    queries = [query for edit in edits for query in (edit.query, *(p.query for p in edit.probes))]
    encoded = model.encode(queries, answers=False)
    before = Reader(model, encoded, 4).read()
    made = run(model, edits, artifact=artifact, top=1, threshold=0.97, lr=0.1, evaluate=False)
    with fastedit.applied(model, made.deltas[1]):
        after = Reader(model, encoded, 4).read()
        acts = [edit >= 0 for edit in model.holders[0].choice]
    assert True in acts
    assert False in acts
    for row, acting in enumerate(acts):
        assert torch.equal(after[row], before[row]) != acting
    assert torch.equal(Reader(model, encoded, 4).read(), before)


def test_its_own_question_is_always_let_in(model: EditableModel, edits: list[EditRequest], artifact: Artifact) -> None:
    made = run(model, edits, artifact=artifact, top=1, threshold=0.97)
    for scores in made.edit_scores:
        acted = {one["score"]: one["acted"] for one in scores.answers if one["score"] in ("reliability", "blind")}
        assert acted == {"reliability": True, "blind": False}
    sequence = run(model, edits, artifact=artifact, top=1, threshold=0.97, mode="sequential")
    for ours, theirs in zip(made.deltas, sequence.deltas, strict=True):
        assert all(torch.equal(ours.tensors[name], theirs.tensors[name]) for name in ours.tensors)
    assert sequence.scores["strict"]["reliability"].mean == made.scores["strict"]["reliability"].mean


@pytest.mark.parametrize("positions", ["all", "after_image", "answer"])
def test_what_an_edit_leaves_does_not_depend_on_its_batch(
    model: EditableModel, edits: list[EditRequest], artifact: Artifact, positions: str
) -> None:
    together = run(model, edits, artifact=artifact, top=1, steps=1, positions=positions)
    assert together.scores["strict"]["routed_in"].mean > 0
    alone = run(model, edits, artifact=artifact, top=1, steps=1, positions=positions, batch_size=1, evaluate=False)
    everywhere = run(model, edits, artifact=artifact, top=1, steps=1, evaluate=False)
    for ours, theirs in zip(together.deltas, everywhere.deltas, strict=True):
        assert torch.equal(ours.tensors["image"], theirs.tensors["image"])
    for ours, theirs in zip(together.deltas, alone.deltas, strict=True):
        for name in ("layers", "entity", "relation", "image"):
            torch.testing.assert_close(ours.tensors[name], theirs.tensors[name])
        assert ours.spec.options["artifact"] == artifact.id


def test_a_classifier_of_other_settings_is_refused(
    model: EditableModel, edits: list[EditRequest], artifact: Artifact
) -> None:
    with pytest.raises(ValueError, match=r"got candidates=\[0\], trained with \[0, 1\]"):
        run(model, edits, artifact=artifact, candidates=(0,), top=1)
    with pytest.raises(ValueError, match=r"got size=8, trained with 16"):
        run(model, edits, artifact=artifact, size=8, top=1)
    with pytest.raises(ValueError, match=r"fastedit\.train\(model, 'ldke'"):
        run(model, edits)
    with pytest.raises(ValueError, match="has no trained parts"):
        run(model, edits, artifact=artifact, route=False)


def test_it_goes_with_the_other_objectives(model: EditableModel, edits: list[EditRequest], artifact: Artifact) -> None:
    settings = {"steps": 2, "pool": make_edits(8)[4:], "show_progress": False, "artifact": artifact, "top": 1, **SMALL}
    for name in ("odedit+ldke", "kl+ldke"):
        made = fastedit.edit(model, edits, name, **settings)
        assert {outcome.steps for outcome in made.outcomes} == {2}


def test_an_edit_is_fitted_on_as_many_views_as_wanted(model: EditableModel, edits: list[EditRequest]) -> None:
    objective = LDKE.objective(LDKEConfig(n_views=3))
    assert Counter(objective.roles) == {Role.EDIT: 1, **dict.fromkeys(ROLES[1:], 3)}
    found = [run(model, edits[:1], route=False, evaluate=False, n_views=n).deltas[0] for n in (1, 2)]
    assert any(not torch.equal(found[0].tensors[name], found[1].tensors[name]) for name in found[0].tensors)


def test_few_records_do_not_teach_rewordings_unless_told_to() -> None:
    config = LDKEConfig()
    assert [wordings_of(config, count) for count in (2, MANY_RECORDS - 1, MANY_RECORDS, 5000)] == [0, 0, 4, 4]
    assert [wordings_of(LDKEConfig(wordings=number), count) for number in (0, 2) for count in (2, 5000)] == [0, 0, 2, 2]
    with pytest.raises(ValueError, match=r"ldke: wordings is at least 0, or None \(got wordings=-1\)"):
        LDKEConfig(wordings=-1)
