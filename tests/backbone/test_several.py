"""Several images in one question: the tokens of the checkpoint's processor, the logits of its stock forward."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fastedit.backbone import EditableModel
from fastedit.backbone.adapters import make_adapter
from fastedit.backbone.generic.adapter import GenericAdapter, generic
from fastedit.backbone.loading import end_tokens
from fastedit.backbone.packed_forward import packed_prefix, packed_start, packed_tail
from fastedit.backbone.several import without_video
from fastedit.data.problems import ImageError
from fastedit.requests import Query, Video, images_of

from .architectures import make_stock
from .checkpoint_processors import MAKERS, with_video
from .conftest import cached_model, picture

#: Walked by a family's own stack; by "+any" after it the same model by tracing.
FAST = ("llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
TRACED = (
    "gemma3",
    "internvl",
    "idefics3",
    "smolvlm",
    "paligemma",
    "llava+phi3",
    "qwen3_vl_moe",
    "qwen3_5",
    "llava_onevision any",
    "qwen2_5_vl any",
)
#: Stock models that round to float32 inside, see `test_architectures`.
ROUNDING = {"paligemma": 2e-5}


@functools.cache
def editable(key: str, video: bool = False) -> EditableModel:
    name, _, any_path = key.partition(" ")
    hf, processor = make_stock(name), MAKERS[name]()
    if video:
        with_video(name, processor)
    return EditableModel(
        hf,
        processor,
        GenericAdapter(hf, processor) if any_path else make_adapter(hf, processor),
        name=key,
        quantize="none",
        dtype=hf.dtype,
        template="{image}\nquestion: {} answer:",
        end_token_ids=end_tokens(hf, processor.tokenizer),
        image_cache_mib=16,
    )


A, B, C = picture(0, 40, 70), picture(1, 64, 30), picture(2, 33, 33)


def questions() -> list[Query]:
    """Rows with 0 to 3 images of different sizes, before the question and inside of it."""
    return [
        Query("which one is red?", [A, B], "the left one"),
        Query("is {image} or {image} on the beach, not {image} here?", [B, C, A], "two"),
        Query("what is it?", A, "red"),
        Query("what?", None, "blue"),
        Query("which one is red?", [B, A], "right"),
        Query("{image} and {image}", [C, C], "same"),
        Query("what is it?", [C, B, A], "a dog"),
    ]


def stock_inputs(model: EditableModel, query: Query) -> dict[str, Any]:
    """What the checkpoint's own processor makes of a question, with the images that it is given in order."""
    images = images_of(query.image)
    mark = (model.adapter.listed_text if len(images) > 1 else "") or model.adapter.image_text
    text = f"question: {query.prompt} answer:"
    if query.prompt.count("{image}") == len(images) > 1:
        text = "\n" + text.replace("{image}", mark)
    else:
        text = mark * len(images) + "\n" + text
    given: dict[str, Any] = {"images": [list(images)]} if images else {}
    return dict(model.processor(text=[text], return_tensors="pt", **given))


@torch.no_grad()
def stock_logits(model: EditableModel, inputs: dict[str, Any], answer: list[int]) -> torch.Tensor:
    """Logits of an answer's tokens behind a processor's prompt."""
    added = torch.tensor([answer[:-1]], dtype=torch.long)
    inputs = dict(inputs)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            value = torch.as_tensor(inputs[name])
            # PaliGemma's token types tell an answer from its prompt
            fill = {"input_ids": added, "attention_mask": torch.ones_like(added)}.get(name, torch.zeros_like(added))
            fill = torch.ones_like(added) if model.name == "paligemma" and name == "token_type_ids" else fill
            inputs[name] = torch.cat([value, fill], 1)
    inputs = {
        name: value.to(torch.float64) if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in inputs.items()
        if name not in ("rows", "cols", "num_crops", "num_patches", "labels")
    }
    if hasattr(getattr(model.hf, "model", None), "rope_deltas"):
        model.hf.model.rope_deltas = None
    return model.hf(**inputs, use_cache=False).logits[0, -len(answer) :]


@pytest.mark.parametrize("key", [*FAST, *TRACED])
@torch.no_grad()
def test_ids_and_logits_are_those_of_the_stock_processor_and_model(key: str) -> None:
    model = editable(key)
    asked = questions()
    encoded = model.encode(asked, answers=True)
    start = packed_start(model, encoded)
    state = packed_prefix(model, start, 1, "ffn")
    logits = torch.split(model.head(packed_tail(model, state)), list(state.wanted_counts))
    for row, query in enumerate(asked):
        if query.image is None and key == "paligemma":
            # Its processor insists on an image
            continue
        inputs = stock_inputs(model, query)
        length = int(encoded.last_prompt[row]) + 1
        assert encoded.input_ids[row, :length].tolist() == inputs["input_ids"][0].tolist(), query
        answer = encoded.labels[row][encoded.label_mask[row]].tolist()
        expected = stock_logits(model, inputs, answer)
        assert float((logits[row] - expected).abs().max()) <= ROUNDING.get(key, 1e-12), query
        alone = packed_tail(model, packed_start(model, model.encode([query], answers=True)))
        assert float((model.head(alone) - logits[row]).abs().max()) <= ROUNDING.get(key, 1e-12), query


@pytest.mark.parametrize("key", [*FAST, *TRACED])
@torch.no_grad()
def test_answers_are_those_of_the_stock_model(key: str) -> None:
    model = editable(key)
    asked = [query for query in questions() if query.image is not None]
    answers = model.generate(asked, max_new_tokens=6)
    for query, answer in zip(asked, answers, strict=True):
        ids: list[int] = []
        inputs = stock_inputs(model, query)
        while len(ids) < 6:
            # Without a cache: the stock model's own forward of prompt and answer so far
            ids.append(int(stock_logits(model, inputs, [*ids, 0])[-1].argmax()))
            if ids[-1] in model.end_token_ids:
                break
        assert answer == model.tokenizer.decode(ids, skip_special_tokens=True).strip(), query
    assert len(set(answers)) > 1


@pytest.mark.parametrize("key", ["qwen2_vl", "llava_next", "llava_onevision"])
def test_questions_that_share_an_image_share_its_features(key: str) -> None:
    model = editable(key)
    model.forget()
    seen: list[int] = []
    stock = model.adapter.image_features
    model.adapter.image_features = lambda images: seen.append(len(images)) or stock(images)  # type: ignore[method-assign]
    try:
        model.features(model.encode([Query("a", [A, B]), Query("b", [B, A]), Query("c", [C, B])], answers=False))
        assert sum(seen) == 3
        model.features(model.encode([Query("a", [A, B, C])], answers=False))
        assert sum(seen) == 3
    finally:
        del model.adapter.image_features


@pytest.mark.parametrize("key", ["gemma3", "internvl", "paligemma", "qwen3_vl_moe", "qwen2_5_vl any"])
@torch.no_grad()
def test_lists_that_share_an_image_share_its_features_in_a_stock_model(
    key: str, count_calls: Callable[[Any], list[int]]
) -> None:
    model = editable(key)
    adapter = generic(model.adapter)
    assert adapter is not None
    model.forget()
    assert not len(adapter.features.kept)
    adapter.features.apart = None
    owner = adapter.hf.model
    tower = count_calls(getattr(owner, "vision_tower", None) or owner.visual)
    rows = [Query("a", [A, B]), Query("b", [B, A]), Query("c", [C, B, A])]
    packed_start(model, model.encode(rows, answers=False))
    assert adapter.features.apart
    # Three images, and the first list once more as a whole, to see that they may be looked at one by one
    assert len(tower) == 4


def test_a_model_that_looks_at_lists_as_a_whole_is_let() -> None:
    model = editable("gemma3")
    adapter = generic(model.adapter)
    assert adapter is not None
    adapter.features.kept.clear()
    adapter.features.apart = None
    projector = adapter.hf.model.multi_modal_projector
    # What one image becomes depends on those beside it
    mixing = projector.register_forward_hook(lambda _module, _args, output: output + output.mean(0, keepdim=True))
    try:
        rows = [Query("a", [A, B], "x"), Query("b", [B, A], "x")]
        encoded = model.encode(rows, answers=True)
        state = packed_start(model, encoded)
        logits = torch.split(model.head(packed_tail(model, state)), list(state.wanted_counts))
        assert adapter.features.apart is False
        for row, query in enumerate(rows):
            answer = encoded.labels[row][encoded.label_mask[row]].tolist()
            expected = stock_logits(model, stock_inputs(model, query), answer)
            assert float((logits[row] - expected).detach().abs().max()) <= 1e-12
    finally:
        mixing.remove()
        adapter.features.kept.clear()
        adapter.features.apart = None


def test_lists_are_told_apart_by_content_and_order(tmp_path: Any) -> None:
    model = editable("gemma3")
    A.save(tmp_path / "a.png")
    B.save(tmp_path / "b.png")
    reader = model.images
    files = reader.read([tmp_path / "a.png", tmp_path / "b.png"])
    assert files.key == reader.read([A, B]).key != reader.read([B, A]).key
    assert reader.read([tmp_path / "a.png", tmp_path / "b.png"]) is files
    keys = [reader.identity(each) for each in ([A, B], [B, A], [A, B, B], A, None)]
    assert len(set(keys)) == len(keys)
    with pytest.raises(FileNotFoundError, match=r"encode: row 0: \[1\]: image: no such file \(got 'absent\.png'\)"):
        model.encode([Query("what?", [A, tmp_path / "absent.png"])], answers=False)
    assert generic(model.adapter) is not None


VIDEOS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "qwen2_vl any", "qwen3_vl_moe", "qwen3_5")
VIDEOS += ("internvl", "smolvlm", "llava_onevision any")


@pytest.mark.parametrize("key", VIDEOS)
@torch.no_grad()
def test_videos_are_those_of_the_stock_processor_and_model(key: str) -> None:
    model = editable(key, video=True)
    long = Video([picture(number, 40, 56) for number in range(5)], 2.0)
    asked = [
        Query("what moves?", long, "a dog"),
        Query("which one is red?", [A, B], "the left one"),
        Query("what moves?", Video(long.frames[:3]), "red"),
        Query("what?", None, "blue"),
    ]
    encoded = model.encode(asked, answers=True)
    start = packed_start(model, encoded)
    state = packed_prefix(model, start, 1, "ffn")
    logits = torch.split(model.head(packed_tail(model, state)), list(state.wanted_counts))
    for row in (0, 2):
        video = asked[row].image
        assert isinstance(video, Video)
        told = {"fps": video.fps, "total_num_frames": len(video.frames), "height": 40, "width": 56}
        told |= {"frames_indices": list(range(len(video.frames))), "duration": len(video.frames) / video.fps}
        inputs = model.processor(
            text=[f"{model.adapter.video_text}\nquestion: what moves? answer:"],
            videos=[[np.asarray(frame) for frame in video.frames]],
            video_metadata=[told],
            do_sample_frames=False,
            return_tensors="pt",
        )
        length = int(encoded.last_prompt[row]) + 1
        assert encoded.input_ids[row, :length].tolist() == inputs["input_ids"][0].tolist()
        assert int(encoded.image_mask[row].sum()) == encoded.images[row].tokens > 0
        answer = encoded.labels[row][encoded.label_mask[row]].tolist()
        assert float((logits[row] - stock_logits(model, dict(inputs), answer)).abs().max()) <= 1e-12
    other = packed_start(model, model.encode([replace(asked[0], image=Video(long.frames[::-1], 2.0))], answers=True))
    assert float((model.head(packed_tail(model, other)) - logits[0]).abs().max()) > 1e-3
    timed = model.encode([replace(asked[0], image=Video(long.frames, 1.0))], answers=True)
    if key.startswith(("qwen3", "smolvlm")):
        assert timed.input_ids[0].tolist() != encoded.input_ids[0, : timed.input_ids.shape[1]].tolist()
    assert model.generate(asked, max_new_tokens=4)[0] == model.generate(asked[:1], max_new_tokens=4)[0]


def refusal(model: EditableModel, image: Any) -> str:
    with pytest.raises(ImageError) as caught:
        model.encode([Query("what?", image)], answers=False)
    return str(caught.value)


def test_what_a_model_does_not_take_is_refused_with_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    blip2, video = cached_model("random:blip2-tiny"), Video([A])
    head = "encode: row 0: image: random:blip2-tiny takes "
    assert refusal(blip2, [A, B]) == f"{head}1 image a question (got 2 images)"
    assert refusal(blip2, video) == f"{head}one image a question, and no video (got a video of 1 frame)"
    told = "llava takes no video; its frames can be asked about as a list of images (got a video of 2 frames)"
    assert refusal(editable("llava"), Video([A, B])).endswith(told)
    assert refusal(editable("gemma3"), Video([A, B])).endswith(told.replace("llava", "gemma3"))
    for key in ("qwen2_vl", "internvl", "llava_onevision"):
        model = editable(key)
        for installed in (None, object()):
            monkeypatch.setattr(importlib.util, "find_spec", lambda _name, found=installed: found)
            monkeypatch.setattr(model.adapter, "no_video", without_video(model.processor, model.adapter.video_text))
            why = "which needs torchvision: pip install torchvision" if installed is None else "does not have"
            assert f"{key} takes a video by a video processor" in refusal(model, video)
            assert why in refusal(model, video)


def test_without_torchvision_a_video_processor_cannot_be_made() -> None:
    if importlib.util.find_spec("torchvision") is not None:
        pytest.skip("torchvision is installed")
    from transformers import Qwen2VLVideoProcessor

    with pytest.raises(ImportError, match="requires the Torchvision library"):
        Qwen2VLVideoProcessor()
    assert "needs torchvision" in editable("qwen2_vl").adapter.no_video
