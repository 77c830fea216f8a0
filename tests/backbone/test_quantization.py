"""4-bit and 8-bit bases: right gradients, the right modules, the traps taken out."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from fastedit.backbone import EditableModel, load
from fastedit.backbone.quantization import Quantizer
from fastedit.backbone.synthetic.skeleton import skeleton
from tests.backbone.padded import prefix, tail

from .conftest import TINY, cached_model, largest_gap, mixed_queries

transformers = pytest.importorskip("transformers")
bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
QUANTIZED = {"nf4": bitsandbytes.nn.Linear4bit, "int8": bitsandbytes.nn.Linear8bitLt}


def quantized_paths(model: EditableModel) -> set[str]:
    kinds = tuple(QUANTIZED.values())
    return {path for path, module in model.hf.named_modules() if isinstance(module, kinds)}


def decoder_paths(model: EditableModel) -> set[str]:
    sites = model.sites(range(model.n_layers), list(model.adapter.text.site_paths))
    return {site.module_path for site in sites}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("name", TINY)
def test_exactly_the_decoder_is_quantized(name: str, kind: str) -> None:
    model = cached_model(name, quantize=kind)
    assert quantized_paths(model) == decoder_paths(model)
    assert model.quantize == kind
    exact = cached_model(name)
    encoded = model.encode(mixed_queries(), answers=True)
    mask = encoded.attention_mask
    logits = [each.head(tail(each, prefix(each, encoded, 0)))[mask] for each in (model, exact)]
    correlation = torch.corrcoef(torch.stack([part.flatten() for part in logits]))[0, 1]
    assert (0.8 if kind == "nf4" else 0.995) < correlation < 0.9999999


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["random:llava-tiny", "random:blip2-tiny", "random:qwen2vl-tiny"])
def test_random_and_saved_models_quantize_alike(name: str, kind: str, tmp_path: Path) -> None:
    exact = cached_model(name)
    exact.hf.save_pretrained(tmp_path)
    exact.processor.save_pretrained(tmp_path)
    last = exact.n_layers - 1
    path = exact.sites([0], ["up"])[0].module_path
    drawn = load(name, quantize=kind, keep=[last, path])
    read = load(tmp_path, quantize=kind, keep=[last, path])
    kept = {site.module_path for site in exact.sites([last], list(exact.adapter.text.site_paths))} | {path}
    assert quantized_paths(drawn) == quantized_paths(read) == decoder_paths(exact) - kept
    encoded = exact.encode(mixed_queries(), answers=True)
    assert largest_gap(tail(drawn, prefix(drawn, encoded, 0)), tail(read, prefix(read, encoded, 0))) < 1e-5


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_checkpoint_keeps_its_own_quantization(kind: str, tmp_path: Path) -> None:
    # Saved from a model that transformers quantized, as people publish them.
    exact = cached_model("random:llava-tiny")
    exact.hf.save_pretrained(tmp_path / "exact")
    exact.processor.save_pretrained(tmp_path / "exact")
    first = load(tmp_path / "exact", quantize=kind)
    first.hf.save_pretrained(tmp_path / "small")
    exact.processor.save_pretrained(tmp_path / "small")
    again = load(tmp_path / "small")
    assert again.quantize == kind
    assert quantized_paths(again) == quantized_paths(first)
    encoded = exact.encode(mixed_queries(), answers=True)
    assert largest_gap(tail(first, prefix(first, encoded, 0)), tail(again, prefix(again, encoded, 0))) < 1e-6
    other = "int8" if kind == "nf4" else "nf4"
    with pytest.raises(ValueError, match=rf"the checkpoint's own '{kind}' \(got quantize='{other}'\)"):
        load(tmp_path / "small", quantize=other)


def dequantized(model: EditableModel, name: str | None = None) -> EditableModel:
    """The same model with the quantized weights written out; of a checkpoint that was made of the model `name`."""
    twin = load(name or model.name, dtype="float32")
    for path in quantized_paths(model):
        module = model.hf.get_submodule(path)
        plain = twin.hf.get_submodule(path)
        if model.quantize == "nf4":
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        else:
            scale = module.state.SCB if module.weight.SCB is None else module.weight.SCB
            weight = module.weight.data.float() * scale.float()[:, None] / 127
        plain.weight = nn.Parameter(weight.to(plain.weight), requires_grad=False)
    return twin


def quantized_by_default(name: str, kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint as transformers' own defaults quantize it: everything but the head, the vision side included."""
    exact = cached_model(name)
    exact.hf.save_pretrained(folder / "exact")
    settings = (
        transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        if kind == "nf4"
        else transformers.BitsAndBytesConfig(load_in_8bit=True)
    )
    hf = transformers.AutoModelForImageTextToText.from_pretrained(
        folder / "exact", dtype=dtype, quantization_config=settings, device_map={"": "cpu"}
    )
    hf.save_pretrained(folder / "small")
    exact.processor.save_pretrained(folder / "small")
    return folder / "small"


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("name", TINY)
def test_images_are_seen_where_the_vision_side_is_quantized(name: str, kind: str, tmp_path: Path) -> None:
    model = load(quantized_by_default(name, kind, tmp_path))
    assert quantized_paths(model) - decoder_paths(model), "nothing of the vision side is quantized"
    twin = dequantized(model, cached_model(name).name)
    for query in mixed_queries()[:2]:
        ours, plain, exact = (
            next(iter(each.features(each.encode([query], answers=False)).values()))
            for each in (model, twin, cached_model(name))
        )
        for seen, expected, full in zip(
            (ours.tokens, *ours.deep), (plain.tokens, *plain.deep), (exact.tokens, *exact.deep), strict=True
        ):
            assert seen.dtype == torch.float32
            # 4-bit maps multiply by the dequantized weights; 8-bit ones round their inputs too
            assert (seen - expected).norm() < (1e-4 if kind == "nf4" else 0.08) * expected.norm()
            # What quantization itself changes; pixels cast to its codes were off by the whole norm
            assert (seen - full).norm() < (0.6 if kind == "nf4" else 0.1) * full.norm()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["random:llava-tiny", "random:blip2-tiny", "random:qwen2vl-tiny"])
def test_a_quantized_checkpoint_keeps_the_type_it_was_stored_in(
    name: str, stored: torch.dtype, kind: str, tmp_path: Path
) -> None:
    folder = quantized_by_default(name, kind, tmp_path, stored)
    exact = cached_model(name)
    encoded = exact.encode(mixed_queries(), answers=True)
    logits = {}
    for dtype in ("auto", None, "float32", "bfloat16"):
        model = load(folder) if dtype == "auto" else load(folder, dtype=dtype)
        assert model.dtype == {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(str(dtype), stored)
        assert model.generate(mixed_queries(), max_new_tokens=2)
        logits[dtype] = model.head(tail(model, prefix(model, encoded, 1)))[encoded.attention_mask].float()
        assert skeleton(folder, dtype=dtype)[0].dtype == model.dtype
    assert torch.equal(logits["auto"], logits[None])
    for dtype in ("auto", "bfloat16"):
        apart = (logits[dtype] - logits["float32"]).norm() / logits["float32"].norm()
        assert 0 < apart < 0.1, "other values than the same weights give in float32"


def test_only_quantized_checkpoints_keep_their_type(tmp_path: Path) -> None:
    half = load("random:llava-tiny", dtype="bfloat16")
    half.hf.save_pretrained(tmp_path)
    half.processor.save_pretrained(tmp_path)
    assert load(tmp_path).dtype == torch.float32
    assert load(tmp_path, quantize="nf4").dtype == torch.float32
    assert load(tmp_path, dtype=None).dtype == torch.bfloat16


def gradient_at_first_layer(model: EditableModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of an adapter below the other quantized layers, and the loss it comes from."""
    encoded = model.encode(mixed_queries(), answers=True)
    module = model.module(model.sites([0], ["down"])[0])
    adapter = torch.zeros(module.out_features, module.in_features, requires_grad=True)
    handle = module.register_forward_hook(lambda _m, inputs, output: output + inputs[0] @ adapter.T)
    try:
        hidden = tail(model, prefix(model, encoded, 0), positions=encoded.label_positions())
        logits = model.head(hidden)[encoded.label_positions() >= 0]
        loss = nn.functional.cross_entropy(logits, encoded.labels[encoded.label_mask])
        (gradient,) = torch.autograd.grad(loss, adapter)
    finally:
        handle.remove()
    return gradient.flatten(), loss.detach()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["random:llava-tiny", "random:blip2-tiny", "random:qwen2vl-tiny"])
def test_gradients_equal_those_of_the_dequantized_copy_after_an_evaluation(name: str, kind: str) -> None:
    model = load(name, quantize=kind)
    # "Evaluate, then edit": the gradient-free forward is what repacked weights on some processors.
    model.generate(mixed_queries()[:2], max_new_tokens=2)
    ours, loss = gradient_at_first_layer(model)
    expected, expected_loss = gradient_at_first_layer(dequantized(model))
    # 8-bit layers round their inputs too, so only 4-bit ones compute exactly with the dequantized weights.
    bound, gap = (0.9999, 1e-4) if kind == "nf4" else (0.98, 0.05)
    assert abs(loss - expected_loss) < gap * expected_loss
    assert nn.functional.cosine_similarity(ours, expected, dim=0) > bound
    assert abs(ours.norm() / expected.norm() - 1) < (0.01 if kind == "nf4" else 0.1)


def test_weights_are_not_repacked_by_a_forward_without_gradient() -> None:
    model = load("random:llava-tiny", quantize="nf4")
    module = model.module(model.sites([1], ["up"])[0])
    before = copy.deepcopy(module.weight.data)
    model.generate(mixed_queries()[:1], max_new_tokens=2)
    assert torch.equal(module.weight.data, before)
    assert not any(getattr(part, "support_avx512bf16_for_cpu", False) for part in model.hf.modules()), (
        "layers would repack on processors with AVX512-BF16"
    )


def test_eight_bit_layers_do_not_log_every_call(caplog: pytest.LogCaptureFixture) -> None:
    model = cached_model("random:llava-tiny", quantize="int8")
    with caplog.at_level(logging.WARNING):
        model.generate(mixed_queries()[:2], max_new_tokens=2)
    assert not [record for record in caplog.records if "bitsandbytes" in record.name]


def test_the_library_is_named_where_it_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match="quantize needs bitsandbytes: pip install"):
        load("random:llava-tiny", quantize="nf4")
    assert not Quantizer("none", "llava", (), torch.float32).active


def test_foreign_quantizations_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be of bitsandbytes \(got quant_method='awq'\)"):
        Quantizer("none", "llava", (), torch.float32, stored={"quant_method": "awq"})
    stored = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
    with pytest.raises(ValueError, match=r"must be of type nf4 \(got bnb_4bit_quant_type='fp4'\)"):
        Quantizer("none", "llava", (), torch.float32, stored=stored)
