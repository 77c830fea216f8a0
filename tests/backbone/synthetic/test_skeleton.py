"""Models without weights: the same shapes and sizes as the loaded ones, and no memory."""

from __future__ import annotations

import pytest
import torch

from fastedit.backbone import SHAPES, load
from fastedit.backbone.encoding import row_size
from fastedit.backbone.synthetic.skeleton import skeleton, weight_bytes
from tests.backbone.conftest import TINY, mixed_queries

POCKET = ("pocket-llava", "pocket-blip2", "pocket-qwen2vl")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", [*TINY, *POCKET])
def test_weights_are_counted_exactly(name: str, dtype: str) -> None:
    model, planned = skeleton(name, dtype=dtype)
    loaded = load(name, dtype=dtype, device="cpu")
    assert planned == weight_bytes(loaded.hf)
    assert model.sites(range(model.n_layers), ["up", "q"]) == loaded.sites(range(loaded.n_layers), ["up", "q"])
    assert (model.vocab_size, model.hidden_size) == (loaded.vocab_size, loaded.hidden_size)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["random:llava-tiny", "random:blip2-tiny", "random:qwen3vl-tiny", "pocket-llava"])
def test_quantized_weights_are_counted_exactly(name: str, kind: str) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    loaded = load(name, quantize=kind, device="cpu")
    planned = skeleton(name, quantize=kind)[1]
    assert planned == weight_bytes(loaded.hf) < skeleton(name)[1]
    loaded.generate(mixed_queries()[1:2], max_new_tokens=2)
    assert planned == weight_bytes(loaded.hf), "a forward moves the scales of 8-bit maps"


@pytest.mark.parametrize("double", [False, True])
def test_a_quantized_checkpoint_is_counted(double: bool, tmp_path) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    exact = load("random:llava-tiny")
    exact.hf.save_pretrained(tmp_path / "exact")
    skipped = ["lm_head", "model.vision_tower", "model.multi_modal_projector"]
    skipped += [p for p, m in exact.hf.named_modules() if isinstance(m, torch.nn.Linear) and "language" not in p]
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        llm_int8_skip_modules=skipped,
    )
    small = AutoModelForImageTextToText.from_pretrained(tmp_path / "exact", quantization_config=config)
    small.save_pretrained(tmp_path / "small")
    exact.processor.save_pretrained(tmp_path / "small")
    assert skeleton(tmp_path / "small")[1] == weight_bytes(load(tmp_path / "small", device="cpu").hf)


def test_rows_have_the_sizes_that_they_are_encoded_with() -> None:
    for name in TINY:
        model = skeleton(name)[0]
        encoded = load(name).encode(mixed_queries(), answers=True)
        sizes = [row_size(model, query) for query in mixed_queries()]
        assert sizes == list(zip(encoded.lengths.tolist(), encoded.label_mask.sum(1).tolist(), strict=True))


def test_a_stock_model_takes_no_memory() -> None:
    model, planned = skeleton("random:qwen2.5-vl-7b", dtype="bfloat16")
    assert planned > 16e9
    assert all(parameter.is_meta for parameter in model.hf.parameters())
    assert model.n_layers == SHAPES["qwen2.5-vl-7b"].text["num_hidden_layers"]


def test_mistakes_are_refused_as_by_load() -> None:
    with pytest.raises(ValueError, match=r"the nearest is 'llava-tiny'"):
        skeleton("random:llava-tny")
    with pytest.raises(ValueError, match=r"quantize must be one of none, nf4, int8 \(got quantize='int4'"):
        skeleton("random:llava-tiny", quantize="int4")
    with pytest.raises(ValueError, match=r"the nearest known name is 'pocket-llava'"):
        skeleton("pocketllava")
