"""SERAC from training to edits: what acts where, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fastedit
from fastedit import EditRequest, Query
from fastedit.backbone import EditableModel
from fastedit.methods.base import Resources
from fastedit.methods.serac.editor import SERAC, SERACConfig
from fastedit.training import Artifact
from tests.engine.conftest import make_edits

CONFIG: dict[str, Any] = {
    "layers": 2, "valid_records": 2, "scope_batch": 6, "scope_size": 8, "scope_hidden": 32, "scope_dropout": 0.0,
}  # fmt: skip
TRAINER = {"steps": 80, "batch_size": 6, "lr": 5e-3, "valid_every": None}


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return fastedit.load("random:llava-tiny", dtype="float32")


@pytest.fixture(scope="module")
def edits() -> list[EditRequest]:
    return make_edits(8)


@pytest.fixture(scope="module")
def artifact(model: EditableModel, edits: list[EditRequest]) -> Artifact:
    return fastedit.train(model, "serac", edits, trainer=TRAINER, swap=0.0, **CONFIG)


def test_trained_edits_act_in_their_scope_only(
    model: EditableModel, edits: list[EditRequest], artifact: Artifact
) -> None:
    """On the records that it was trained on: the whole path, not its generality."""
    run = fastedit.edit(model, edits[:6], "serac", artifact=artifact, **CONFIG)
    strict = {name: score.mean for name, score in run.scores["strict"].items()}
    assert strict["reliability"] >= 0.8
    assert strict["text_generality"] >= 0.8
    assert strict["text_locality"] == strict["blind"] == 1.0
    assert strict["near"] == strict["same"] == strict["image_locality"] == 1.0
    # What is left alone is left alone to the bit, under both protocols
    assert strict["near_kl"] == strict["text_locality_kl"] == 0.0
    assert run.scores["legacy"]["image_locality_top10"].mean == 1.0
    assert {outcome.status for outcome in run.outcomes} == {"computed"}


def test_an_edit_is_text_and_a_place(model: EditableModel, edits: list[EditRequest], artifact: Artifact) -> None:
    run = fastedit.edit(model, edits[:2], "serac", artifact=artifact, evaluate=False, **CONFIG)
    for edit, delta in zip(edits, run.deltas, strict=False):
        assert delta.texts["template"] == f"{edit.prompt} {edit.target}\n{{prompt}}"
        assert set(delta.texts) == {"template", "questions"}
        assert {name: tuple(tensor.shape) for name, tensor in delta.tensors.items()} == {"scope": (17,)}
        assert delta.spec.options["artifact"] == artifact.id
    alone = fastedit.edit(model, edits[1:2], "serac", artifact=artifact, evaluate=False, **CONFIG)
    torch.testing.assert_close(alone.deltas[0].tensors["scope"], run.deltas[1].tensors["scope"], rtol=1e-4, atol=1e-4)


def test_in_sequence_the_nearest_edit_answers(
    model: EditableModel, edits: list[EditRequest], artifact: Artifact
) -> None:
    run = fastedit.edit(model, edits[:6], "serac", artifact=artifact, mode="sequential", **CONFIG)
    alone = fastedit.edit(model, edits[:6], "serac", artifact=artifact, **CONFIG)
    for name in ("reliability", "text_generality"):
        assert run.scores["strict"][name].mean == alone.scores["strict"][name].mean
    with fastedit.applied(model, run.deltas):
        said = model.generate([edit.query for edit in edits[:6]], max_new_tokens=12)
    wanted = [a["after"] for each in alone.edit_scores for a in each.answers if a["score"] == "reliability"]
    assert said == wanted


def test_applied_edits_need_their_trained_part(
    model: EditableModel, edits: list[EditRequest], artifact: Artifact, tmp_path: Path
) -> None:
    run = fastedit.edit(model, edits[:1], "serac", artifact=artifact, evaluate=False, **CONFIG)
    path = fastedit.save_artifact(artifact, tmp_path / "serac.safetensors")
    ask = [Query(edits[0].prompt, edits[0].image)]
    with fastedit.applied(model, run.deltas):
        said = model.generate(ask, max_new_tokens=12)
    del model.artifacts[artifact.id]
    with pytest.raises(ValueError, match="load_artifact"), fastedit.applied(model, run.deltas):
        pass
    fastedit.load_artifact(path, model)
    with fastedit.applied(model, run.deltas):
        assert model.generate(ask, max_new_tokens=12) == said


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"layers": 1}, "sites"),
        ({"context": "{answer} {question} "}, "context"),
        ({"scope_size": 4}, "scope_size"),
        ({"scope_layer": 1}, "scope_layer"),
    ],
)
def test_edits_have_the_settings_of_their_trained_part(
    model: EditableModel, artifact: Artifact, change: dict[str, Any], told: str
) -> None:
    config = replace(SERACConfig(**CONFIG), **change)
    with pytest.raises(ValueError, match=f"serac: .*got {told}="):
        SERAC.setup(model, config, Resources(artifact=artifact))


def test_training_comes_first(model: EditableModel, edits: list[EditRequest]) -> None:
    with pytest.raises(ValueError, match=r"fastedit.train\(model, 'serac', records\)"):
        fastedit.edit(model, edits, "serac")
    with pytest.raises(ValueError, match=r"fastedit.train\(model, 'odedit\+serac', records\)"):
        fastedit.edit(model, edits, "odedit+serac")


def test_the_scope_reads_the_middle_of_the_model(
    model: EditableModel, edits: list[EditRequest], artifact: Artifact
) -> None:
    assert artifact.config["scope"]["layer"] == model.n_layers // 2
    # One trained before there was a choice reads what enters the first trained layer, and says nothing of it
    earlier = {**artifact.config, "scope": {**artifact.config["scope"], "layer": 0}}
    earlier["method"] = {k: v for k, v in earlier["method"].items() if k != "scope_layer"}
    old = replace(artifact, config=earlier)
    assert SERAC.setup(model, SERACConfig(**CONFIG, scope_layer=0), Resources(artifact=old)).heads.shape.layer == 0
    with pytest.raises(ValueError, match="got scope_layer=2, trained with 0"):
        SERAC.setup(model, SERACConfig(**CONFIG), Resources(artifact=old))
    with pytest.raises(ValueError, match=r"scope_layer is one of the model's layers, 0 to 3 \(got scope_layer=4\)"):
        fastedit.train(model, "serac", edits, trainer=TRAINER, **CONFIG, scope_layer=4)


def test_layers_follow_the_model(model: EditableModel) -> None:
    assert {site.layer for site in SERAC.spec(model, SERACConfig()).sites} == set(range(model.n_layers))
    assert {site.layer for site in SERAC.spec(model, SERACConfig(layers=1)).sites} == {model.n_layers - 1}
    with pytest.raises(ValueError, match="no question can be read any more"):
        SERAC.spec(model, SERACConfig(layers=1, names=("down",)))


def test_low_rank_change_and_published_scope(model: EditableModel, edits: list[EditRequest]) -> None:
    settings = {**CONFIG, "rank": 2, "faithful": True}
    trainer = {"steps": 2, "batch_size": 4, "valid_every": None}
    made = fastedit.train(model, "serac", edits, trainer=trainer, **settings)
    assert any(name.endswith("q:up") and tensor.any() for name, tensor in made.tensors.items())
    assert not any("image" in name for name in made.tensors)
    run = fastedit.edit(model, edits[:2], "serac", artifact=made, **settings)
    # Text alone says nothing of another image
    assert run.deltas[0].tensors["scope"].shape == (8,)
    routed = run.scores["strict"]["routed_in_wrongly"].mean
    assert routed > 0


def test_objectives_have_artifacts_of_their_own(model: EditableModel, edits: list[EditRequest]) -> None:
    trainer = {"steps": 2, "batch_size": 4, "valid_every": None}
    made = fastedit.train(model, "odedit+serac", edits, trainer=trainer, **CONFIG)
    assert made.kind == "odedit+serac"
    assert len(fastedit.edit(model, edits[:1], "odedit+serac", artifact=made, evaluate=False, **CONFIG).deltas) == 1
    with pytest.raises(ValueError, match="kind"):
        fastedit.edit(model, edits[:1], "serac", artifact=made, **CONFIG)


def test_what_does_not_fit_is_refused(model: EditableModel, edits: list[EditRequest], artifact: Artifact) -> None:
    long = replace(edits[0], target="so " * 60)
    with pytest.raises(ValueError, match=r"serac: the cached edit and its question fit into a prompt"):
        fastedit.edit(model, [long], "serac", artifact=artifact, **CONFIG)
    odd = replace(edits[0], target="{prompt}")
    with pytest.raises(ValueError, match=r"serac: an edit's text does not hold '\{prompt\}'"):
        fastedit.edit(model, [odd], "serac", artifact=artifact, **CONFIG)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("random:blip2-tiny", {}),
        ("random:qwen3vl-tiny", {}),
        ("random:qwen2vl-tiny", {"quantize": "nf4"}),
        ("random:llava-tiny", {"dtype": "bfloat16"}),
    ],
)
def test_every_family_and_precision(edits: list[EditRequest], name: str, settings: dict[str, str]) -> None:
    model = fastedit.load(name, **settings)
    trainer = {"steps": 3, "batch_size": 4, "valid_every": 3}
    made = fastedit.train(model, "serac", edits, trainer=trainer, **CONFIG)
    assert made.metrics["validation"][0]["blind"] == 1.0
    run = fastedit.edit(model, edits[:2], "serac", artifact=made, **CONFIG)
    assert run.scores["strict"]["text_locality"].mean == 1.0
    assert run.scores["strict"]["routed_in"].mean > 0
