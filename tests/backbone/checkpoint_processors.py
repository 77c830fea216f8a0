"""Processors of transformers' own classes for the tiny models, made without a download."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.video_utils import VideoMetadata

from fastedit.backbone.processors import _any_class
from fastedit.backbone.synthetic.processors import made_up_tokenizer

from .architectures import VOCABULARY


def pillow(folder: str, name: str) -> Any:
    return getattr(importlib.import_module(f"transformers.models.{folder}.image_processing_pil_{folder}"), name)


def tokenizer(marked: bool = False, words: int = VOCABULARY, **named: str) -> Any:
    made = made_up_tokenizer(words, end="</s>", opens=not marked)
    for name, token in named.items():
        setattr(made, name, token)
        setattr(made, f"{name}_id", made.convert_tokens_to_ids(token))
    return made


def lenient(name: str) -> Any:
    """A class of processors that takes None for a video processor."""
    family: Any = getattr(importlib.import_module("transformers"), name)
    return type(name, (family,), {"check_argument_for_proper_class": _any_class})


def square(side: int = 32) -> dict[str, int]:
    return {"height": side, "width": side}


def gemma3() -> Any:
    from transformers import Gemma3Processor

    words = tokenizer(boi_token="<|vision_start|>", eoi_token="<|vision_end|>", image_token="<image>")
    images = pillow("gemma3", "Gemma3ImageProcessorPil")(size=square())
    return Gemma3Processor(images, words, image_seq_length=4)


def paligemma() -> Any:
    from transformers import PaliGemmaProcessor

    images = pillow("siglip", "SiglipImageProcessorPil")(size=square())
    images.image_seq_length = 16
    return PaliGemmaProcessor(images, tokenizer())


def qwen(name: str) -> Callable[[], Any]:
    def make() -> Any:
        images = pillow("qwen2_vl", "Qwen2VLImageProcessorPil")(
            patch_size=8, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 1024, "longest_edge": 4096}
        )
        return lenient(name)(image_processor=images, tokenizer=tokenizer(marked=True), video_processor=None)

    return make


def phi3() -> Any:
    from transformers import LlavaProcessor

    images = pillow("clip", "CLIPImageProcessorPil")(size={"shortest_edge": 32}, crop_size=square())
    return LlavaProcessor(
        images, tokenizer(), patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def internvl() -> Any:
    words = tokenizer(start_image_token="<|vision_start|>", end_image_token="<|vision_end|>", video_token="<video>")
    words.context_image_token, words.context_image_token_id = "<image>", words.convert_tokens_to_ids("<image>")
    images = pillow("got_ocr2", "GotOcr2ImageProcessorPil")(size=square(), crop_to_patches=True, max_patches=4)
    return lenient("InternVLProcessor")(images, words, None, image_seq_length=4)


def idefics3() -> Any:
    from transformers import Idefics3Processor

    images = pillow("idefics3", "Idefics3ImageProcessorPil")(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}
    )
    return Idefics3Processor(images, tokenizer(words=VOCABULARY - 20), image_seq_len=4)


def smolvlm() -> Any:
    module = importlib.import_module("transformers.models.smolvlm.processing_smolvlm")
    # Spells numbers in prompts with videos, and is asked for by all
    module.num2words = module.num2words or str  # type: ignore[attr-defined]
    words = tokenizer(words=VOCABULARY - 20)
    words.add_special_tokens({"additional_special_tokens": ["<fake_token_around_image>", "<global-img>"]})
    images = pillow("smolvlm", "SmolVLMImageProcessorPil")(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}
    )
    return lenient("SmolVLMProcessor")(images, words, None, image_seq_len=4)


def llava_next() -> Any:
    from transformers import LlavaNextProcessor

    images = pillow("llava_next", "LlavaNextImageProcessorPil")(
        size={"shortest_edge": 32}, crop_size=square(), image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]]
    )
    return LlavaNextProcessor(
        images, tokenizer(), patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def llava_onevision() -> Any:
    images = pillow("llava_onevision", "LlavaOnevisionImageProcessorPil")(
        size=square(), image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]]
    )
    return lenient("LlavaOnevisionProcessor")(
        images, tokenizer(), None, num_image_tokens=16, vision_feature_select_strategy="full"
    )


def instructblip() -> Any:
    from transformers import InstructBlipProcessor

    images = pillow("blip", "BlipImageProcessorPil")(size=square())
    return InstructBlipProcessor(images, tokenizer(), tokenizer(words=500), 6)


def mllama() -> Any:
    from transformers import MllamaProcessor

    images = pillow("mllama", "MllamaImageProcessorPil")(size=square(), max_image_tiles=2)
    return MllamaProcessor(images, tokenizer(image_token="<image>"))


#: By architecture, see `architectures`.
MAKERS: dict[str, Callable[[], Any]] = {
    "gemma3": gemma3,
    "paligemma": paligemma,
    "qwen2_vl": qwen("Qwen2VLProcessor"),
    "qwen2_5_vl": qwen("Qwen2_5_VLProcessor"),
    "qwen3_vl": qwen("Qwen3VLProcessor"),
    "qwen3_vl_moe": qwen("Qwen3VLProcessor"),
    "qwen3_5": qwen("Qwen3VLProcessor"),
    "llava+phi3": phi3,
    "instructblip": instructblip,
    "internvl": internvl,
    "mllama": mllama,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "llava": phi3,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
}


class Frames:
    """Stands for a video processor where torchvision is not installed: what those of transformers return.

    Args:
        key: of an architecture. images: its image processor.
    """

    merge_size = temporal_patch_size = 2
    model_input_names = ("pixel_values_videos",)

    def __init__(self, key: str, images: Any) -> None:
        self.key, self.images = key, images

    def __call__(self, videos: Any, video_metadata: Any, **_: Any) -> dict[str, Any]:
        """Return the frames of one video as the model takes them."""
        told = VideoMetadata(**video_metadata[0])
        if self.key.startswith("qwen"):
            return {**self._patches(videos[0]), "video_metadata": [told]}
        pixels = [Image.fromarray(frame).resize((32, 32)) for frame in videos[0]]
        values = np.stack([np.asarray(frame, dtype=np.float32) / 127.5 - 1 for frame in pixels])
        frames = torch.from_numpy(values).permute(0, 3, 1, 2)[None]
        if self.key == "smolvlm":
            seen = torch.ones(1, frames.shape[1], 32, 32, dtype=torch.long)
            return {"pixel_values": frames, "pixel_attention_mask": seen, "video_metadata": [told]}
        return {"pixel_values_videos": frames, "video_metadata": [told]}

    def _patches(self, frames: Any) -> dict[str, Any]:
        """Two frames at a time, the last one twice where their number is odd."""
        single = [self.images(images=[Image.fromarray(frame)], return_tensors="pt") for frame in frames]
        single += single[-1:] if len(single) % 2 else []
        halves = [each["pixel_values"].view(-1, 3, 2, 64)[:, :, 0] for each in single]
        pairs = [torch.stack(pair, 2).flatten(1) for pair in zip(halves[::2], halves[1::2], strict=True)]
        _, height, width = single[0]["image_grid_thw"][0].tolist()
        grid = torch.tensor([[len(pairs), height, width]])
        return {"pixel_values_videos": torch.cat(pairs), "video_grid_thw": grid}


#: Video processors of transformers, with arguments for tiny models.
_VIDEO_CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "internvl": ("InternVLVideoProcessor", {"size": square()}),
    "llava_onevision": ("LlavaOnevisionVideoProcessor", {"size": square()}),
    "smolvlm": ("SmolVLMVideoProcessor", {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}),
}


def with_video(key: str, processor: Any) -> Any:
    """Give a processor a video processor: that of transformers where torchvision is installed."""
    import transformers

    if importlib.util.find_spec("torchvision") is None:
        processor.video_processor = Frames(key, processor.image_processor)
        return processor
    patches = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
    patches["size"] = {"shortest_edge": 1024, "longest_edge": 65536}
    name = "Qwen3VLVideoProcessor" if key.startswith("qwen3") else "Qwen2VLVideoProcessor"
    name, arguments = _VIDEO_CLASSES.get(key, (name, patches))
    processor.video_processor = getattr(transformers, name)(**arguments)
    return processor
