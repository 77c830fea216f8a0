"""What PEFT makes of an exported adapter is what ``applied`` does; and the format is what PEFT and vLLM read."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import warnings
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import fastedit
from fastedit.backbone import EditableModel
from fastedit.data.images import open_image
from fastedit.deltas import DeltaSpec, EditDelta
from fastedit.export import Exported, export_deltas
from fastedit.export.peft import adapter_config, adapter_name
from fastedit.export.placing import EXPORT_FILE
from tests.backbone.architectures import make_editable
from tests.engine.stock_calls import edits, engine_logits, fitted, load, questions, stock_answers, stock_logits
from tests.export.asked import asked_of, fitted_on
from tests.programs import OTHERS, host

peft = pytest.importorskip("peft")
#: One of a family's own walk, a text model, image-text models walked by tracing, one with fused maps, an encoder.
MODELS = [
    "random:llava-tiny",
    "generic:qwen3",
    "generic:gemma3",
    "generic:phi3",
    "generic:llava+phi3",
    "random:blip2-tiny",
]


def exported(name: str, deltas: Sequence[EditDelta], folder: Path, **options: Any) -> Exported:
    return export_deltas("peft", load(name), deltas, folder, **options)


def with_adapter(model: EditableModel, folder: Path | str, **options: Any) -> Any:
    """PEFT's model around a copy of the stock one."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*(meta|dtype|regex).*")
        return peft.PeftModel.from_pretrained(copy.deepcopy(model.hf), folder, **options).eval()


def tensors_of(folder: Path) -> dict[str, Tensor]:
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_applied(name: str, tmp_path: Path) -> None:
    model, delta = load(name), fitted_on(name, "lora")[0]
    made = exported(name, [delta], tmp_path / "out")
    adapted = with_adapter(model, tmp_path / "out")
    with fastedit.attached(model, delta) as hf:
        wanted = stock_logits(model, hf, asked_of(name))
        answers = stock_answers(model, hf, asked_of(name))
    got = stock_logits(model, adapted, asked_of(name))
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)
    assert stock_answers(model, adapted, asked_of(name)) == answers
    assert (wanted - stock_logits(model, model.hf, asked_of(name))).abs().max() > 1e-2
    assert {path.name for path in made.files} == {"adapter_config.json", "adapter_model.safetensors", EXPORT_FILE}
    # No other module became an adapter's
    layers = {path for path, module in adapted.get_base_model().named_modules() if hasattr(module, "lora_A")}
    assert layers == {site.module_path for site in delta.spec.sites}


def random_delta(model: EditableModel, layer: int) -> EditDelta:
    """At every map of a layer."""
    paths = model.adapter.text.paths_of(layer)
    sites = [site for site in model.sites([layer], list(paths)) if isinstance(model.module(site), nn.Linear)]
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for site in sites:
        for part, shape in (("down", (site.d_in, 2)), ("up", (2, site.d_out))):
            drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
            tensors[f"{site.layer}.{site.name}:{part}"] = 0.1 * drawn
    spec = DeltaSpec("low_rank", tuple(sites), {"rank": 2, "scale": 1.0})
    return EditDelta(spec, tensors, model.fingerprint, "random", fitted_on=())


@pytest.mark.parametrize(
    "key",
    ["qwen3_5_moe", "gemma3n", "mllama", "llava+mixtral", "kimi_k25", "instructblip+opt", "instructblip+t5", "phi",
     "gpt_oss", "lfm2"],
)  # fmt: skip
def test_maps_of_every_kind_of_layer(key: str, tmp_path: Path) -> None:
    """Linear attention, cross attention, experts beside, convolutions, biases, encoders."""
    name = f"generic:{key}"
    model, asked = load(name), asked_of(name)[:3]
    base = engine_logits(model, asked)
    for layer in (0, model.n_layers - 1):
        delta = random_delta(model, layer)
        exported(name, [delta], tmp_path / str(layer))
        adapted = with_adapter(model, tmp_path / str(layer)).get_base_model()
        with fastedit.applied(model, delta):
            wanted = engine_logits(model, asked)
        got = engine_logits(make_editable(key, adapted), asked)
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)
        assert (wanted - base).abs().max() > 1e-3
        layers = {path for path, module in adapted.named_modules() if hasattr(module, "lora_A")}
        assert layers == {site.module_path for site in delta.spec.sites}
        with fastedit.applied(model, fastedit.from_peft(tmp_path / str(layer), model)):
            torch.testing.assert_close(engine_logits(model, asked), wanted, rtol=1e-11, atol=1e-11)


def test_names_that_peft_takes_for_experts_are_refused(tmp_path: Path) -> None:
    """It would make adapters of the experts' parameters, and say nothing."""
    name = "generic:deepseek_v3"
    model = load(name)
    for layer in (0, model.n_layers - 1):
        with pytest.raises(
            ValueError, match=r"'deepseek_v3' PEFT takes targets named down_proj, gate, .* \(got 'model"
        ):
            exported(name, [random_delta(model, layer)], tmp_path / "out")


def test_in_float32_logits_agree_to_1e_5(tmp_path: Path) -> None:
    model = load("random:llava-tiny", "float32")
    delta = fitted("random:llava-tiny", "lora", "float32")[0]
    export_deltas("peft", model, delta, tmp_path / "out")
    with fastedit.attached(model, delta) as hf:
        wanted = stock_logits(model, hf, questions(model))
    got = stock_logits(model, with_adapter(model, tmp_path / "out"), questions(model))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("quantize", "dtype", "tolerance"),
    [("nf4", "float32", 1e-5), ("int8", "float32", 0.05), ("none", "bfloat16", 0.13), ("nf4", "bfloat16", 0.13)],
)
def test_quantized_and_half_precision_models(quantize: str, dtype: str, tolerance: float, tmp_path: Path) -> None:
    """In bfloat16 to 4 units in the last place of logits up to 9; int8 rounds activations too, to steps of 1 / 127."""
    model = fastedit.load("random:llava-tiny", dtype=dtype, quantize=quantize)
    options: dict[str, Any] = {"steps": 20, "lr": 2e-2, "evaluate": False, "show_progress": False}
    delta = fastedit.edit(model, edits(), "lora", **options).deltas[0]
    export_deltas("peft", model, delta, tmp_path / "out")
    asked = questions(model)
    base = stock_logits(model, model.hf, asked)
    with fastedit.attached(model, delta) as hf:
        wanted = stock_logits(model, hf, asked)
    got = stock_logits(model, peft.PeftModel.from_pretrained(model.hf, tmp_path / "out").eval(), asked)
    torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance)
    assert (wanted - base).abs().max() > 1


def test_a_model_whose_prompts_an_encoder_reads(tmp_path: Path) -> None:
    name = "generic:blip-2+t5"
    model, delta = load(name), fitted(name, "lora")[0]
    exported(name, [delta], tmp_path / "out")
    adapted = make_editable("blip-2+t5", with_adapter(model, tmp_path / "out").get_base_model())
    with fastedit.applied(model, delta):
        wanted = engine_logits(model, questions(model))
    torch.testing.assert_close(engine_logits(adapted, questions(model)), wanted, rtol=1e-11, atol=1e-11)
    assert (wanted - engine_logits(model, questions(model))).abs().max() > 1e-2


@pytest.mark.parametrize("method", ["lora", "odedit+lora"])
def test_a_sequence_is_one_adapter_whose_rank_is_the_sum(method: str, tmp_path: Path) -> None:
    name = "random:llava-tiny"
    model, deltas = load(name), fitted(name, method, mode="sequential")
    made = exported(name, deltas, tmp_path / "out")
    (adapter,) = made.report["adapters"]
    assert adapter["rank"] == sum(int(delta.spec.options["rank"]) for delta in deltas) == 16
    assert (adapter["requests"], made.report["max_lora_rank"]) == (["edit-0", "edit-1"], 16)
    with fastedit.attached(model, deltas) as hf:
        wanted = stock_logits(model, hf, questions(model))
    got = stock_logits(model, with_adapter(model, tmp_path / "out"), questions(model))
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


def test_rows_of_a_mixed_batch_are_those_of_each_edit_alone(tmp_path: Path) -> None:
    name = "random:llava-tiny"
    model, deltas = load(name), fitted(name, "lora")
    made = exported(name, deltas, tmp_path / "out", each=True, requests=edits())
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    names = [adapter["name"] for adapter in index["adapters"]]
    assert names == ["000000-edit-0", "000001-edit-1"]
    assert [adapter["target"] for adapter in index["adapters"]] == [edit.target for edit in edits()]
    assert len(made.files) == 2 * 2 + 2
    adapted = with_adapter(model, tmp_path / "out", adapter_name=names[0], subfolder=names[0])
    adapted.load_adapter(str(tmp_path / "out"), names[1], subfolder=names[1])
    asked = questions(model)
    rows = [names[0], names[1], "__base__", names[0], "__base__", names[1]][: len(asked)]
    got = stock_logits(model, adapted, asked, adapter_names=rows)
    alone = {"__base__": stock_logits(model, model.hf, asked)}
    written = {"__base__": stock_answers(model, model.hf, asked)}
    for key, delta in zip(names, deltas, strict=True):
        with fastedit.attached(model, delta) as hf:
            alone[key], written[key] = stock_logits(model, hf, asked), stock_answers(model, hf, asked)
    wanted = torch.stack([alone[key][row] for row, key in enumerate(rows)])
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)
    answers = stock_answers(model, adapted, asked, adapter_names=rows)
    assert answers == [written[key][row] for row, key in enumerate(rows)]
    assert not torch.allclose(wanted[0], alone["__base__"][0], atol=1e-3)


def test_a_rank_says_what_it_left_out_and_what_that_changed(tmp_path: Path) -> None:
    name = "random:llava-tiny"
    model, deltas = load(name), fitted(name, "lora", mode="sequential")
    made = exported(name, deltas, tmp_path / "out", rank=2, requests=edits())
    (adapter,) = made.report["adapters"]
    assert adapter["rank"] == 2
    assert all(0.01 < error < 1 for error in adapter["relative_error"].values())
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (2, 2, {})
    adapted = with_adapter(model, tmp_path / "out")
    asked = made.report["asked"]
    assert asked["edits"] == 2
    # The report's answers are those of the adapter
    query = fastedit.Query(edits()[0].prompt, edits()[0].image)
    got = stock_answers(model, adapted, [query], max_new_tokens=48)[0]
    with fastedit.applied(model, deltas):
        exact = model.generate([query], max_new_tokens=48)[0]
    changed = [each for each in asked["changed"] if (each["request"], each["score"]) == ("edit-0", "reliability")]
    assert changed == (
        [{"request": "edit-0", "score": "reliability", "prompt": query.prompt, "exact": exact, "written": got}]
        if exact != got
        else []
    )
    assert asked["changed"]
    assert json.loads((tmp_path / "out" / EXPORT_FILE).read_text())["report"]["asked"] == asked


class _InFiles(Sequence[EditDelta]):
    """Copies of a delta that are made when they are read; knows how many there were at a time."""

    def __init__(self, delta: EditDelta, size: int) -> None:
        self.delta, self.size, self.most = delta, size, 0
        self._alive: weakref.WeakSet[Tensor] = weakref.WeakSet()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(self.size)[index]]
        if index >= self.size:
            raise IndexError(index)
        tensors = {name: tensor.clone() for name, tensor in self.delta.tensors.items()}
        self._alive.add(next(iter(tensors.values())))
        self.most = max(self.most, len(self._alive))
        return dataclasses.replace(self.delta, tensors=tensors, request_id=f"edit-{index}")


def test_deltas_in_files_are_read_one_at_a_time(tmp_path: Path) -> None:
    deltas = _InFiles(fitted("random:llava-tiny", "lora")[0], 9)
    made = exported("random:llava-tiny", deltas, tmp_path / "out", each=True)
    assert [adapter["name"] for adapter in made.report["adapters"]] == [f"00000{n}-edit-{n}" for n in range(9)]
    assert deltas.most <= 3


def test_a_rank_that_leaves_nothing_out_asks_nothing(tmp_path: Path) -> None:
    made = exported("random:llava-tiny", fitted("random:llava-tiny", "lora")[:1], tmp_path / "out", rank=8,
                    requests=edits()[:1])  # fmt: skip
    assert made.report["asked"] is None
    assert set(made.report["adapters"][0]["relative_error"].values()) == {0.0}


def test_full_deltas_become_adapters_of_a_rank(tmp_path: Path) -> None:
    name = "random:llava-tiny"
    model, deltas = load(name), fitted(name, "ft")
    made = exported(name, deltas, tmp_path / "out", each=True, rank=4, requests=edits())
    assert [adapter["rank"] for adapter in made.report["adapters"]] == [4, 4]
    assert min(min(adapter["relative_error"].values()) for adapter in made.report["adapters"]) > 0.01
    exported(name, deltas[:1], tmp_path / "whole", rank=1000)
    with fastedit.attached(model, deltas[0]) as hf:
        wanted = stock_logits(model, hf, questions(model))
    got = stock_logits(model, with_adapter(model, tmp_path / "whole"), questions(model))
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def test_maps_before_the_decoder_are_named_by_their_paths_too(tmp_path: Path) -> None:
    name = "random:llava-tiny"
    model, delta = load(name), fitted(name, "ft-vision")[0]
    exported(name, [delta], tmp_path / "out", rank=1000)
    with fastedit.attached(model, delta) as hf:
        wanted = stock_logits(model, hf, questions(model))
    got = stock_logits(model, with_adapter(model, tmp_path / "out"), questions(model))
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def test_ranks_that_differ_by_module_do_not_change_the_scale(tmp_path: Path) -> None:
    name = "random:llava-tiny"
    model, delta = load(name), fitted(name, "lora")[0]
    tensors = {key: tensor.clone() for key, tensor in delta.tensors.items()}
    first = delta.spec.sites[0]
    tensors[f"{first.layer}.{first.name}:up"][3:].zero_()
    delta = dataclasses.replace(delta, tensors=tensors)
    exported(name, [delta], tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {first.module_path: 3}
    with fastedit.attached(model, delta) as hf:
        wanted = stock_logits(model, hf, questions(model))
    got = stock_logits(model, with_adapter(model, tmp_path / "out"), questions(model))
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


def test_the_configuration_is_one_of_peft_field_by_field(tmp_path: Path) -> None:
    name = "random:llava-tiny"
    delta = fitted(name, "lora")[0]
    exported(name, [delta], tmp_path / "out", base="some/model", revision="abc")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    read = peft.LoraConfig.from_pretrained(tmp_path / "out").to_dict()
    for key, value in config.items():
        # What PEFT keeps as a set
        assert (sorted(read[key]) if key == "target_modules" else read[key]) == value, key
    wanted = {
        "base_model_name_or_path": "some/model",
        "revision": "abc",
        "peft_type": "LORA",
        "target_modules": sorted(site.module_path for site in delta.spec.sites),
        "auto_mapping": {
            "base_model_class": "LlavaForConditionalGeneration",
            "parent_library": "transformers.models.llava.modeling_llava",
        },
    }
    assert {key: config[key] for key in wanted} == wanted
    # The rest is what PEFT has where nothing is said
    plain = peft.LoraConfig(peft_type="LORA", inference_mode=True, r=8, lora_alpha=8).to_dict()
    rest = config.keys() - wanted.keys()
    assert {key: config[key] for key in rest} == {key: plain[key] for key in rest}


@pytest.mark.parametrize("name", ["random:llava-tiny", "generic:phi3"])
def test_what_vllm_reads_of_it_says_the_same(name: str, tmp_path: Path) -> None:
    """Its documented rules: ``PEFTHelper``, ``parse_fine_tuned_lora_name`` and ``check_unexpected_modules``."""
    model, delta = load(name), fitted_on(name, "lora")[0]
    made = exported(name, [delta], tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert isinstance(config["r"], int)
    assert isinstance(config["lora_alpha"], int)
    assert isinstance(config["target_modules"], list)
    assert config["bias"] == "none"
    assert not config["modules_to_save"]
    assert config["use_dora"] is False
    assert config["use_rslora"] is False
    assert config["r"] <= made.report["max_lora_rank"]
    assert made.report["max_lora_rank"] in (1, 8, 16, 32, 64, 128, 256, 320, 512)
    # One factor for all modules, whatever their rank
    scale = config["lora_alpha"] / config["r"]
    expected = {path.rsplit(".", 1)[-1] for path, module in model.hf.named_modules() if isinstance(module, nn.Linear)}
    tensors = tensors_of(tmp_path / "out")
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        parsed = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
        assert parsed is not None, key
        assert parsed[1].rsplit(".", 1)[-1] in expected
        modules.setdefault(parsed[1], {})[parsed[2]] = tensor
    for site in delta.spec.sites:
        down, up = modules[site.module_path]["A"], modules[site.module_path]["B"]
        assert down.shape == (down.shape[0], site.d_in)
        assert up.shape == (site.d_out, down.shape[0])
        part = f"{site.layer}.{site.name}"
        change = delta.tensors[f"{part}:down"] @ delta.tensors[f"{part}:up"] * float(delta.spec.options["scale"])
        torch.testing.assert_close(scale * up @ down, change.T, rtol=1e-12, atol=1e-12)
    assert set(modules) == {site.module_path for site in delta.spec.sites}


class _Twice(nn.Module):
    """A path that ends another, which a list of targets would take too."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(4, 4), "down": nn.Linear(4, 4)})])
        self.tower = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"up": nn.Linear(4, 4)})])})

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0]["up"](x)


@pytest.mark.parametrize(
    "ranks",
    [
        {"layers.0.up": 2},
        {"layers.0.up": 2, "layers.0.down": 3},
        {"layers.0.up": 2, "tower.layers.0.up": 3, "layers.0.down": 3},
        {"layers.0.up": 3, "tower.layers.0.up": 2, "layers.0.down": 3},
    ],
    ids=["one", "two", "short-is-less", "long-is-less"],
)
def test_targets_and_ranks_hit_exactly_the_modules(ranks: dict[str, int]) -> None:
    stock = _Twice()
    model: Any = SimpleNamespace(hf=stock)
    config = adapter_config(model, ranks, {"task_type": None})
    adapted = peft.get_peft_model(stock, peft.LoraConfig(**{**config, "inference_mode": False}))
    found = {
        path: (module.r["default"], module.scaling["default"])
        for path, module in adapted.get_base_model().named_modules()
        if hasattr(module, "lora_A")
    }
    assert found == {path: (rank, 1.0) for path, rank in ranks.items()}


def test_a_ledger_exports_what_acts_in_it(tmp_path: Path) -> None:
    model = fastedit.load("random:llava-tiny", dtype="float64")
    with fastedit.open_ledger(tmp_path / "ledger", model) as ledger:
        ledger.edit(edits(), method="lora", mode="sequential", steps=25, lr=2e-2, stop_loss=None)
        both = ledger.export("peft", tmp_path / "out", rank=12)
        assert both.report["adapters"][0]["requests"] == ["edit-0", "edit-1"]
        assert both.report["asked"]["edits"] == 2
        ledger.undo("edit-1")
        one = ledger.export("peft", tmp_path / "out", overwrite=True)
        (adapter,) = one.report["adapters"]
        assert (adapter["requests"], adapter["rank"]) == (["edit-0"], 8)
        with fastedit.attached(model, ledger.active()) as hf:
            wanted = stock_logits(model, hf, questions(model))
    got = stock_logits(model, with_adapter(model, tmp_path / "out"), questions(model))
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


def test_names_are_safe_for_files_and_for_peft() -> None:
    assert adapter_name(7, "vqa/train.17") == "000007-vqa-train-17"
    assert adapter_name(7, "../..\n") == "000007"
    assert adapter_name(0, "é" * 500) == "000000"
    assert len(adapter_name(0, "x" * 500)) < 60


def test_what_cannot_be_an_adapter_is_refused_by_name(tmp_path: Path) -> None:
    name = "random:llava-tiny"
    model, deltas = load(name), fitted(name, "lora")

    def refused(message: str, given: Sequence[EditDelta] = deltas, of: str = name, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            exported(of, given, tmp_path / "out", **options)
        assert list(tmp_path.iterdir()) == []

    refused("fitted as a sequence, .* each=True writes one adapter an edit .*'edit-1'.* fitted alone")
    refused("write one adapter of the whole sequence", fitted(name, "lora", mode="sequential"), each=True)
    refused("a full delta becomes an adapter of a rank", fitted(name, "ft")[:1])
    refused(r"rank is a whole number, at least 1, or None \(got rank=0\)", deltas[:1], rank=0)
    refused("kind 'codebook' is none; fastedit.attach", fitted(name, "grace"))
    blocks = "generic:qwen3_vl_moe"
    refused("writes changes of linear maps, and '.*' is a Qwen3VLMoe", fitted(blocks, "lora")[:1], blocks)
    assert isinstance(model, EditableModel)


def test_a_disk_that_fills_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fastedit.export.peft as module

    def full(_path: Path, _content: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write_plain", full)
    with pytest.raises(OSError, match="No space left"):
        exported("random:llava-tiny", fitted("random:llava-tiny", "lora")[:1], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["pocket-llava", "generic:qwen3", "generic:phi3"])
def test_another_program_generates_edited(name: str, tmp_path: Path) -> None:
    """A fresh process with transformers and peft, which knows nothing of fastedit."""
    dtype = "float32" if name == "pocket-llava" else "float64"
    model = load(name, dtype)
    options: dict[str, Any] = {"evaluate": False, "show_progress": False}
    if name == "pocket-llava":
        chosen = list(fastedit.read_edits("pocket-vqa", limit=2))
        delta = fastedit.edit(model, chosen, "lora", **options).deltas[0]
        asked = [fastedit.Query(edit.prompt, edit.image) for edit in chosen]
    else:
        delta, asked = fitted_on(name, "lora")[0], asked_of(name)[:2]
    model.hf.save_pretrained(tmp_path / "stock")
    (model.processor if name == "pocket-llava" else model.tokenizer).save_pretrained(tmp_path / "stock")
    export_deltas("peft", model, delta, tmp_path / "adapter")
    with fastedit.applied(model, delta):
        answers = model.generate(asked, max_new_tokens=8)
    given = []
    for number, query in enumerate(asked):
        image = None
        if query.image is not None:
            image = str(tmp_path / f"{number}.png")
            open_image(query.image).save(image)
        given.append({"prompt": model.prompts.text(query.prompt, query.image is not None), "image": image})
    (tmp_path / "questions.json").write_text(json.dumps(given))
    client = Path(__file__).with_name("peft_client.py")
    places = [tmp_path / each for each in ("stock", "adapter", "questions.json", "logits.safetensors")]
    done = host(OTHERS).run(client.read_text(), *places, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["edited"] == said["loaded"] == answers
    assert all(piped.endswith(answer) for piped, answer in zip(said["piped"], answers, strict=True)), said
    assert said["base"] == model.generate(asked, max_new_tokens=8)
    assert said["base"] != said["edited"]
    with safe_open(tmp_path / "logits.safetensors", "pt") as file:
        got, loaded = (
            torch.stack([file.get_tensor(f"{by}.{number}") for number in range(len(asked))])
            for by in ("edited", "loaded")
        )
    assert torch.equal(got, loaded)
    with fastedit.attached(model, delta) as hf:
        wanted = torch.cat([stock_logits(model, hf, [query]) for query in asked])
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 if dtype == "float32" else 1e-11)
