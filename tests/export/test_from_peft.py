"""Adapters that PEFT trained act as deltas exactly as in PEFT; what they do beyond LoRA is refused by name."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastedit
from fastedit.deltas import EditDelta
from fastedit.export import export_deltas
from fastedit.export.asking import compare_answers
from tests.engine.stock_calls import edits, fitted, inputs, load, questions, stock_answers, stock_logits
from tests.export.asked import asked_of

peft = pytest.importorskip("peft")
NAME = "random:llava-tiny"
FFN = ["up_proj", "down_proj"]
#: As a trainer that is much used writes them.
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:q_proj|up_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|up_proj)))"
)


def trained(folder: Path, name: str = NAME, steps: int = 3, dtype: str = "float64", **options: Any) -> Any:
    """PEFT's model, trained a little and saved."""
    model = load(name, dtype)
    torch.manual_seed(0)
    config = peft.LoraConfig(**{"r": 4, "target_modules": FFN, **options})
    adapted = peft.get_peft_model(copy.deepcopy(model.hf), config)
    asked = [dataclasses.replace(query, answer="seven red") for query in asked_of(name)[:2]]
    given = inputs(model, asked, left=False, answers=True)
    optimiser = torch.optim.SGD([each for each in adapted.parameters() if each.requires_grad], lr=1.0)
    for _ in range(steps):
        adapted(**given).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    adapted.eval().save_pretrained(folder)
    return adapted


def applied_logits(delta: Any, name: str = NAME, dtype: str = "float64") -> Tensor:
    model = load(name, dtype)
    with fastedit.attached(model, delta) as hf:
        return stock_logits(model, hf, asked_of(name))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": ["q_proj", "v_proj", "o_proj"], "lora_alpha": 32, "lora_dropout": 0.5},
        {"use_rslora": True, "lora_alpha": 3},
        {
            "rank_pattern": {"up_proj": 7, r"layers\.3\.mlp\.down_proj": 2},
            "alpha_pattern": {r".*\.2\.mlp\.down_proj": 1.5},
        },
        {"target_modules": UNSLOTH},
        {"target_modules": r".*language_model.*\.(q|gate)_proj", "init_lora_weights": "gaussian"},
        {"layers_to_transform": [1, 3], "layers_pattern": "layers", "target_modules": FFN},
        {"target_modules": ["linear_1", "linear_2", "down_proj"], "exclude_modules": ["layers.0.mlp.down_proj"]},
        {"fan_in_fan_out": True, "target_modules": ["k_proj"], "exclude_modules": r".*vision.*"},
    ],
    ids=["plain", "attention", "rslora", "patterns", "unsloth", "regex", "layers", "projector", "flags"],
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_a_trained_adapter_gives_the_logits_of_peft(options: dict[str, Any], tmp_path: Path) -> None:
    if "vision" not in str(options):
        # The vision tower's own maps are none that a delta stands beside
        options = {"exclude_modules": r".*vision_tower.*", **options}
    if isinstance(options.get("exclude_modules"), list):
        options["exclude_modules"] = r".*vision_tower.*|.*layers\.0\.mlp\.down_proj"
    adapted = trained(tmp_path, **options)
    delta = fastedit.from_peft(tmp_path, load(NAME))
    model = load(NAME)
    got, wanted = applied_logits(delta), stock_logits(model, adapted, questions(model))
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    assert (wanted - stock_logits(model, model.hf, questions(model))).abs().max() > 1e-3
    assert delta.spec.kind == "low_rank"
    paths = {path for path, module in adapted.get_base_model().named_modules() if hasattr(module, "lora_A")}
    assert {site.module_path for site in delta.spec.sites} == paths


@pytest.mark.parametrize("name", ["generic:phi3", "generic:gemma3", "random:blip2-tiny", "random:qwen2vl-tiny"])
def test_other_architectures_too(name: str, tmp_path: Path) -> None:
    targets = {"generic:phi3": ["qkv_proj", "down_proj"], "random:blip2-tiny": r"language_model.*(fc1|q_proj)"}
    options = {"target_modules": targets.get(name, r".*language_model.*\.(q_proj|down_proj)")}
    model = load(name)
    adapted = trained(tmp_path, name, **options)
    got = applied_logits(fastedit.from_peft(tmp_path, model), name)
    torch.testing.assert_close(got, stock_logits(model, adapted, asked_of(name)), rtol=1e-10, atol=1e-10)


def test_a_round_trip_is_the_same_delta(tmp_path: Path) -> None:
    model, delta = load(NAME), fitted(NAME, "lora")[0]
    export_deltas("peft", model, delta, tmp_path / "out")
    back = fastedit.from_peft(tmp_path / "out", model, request_id=delta.request_id)
    assert (back.request_id, back.fitted_on, back.model_fingerprint) == ("edit-0", (), model.fingerprint)
    for site in delta.spec.sites:
        part = f"{site.layer}.{site.name}"
        assert torch.equal(back.tensors[f"{part}:down"], delta.tensors[f"{part}:down"])
        scaled = delta.tensors[f"{part}:up"] * float(delta.spec.options["scale"])
        assert torch.equal(back.tensors[f"{part}:up"], scaled)
    assert torch.equal(applied_logits(back), applied_logits(delta))


def test_one_that_was_trained_in_half_precision_acts_in_float32(tmp_path: Path) -> None:
    trained(tmp_path, dtype="float32")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    model = load(NAME, "float32")
    delta = fastedit.from_peft(tmp_path, model)
    assert {tensor.dtype for tensor in delta.tensors.values()} == {torch.float32}
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(model.hf), tmp_path).eval()
    wanted = stock_logits(model, adapted, questions(model))
    torch.testing.assert_close(applied_logits(delta, dtype="float32"), wanted, rtol=0, atol=1e-5)


def test_names_of_earlier_releases_are_understood(tmp_path: Path) -> None:
    adapted = trained(tmp_path, exclude_modules=r".*vision_tower.*")
    file = tmp_path / "adapter_model.safetensors"
    old = {
        name.replace("base_model.model.model.language_model.", "base_model.model.language_model.model."): tensor
        for name, tensor in load_file(file).items()
    }
    assert all("base_model.model.language_model.model." in name for name in old)
    save_file(old, file, metadata={"format": "pt"})
    wanted = stock_logits(load(NAME), adapted, questions(load(NAME)))
    got = applied_logits(fastedit.from_peft(tmp_path, load(NAME)))
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def test_adapters_are_routed_beside_each_other_and_undone(tmp_path: Path) -> None:
    """Of other ranks and at other maps, and beside an edit of our own."""
    model, asked = load(NAME), questions(load(NAME))
    first = trained(tmp_path / "a", exclude_modules=r".*vision_tower.*")
    second = trained(tmp_path / "b", r=2, target_modules=r".*language_model.*\.q_proj")
    own = fitted(NAME, "lora")[0]
    deltas = [fastedit.from_peft(tmp_path / "a", model), fastedit.from_peft(tmp_path / "b", model), own]
    assert [delta.request_id for delta in deltas] == ["a", "b", "edit-0"]
    base = stock_logits(model, model.hf, asked)
    with fastedit.attached(model, own) as hf:
        edited = stock_logits(model, hf, asked)
    alone = [stock_logits(model, first, asked), stock_logits(model, second, asked), edited, base]
    rows = [0, 1, 2, -1, 1, 2]
    assert len(rows) == len(asked)
    with fastedit.attach(model, deltas) as attachment:
        got = stock_logits(model, model.hf, asked, edit_ids=rows)
        answers = stock_answers(model, model.hf, asked, edit_ids=rows)
        attachment.detach()
    wanted = torch.stack([alone[edit][row] for row, edit in enumerate(rows)])
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    assert answers[0] == stock_answers(model, first, asked)[0]
    assert torch.equal(stock_logits(model, model.hf, asked), base)


def test_an_adapter_is_scored_like_an_edit(tmp_path: Path) -> None:
    model, delta = load(NAME), fitted(NAME, "lora")[0]
    export_deltas("peft", model, delta, tmp_path / "out")
    back = fastedit.from_peft(tmp_path / "out", model)
    asked = compare_answers(model, edits()[:1], [delta], lambda _: [back], together=False)
    assert asked["changed"] == []
    assert asked["scores"]["reliability"] == {"exact": 1.0, "written": 1.0}


def change_config(**fields: Any) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return changed


def change_tensors(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        tensors = {name: tensor.contiguous() for name, tensor in change(load_file(file)).items()}
        save_file(tensors, file, metadata={"format": "pt"})

    return changed


def renamed(old: str, new: str) -> Callable[[Path], None]:
    return change_tensors(lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()})


def as_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def cut(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (as_pickle, "adapter_model.bin is a pickle, which can execute code; PEFT writes it anew"),
        (cut, "a whole safetensors file"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "must be JSON"),
        (change_config(peft_type="IA3"), r"is one of LoRA \(got peft_type='IA3'"),
        (change_config(use_dora=True), r"use_dora does more \(got use_dora=True"),
        (change_config(bias="all"), r"bias does more \(got bias='all'"),
        (change_config(lora_bias=True), "lora_bias does more"),
        (change_config(modules_to_save=["lm_head"]), r"modules_to_save does more \(got modules_to_save=\['lm_head'\]"),
        (change_config(target_parameters=["experts.down_proj"]), "target_parameters does more"),
        (change_config(trainable_token_indices=[1]), "trainable_token_indices does more"),
        (change_config(alora_invocation_tokens=[1]), "alora_invocation_tokens does more"),
        (change_config(layer_replication=[[0, 2]]), "layer_replication does more"),
        (change_config(something_of_tomorrow=1), "something_of_tomorrow does more"),
        (change_config(init_lora_weights="pissa"), "init_lora_weights='pissa' moves a part of those into them"),
        (change_config(r=5), r"rank of a module is that of adapter_config.json \(got factors of rank 4 .* r is 5\)"),
        (change_config(r="4"), "r is a number"),
        (change_config(target_modules=[1]), r"target_modules is text, a list of such or null \(got"),
        (change_config(layers_to_transform=["1"]), "layers_to_transform is a whole number, a list of such"),
        (change_config(alpha_pattern=[1]), "alpha_pattern is a mapping"),
        (change_config(alpha_pattern={"(": 1}), r"are regular \(got .*: "),
        (change_config(target_modules="(.*.*)*x"), "patterns of adapter_config.json repeat no groups"),
        (change_config(target_modules=".*" * 7 + "x"), r"repeat at most 6 times \(got '.*"),
        (change_config(rank_pattern={r"(a)\1": 4}), "repeat no groups, refer to none"),
        (change_config(layers_to_transform=[1], layers_pattern=["(a+)+"], target_modules=["down_proj"]), "no groups"),
        (change_config(target_modules=["up_proj"]), r"is a target of adapter_config.json \(got '.*down_proj', which"),
        (renamed("up_proj.lora_A", "up_proj.lora_C"), "tensors are lora_A.weight and lora_B.weight"),
        (renamed("layers.3.mlp", "layers.9.mlp"), "and the model has no such module"),
        (renamed("mlp.up_proj", "mlp"), "a LlamaMLP that is none of these"),
        (change_tensors(lambda t: {n: x for n, x in t.items() if "lora_A" in n}), "got lora_A alone of"),
        (change_tensors(lambda _: {}), "got none in path"),
        (change_tensors(lambda t: {n: x * float("nan") for n, x in t.items()}), "every value is finite"),
        (change_tensors(lambda t: {n: x[:, :3] for n, x in t.items()}), r"A \(r, \d+\) and B \(\d+, r\) \(got \(4,"),
        (change_tensors(lambda t: {n: x[0] for n, x in t.items()}), "matrices of real numbers"),
    ],
)  # fmt: skip
def test_what_is_more_than_lora_or_damaged_is_refused_by_name(
    damage: Callable[[Path], None], message: str, tmp_path: Path, adapter: Path
) -> None:
    for path in adapter.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert isinstance(fastedit.from_peft(tmp_path, load(NAME)), EditDelta)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        fastedit.from_peft(tmp_path, load(NAME))
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    trained(folder, exclude_modules=r".*vision_tower.*")
    return folder


def test_a_missing_file_is_named(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has adapter_config.json"):
        fastedit.from_peft(tmp_path, load(NAME))
    export_deltas("peft", load(NAME), fitted(NAME, "lora"), tmp_path / "each", each=True)
    with pytest.raises(FileNotFoundError, match=r"it holds adapters in folders, which index.json lists"):
        fastedit.from_peft(tmp_path / "each", load(NAME))
    (tmp_path / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"has adapter_model.safetensors"):
        fastedit.from_peft(tmp_path, load(NAME))


def test_dora_as_peft_saves_it_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, steps=1, use_dora=True, exclude_modules=r".*vision_tower.*")
    with pytest.raises(ValueError, match="use_dora does more"):
        fastedit.from_peft(tmp_path, load(NAME))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_maps_that_no_delta_stands_beside_are_refused(tmp_path: Path) -> None:
    trained(tmp_path / "tower", steps=1, target_modules=r".*vision_tower.*fc1")
    with pytest.raises(ValueError, match=r"got 'model.vision_tower.*fc1', a Linear that is none of these\)"):
        fastedit.from_peft(tmp_path / "tower", load(NAME))
    # With it PEFT saves the base model's own weight
    trained(tmp_path / "head", steps=1, target_modules=["lm_head"])
    with pytest.raises(ValueError, match=r"\(got 'base_model.model.lm_head.base_layer.weight'"):
        fastedit.from_peft(tmp_path / "head", load(NAME))
