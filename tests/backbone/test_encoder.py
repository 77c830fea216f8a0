"""Text models with an encoder: it reads prompt and image, and a row's tokens are those of the answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastedit
from fastedit.backbone import EditableModel
from fastedit.backbone.generic.adapter import generic
from fastedit.backbone.generic.encoder import bias_by_distance, start_token
from fastedit.backbone.generic.kinds import check_kind
from fastedit.backbone.packed_forward import packed_start, packed_tail
from fastedit.requests import Query

from .architectures import make_editable, make_stock
from .checkpoint_processors import MAKERS
from .conftest import picture
from .test_architectures import editable, questions, requests

KEYS = ("blip-2+t5", "instructblip+t5")


def closing(model: EditableModel) -> EditableModel:
    """The same model with a tokenizer that ends texts, as T5's does."""
    from tokenizers import processors

    made = make_editable("blip-2+t5", model.hf)
    after = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    made.tokenizer.backend_tokenizer.post_processor = after
    return EditableModel(
        model.hf, made.processor, made.adapter, name="t5", quantize="none", dtype=model.dtype,
        template="question: {} answer:", end_token_ids=made.end_token_ids, image_cache_mib=16,
    )  # fmt: skip


def test_an_encoder_reads_the_prompt_with_its_end_and_the_row_is_the_answers() -> None:
    model = closing(editable("blip-2+t5"))
    words = model.tokenizer
    asked = [Query("what is it?", picture(0), "red"), Query("what?", None, "a zebra")]
    encoded = model.encode(asked, answers=True)
    prompts = [words(f"question: {query.prompt} answer:")["input_ids"] for query in asked]
    assert encoded.read == ((*[model.adapter.image_token_id] * 6, *prompts[0]), tuple(prompts[1]))
    assert prompts[0][-1] == 2
    for row, query in enumerate(asked):
        ids = words(query.answer, add_special_tokens=False)["input_ids"]
        length = int(encoded.lengths[row])
        assert encoded.input_ids[row, :length].tolist() == [0, *ids]
        assert encoded.labels[row][encoded.label_mask[row]].tolist() == [*ids, 2]
    assert encoded.last_prompt.tolist() == [0, 0]
    assert not bool(encoded.image_mask.any())
    assert encoded.select([1]).read == encoded.read[1:]
    inputs = encoded.model_inputs
    assert inputs["decoder_input_ids"].shape == encoded.input_ids.shape
    assert inputs["attention_mask"].sum(1).tolist() == [len(ids) for ids in encoded.read]


@pytest.mark.parametrize("key", KEYS)
def test_layers_are_told_apart_from_what_reads_the_encoder(key: str) -> None:
    adapter = generic(editable(key).adapter)
    assert adapter is not None
    assert adapter.follows
    assert adapter.walker.resumes
    assert adapter.walker.stores
    for trace in adapter.decoder.traces:
        assert (trace.mixer, trace.reader, trace.entry) == (
            "layer.0.SelfAttention",
            "layer.1.EncDecAttention",
            "layer.2",
        )
        assert trace.stored == 2 * 4 * 12
        assert trace.sites is not None
        assert not any(path.startswith("layer.1") for path in trace.sites.values())
        paths = {name: path.rsplit(".", 1)[-1] for name, path in trace.sites.items()}
        feeding = {"gate": "wi_0", "up": "wi_1"} if key == "blip-2+t5" else {"up": "wi"}
        assert paths == {"q": "q", "k": "k", "v": "v", "o": "o", "down": "wo", **feeding}


@pytest.mark.parametrize("key", KEYS)
@torch.no_grad()
def test_as_many_tokens_as_the_encoder_reads_are_no_trap(key: str) -> None:
    model = editable(key)
    adapter = generic(model.adapter)
    assert adapter is not None
    (read,) = model.encode([Query("what?", None, "x")], answers=True).read
    encoded = model.encode([Query("what?", None, "x" * (len(read) - 1))], answers=True)
    assert int(encoded.lengths[0]) == len(read)
    start = packed_start(model, encoded)
    whole = packed_tail(model, start)
    few = torch.tensor([3, len(read) - 1])
    state = adapter.walker.state(adapter.rows(encoded), few, [2])
    for layer, stage in ((0, "attention"), (2, "ffn"), (3, "ffn")):
        tail = packed_tail(model, adapter.walker.prefix(state, layer, stage, None))
        assert float((tail - whole[few]).abs().max()) <= 1e-12


@torch.no_grad()
def test_biases_by_distance_are_those_of_the_first_layer() -> None:
    model = editable("blip-2+t5")
    attention = model.hf.language_model.decoder.block[0].layer[0].SelfAttention
    square = attention.compute_bias(9, 9)[0]
    bias = bias_by_distance(model.hf.language_model.decoder.block, 9)
    for query in range(9):
        for key in range(query + 1):
            assert torch.equal(bias[:, query - key], square[:, query, key])


def test_the_encoder_runs_once_a_question(count_calls: Callable[[Any], list[int]]) -> None:
    model = editable("blip-2+t5")
    asked = questions("blip-2+t5")
    calls = count_calls(model.hf.language_model.encoder)
    model.generate(asked, max_new_tokens=6)
    assert len(calls) == len(asked)


def test_what_acts_by_prompt_tokens_is_refused_before_any_work() -> None:
    model = editable("blip-2+t5")
    asked = requests("blip-2+t5")
    rule = "has an encoder read them, and is edited by lora and ft, at all positions"
    for method in ("grace", "serac", "ike", "ft-vision"):
        with pytest.raises(ValueError, match=r"must be tokens of the decoder|needs|vision"):
            fastedit.edit(model, asked, method=method, views="record")
    with pytest.raises(ValueError, match=rf"{rule} \(got method='grace'\)"):
        fastedit.edit(model, asked, method="grace", views="record")
    with pytest.raises(ValueError, match=rf"{rule} \(got positions='after_image'\)"):
        fastedit.edit(model, asked, method="lora", positions="after_image", views="record")
    with pytest.raises(ValueError, match=rf"{rule} \(got method='mend'\)"):
        fastedit.train(model, "mend", asked)
    (delta, _) = fastedit.edit(model, asked, method="lora", steps=1, views="record", evaluate=False).deltas
    with pytest.raises(ValueError, match=r"fastedit\.applied serves instead"), fastedit.attached(model, delta):
        pass


def test_a_decoder_without_a_first_token_is_refused() -> None:
    hf = make_stock("blip-2+t5")
    assert start_token(hf) == 0
    for config in (hf.language_model.generation_config, hf.language_model.config, hf.config):
        config.decoder_start_token_id = None
    with pytest.raises(ValueError, match="must name the token that its decoder begins with"):
        start_token(hf)


def test_other_text_models_with_an_encoder_are_refused() -> None:
    from transformers import AutoConfig

    check_kind(AutoConfig.for_model("blip-2", text_config={"model_type": "t5"}))
    for name in ("florence2", "blip-2"):
        text = {"text_config": {"model_type": "bart"}}
        with pytest.raises(ValueError, match=r"prompt and answer are one sequence, or T5 .*the text model 'bart'"):
            check_kind(AutoConfig.for_model(name, **text))


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_folder_is_edited_and_scored(quantize: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    make_stock("instructblip+t5", torch.float32).save_pretrained(tmp_path)
    MAKERS["instructblip"]().save_pretrained(tmp_path)
    model = fastedit.load(tmp_path, quantize=quantize, template="{}")
    weights = [weight.clone() for weight in model.hf.parameters()]
    asked = requests("instructblip+t5")
    run = fastedit.edit(model, asked, method="odedit+lora", lr=3e-2, steps=150, views="record")
    assert run.scores["strict"]["reliability"].mean == 1.0
    for request, delta in zip(asked, run.deltas, strict=True):
        with fastedit.applied(model, delta):
            assert model.answer(request.image, request.prompt, max_new_tokens=6) == request.target
    assert all(torch.equal(weight, old) for weight, old in zip(model.hf.parameters(), weights, strict=True))
