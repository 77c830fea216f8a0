"""``fastedit.train``: trained parts from a name, kept on disk, gone on with, never made twice."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import fastedit
from fastedit.backbone import EditableModel
from fastedit.backbone.prompts import PromptBuilder
from fastedit.engine import train as train_module
from fastedit.methods import METHODS, resolve
from fastedit.training import TrainerConfig
from tests.engine.conftest import make_edits, with_held_out

SMALL: dict[str, Any] = {"layers": 1, "rank": 4, "valid_records": 2}
BRIEF: dict[str, Any] = {"steps": 3, "batch_size": 2}


def train(model: EditableModel, method: str = "mend", **settings: Any) -> fastedit.Artifact:
    return fastedit.train(model, method, make_edits(6), **{"trainer": BRIEF, **SMALL, **settings})


def test_a_second_thread_does_not_train_beside_the_first(model: EditableModel) -> None:
    with train_module._TRAINING, pytest.raises(RuntimeError, match="one thread of a process may train at a time"):
        fastedit.train(model, "mend", make_edits(6), trainer={"steps": 1, "batch_size": 2})


def test_what_is_trained_serves_the_method_as_spelled(model: EditableModel, tmp_path: Path) -> None:
    edits = make_edits(2)
    for name in ("mend", "odedit+mend", "kl+mend"):
        artifact = train(model, name)
        assert artifact.kind == name
        run = fastedit.edit(model, edits, name, artifact=artifact, evaluate=False, pool=make_edits(4), **SMALL)
        assert all(delta.norm > 0 for delta in run.deltas)
        path = fastedit.save_artifact(artifact, tmp_path / name)
        again = fastedit.edit(model, edits, name, artifact=path, evaluate=False, pool=make_edits(4), **SMALL)
        for a, b in zip(run.deltas, again.deltas, strict=True):
            assert all((a.tensors[part] == b.tensors[part]).all() for part in a.tensors)


def test_it_is_kept_and_not_made_twice(model: EditableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "runs" / "mend.safetensors"
    made = train(model, out=path)
    assert [p.name for p in path.parent.iterdir()] == ["mend.safetensors"]
    assert fastedit.load_artifact(path, model).id == made.id

    calls: list[Any] = []
    real = train_module.train_task
    monkeypatch.setattr(train_module, "train_task", lambda *a, **k: calls.append(a) or real(*a, **k))
    assert train(model, out=path).id == made.id
    assert not calls
    for changed in ({"resume": False}, {"edit_lr": 0.5}, {"trainer": {**BRIEF, "lr": 0.5}}, {"rank": 3}):
        train(model, out=path, **changed)
        assert calls, changed
        calls.clear()
    # Of another method, or broken: made anew
    fastedit.save_artifact(train(model, "kl+mend"), path)
    calls.clear()
    assert train(model, out=path).kind == "mend"
    assert calls
    path.write_bytes(b"broken")
    assert train(model, out=path).id == made.id


def test_a_broken_off_run_goes_on(exact_model: EditableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastedit.methods.meta.task import MetaTask

    path = tmp_path / "mend.safetensors"
    settings = {"trainer": {**BRIEF, "steps": 6, "checkpoint_every": 2}}
    whole = train(exact_model, **settings)
    real, seen = MetaTask.loss, []

    def loss(self: MetaTask, step: int) -> Any:
        seen.append(step)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return real(self, step)

    monkeypatch.setattr(MetaTask, "loss", loss)
    with pytest.raises(KeyboardInterrupt):
        train(exact_model, out=path, **settings)
    assert [p.name for p in tmp_path.iterdir()] == ["mend.safetensors.training"]
    found = train(exact_model, out=path, **settings)
    assert found.metrics["validation"] == whole.metrics["validation"]
    # The second epoch's records meet the first time here, and how many rows a product has is felt by its rounding
    for name, values in whole.tensors.items():
        torch.testing.assert_close(found.tensors[name], values, rtol=5e-7, atol=1e-8)
    assert seen == [0, 1, 2, 3, 2, 3, 4, 5]
    assert [p.name for p in tmp_path.iterdir()] == ["mend.safetensors"]


def test_trainer_settings_go_over_the_methods_own(model: EditableModel) -> None:
    config = TrainerConfig(steps=2, batch_size=2, seed=4)
    assert train(model, trainer=config).metrics["trainer"]["seed"] == 4
    assert train(model, trainer={**BRIEF, "seed": 4}).metrics["trainer"]["steps"] == 3
    with pytest.raises(ValueError, match=r"trainer is one of .*batch_size.* \(got step=3\)"):
        train(model, trainer={"step": 3})


def test_what_cannot_be_trained_is_refused_before_any_work(
    model: EditableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EditableModel, "encode", None)
    with pytest.raises(ValueError, match=r"a method with trained parts, of .*mend.* \(got 'lora'\)"):
        fastedit.train(model, "lora", make_edits(2))
    with pytest.raises(ValueError, match=r"at least one record"):
        fastedit.train(model, "mend", [])
    with pytest.raises(ValueError, match=r"field 'ranks' is not known; did you mean 'rank'"):
        train(model, ranks=3)


@pytest.mark.parametrize("method", ["mend", "serac"])
def test_memory_that_runs_out_in_a_step_changes_nothing(
    model: EditableModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str
) -> None:
    own = SMALL if method == "mend" else {"valid_records": 2}

    def made(**settings: Any) -> fastedit.Artifact:
        return fastedit.train(model, method, make_edits(6), trainer=BRIEF, **own, **settings)

    from fastedit.training import trainer

    # Features and answers of the model come out of batches, and are kept: the first training makes them in others
    model.forget()
    made()
    expected, real = made(), trainer._step
    for failures in (1, 2):
        calls: list[int] = []

        def step(*args: Any, failures: int = failures, calls: list[int] = calls) -> Any:
            calls.append(1)
            if 2 <= len(calls) < 2 + failures:
                raise RuntimeError("CUDA error: out of memory")
            return real(*args)

        monkeypatch.setattr(trainer, "_step", step)
        warned = pytest.warns(RuntimeWarning, match=f"train {method}: memory ran out in a step of batch_size=2; trying")
        if failures == 1:
            with warned:
                assert made().id == expected.id
            assert len(calls) == 4
        else:
            with warned, pytest.raises(RuntimeError, match="out of memory"):
                made(out=tmp_path / "part")


@pytest.mark.parametrize("method", [*METHODS, "kl+lora", "odedit+lora"])
def test_no_method_is_shown_wordings_that_only_measure(
    model: EditableModel, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither trained parts nor pools nor an edit's own record lets a method see them."""
    asked: list[str] = []
    text = PromptBuilder.text

    def noted(self: PromptBuilder, prompt: str, *rest: Any, **options: Any) -> str:
        asked.append(prompt)
        return text(self, prompt, *rest, **options)

    monkeypatch.setattr(PromptBuilder, "text", noted)
    edits, pool = [with_held_out(edit) for edit in make_edits(2)], [with_held_out(edit) for edit in make_edits(12)[6:]]
    plan = resolve(method, {})
    fields = {field.name for field in dataclasses.fields(plan.config)}
    given: dict[str, Any] = {name: 2 for name in ("steps", "k") if name in fields}
    if plan.artifact_kind is not None:
        few = {name: 2 for name in ("steps", "valid_records") if name in fields}
        few |= {"calibration": 4} if "calibration" in fields else {}
        hasty = {"steps": 2, "batch_size": 2, "valid_every": 2, "warmup": 0}
        given["artifact"] = fastedit.train(model, plan.artifact_kind, pool, trainer=hasty, show_progress=False, **few)
    run = fastedit.edit(model, edits, method, pool=pool, evaluate=False, show_progress=False, **given)
    # It looks how much room the longest question leaves for demonstrations
    shown = [text for delta in run.deltas for text in delta.texts.values()] if method == "ike" else asked
    assert any(edits[0].prompt in text for text in shown)
    assert not [text for text in shown if "zebra" in text]
