"""The three embedded models: stock transformers architectures at 1/1000 of the usual width, with their processors.

`Wiring` is what training needs to know about a family: how pixels become image tokens, where those stand in the
sequence, and how the decoder is run on embeddings. Sizes: width 128, 4 decoder layers, 16 image tokens.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastedit.pocket.names import MODELS
from fastedit.pocket.tokenizer import build_tokenizer
from fastedit.pocket.world import IMAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

IMAGE_TOKENS = 16
WIDTH, HEADS, LAYERS, FFN = 128, 4, 4, 384
_STD = 0.06
_GRID = 4  # image tokens come in raster order on a _GRID x _GRID board (LLaVA, Qwen)


@dataclasses.dataclass(frozen=True)
class Wiring:
    """How one family is trained: see `embed_images` and `decode`.

    before, after: token ids that stand before and after the image tokens in every prompt with an image.
    text_prefix: the ids that open a prompt without an image. answer: the ids between question and answer.
    """

    name: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    text_prefix: tuple[int, ...]
    answer: tuple[int, ...]

    def embed_images(self, model: PreTrainedModel, pixels: Tensor) -> Tensor:
        """Return (R, IMAGE_TOKENS, WIDTH), the image tokens of images (R, 3, 64, 64) with values in [-1, 1]."""
        rows = pixels.shape[0]
        if self.name == "pocket-llava":
            features = model.model.get_image_features(pixel_values=pixels).pooler_output
            stacked: Tensor = torch.stack(list(features)) if isinstance(features, (list, tuple)) else features
            return stacked
        if self.name == "pocket-blip2":
            seen = model.vision_model(pixel_values=pixels).last_hidden_state
            queries = model.query_tokens.expand(rows, -1, -1)
            queries = model.qformer(query_embeds=queries, encoder_hidden_states=seen).last_hidden_state
            projected: Tensor = model.language_projection(queries)
            return projected
        grid = torch.tensor([[1, IMAGE_SIZE // 8, IMAGE_SIZE // 8]]).expand(rows, -1)
        merged: Tensor = model.model.visual(qwen_patches(pixels), grid_thw=grid).pooler_output
        return merged.view(rows, IMAGE_TOKENS, WIDTH)

    def decode(self, model: PreTrainedModel, embeds: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Return the final hidden states (R, N, WIDTH), after the last norm.

        Args:
            embeds: (R, N, WIDTH). mask: (R, 1, N, N), additive. positions: (3, R, N): time, height, width; families
                with one position per token use the first row.
        """
        places: Tensor = positions[0]
        masks: Any = mask
        if self.name == "pocket-llava":
            decoder = model.model.language_model
        elif self.name == "pocket-blip2":
            decoder = model.language_model.model.decoder
        else:
            decoder = model.model.language_model
            places, masks = positions, {"full_attention": mask}
        hidden: Tensor = decoder(inputs_embeds=embeds, attention_mask=masks, position_ids=places, use_cache=False)[0]
        return hidden

    def image_positions(self, start: int) -> tuple[list[tuple[int, int, int]], int]:
        """Return the positions of the image tokens and the position that follows them."""
        if self.name == "pocket-qwen2vl":
            board = [(start, start + i // _GRID, start + i % _GRID) for i in range(IMAGE_TOKENS)]
            return board, start + _GRID
        return [(start + i,) * 3 for i in range(IMAGE_TOKENS)], start + IMAGE_TOKENS


def qwen_patches(pixels: Tensor) -> Tensor:
    """Return (R * 64, 3 * 2 * 8 * 8): patches in the order of Qwen's image processor (merged 2 x 2 groups together)."""
    rows, channels, edge, _ = pixels.shape
    g = edge // 16
    x = pixels.reshape(rows, channels, g, 2, 8, g, 2, 8).permute(0, 2, 5, 3, 6, 1, 4, 7)
    x = x.unsqueeze(6).expand(*x.shape[:6], 2, 8, 8)
    return x.reshape(rows * 4 * g * g, channels * 2 * 64)


def to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """Return (R, 3, 64, 64) float32 in [-1, 1], as every processor here makes them."""
    stacked = np.stack([np.asarray(image, dtype=np.uint8) for image in images])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def wiring(name: str, tokenizer: PreTrainedTokenizerFast) -> Wiring:
    """Return how the named model is trained."""
    special = ("<s>", "<|user|>", "<|assistant|>", "<|vision_start|>", "<|vision_end|>")
    ids = {token: int(tokenizer.convert_tokens_to_ids(token)) for token in special}
    start, user, answer = ids["<s>"], ids["<|user|>"], ids["<|assistant|>"]
    if name == "pocket-llava":
        return Wiring(name, (start, user), (), (start, user), (answer,))
    if name == "pocket-blip2":  # the raw prompt; the processor puts images before <s>
        return Wiring(name, (), (start,), (start,), ())
    opened = (start, user, ids["<|vision_start|>"])
    return Wiring(name, opened, (ids["<|vision_end|>"],), (start, user), (answer,))


def make_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Return the named model's tokenizer, built anew (needs easy-vqa for its words)."""
    if name == "pocket-blip2":
        return build_tokenizer(image_token=None, image_text=None)
    if name == "pocket-llava":
        return build_tokenizer(image_token="<image>", image_text="<image>")
    return build_tokenizer(image_token="<|image_pad|>", image_text="<|vision_start|><|image_pad|><|vision_end|>")


def make_processor(name: str, tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
    """Return the named model's processor."""
    scaling: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    if name == "pocket-llava":
        from transformers import LlavaProcessor
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        images = CLIPImageProcessorPil(
            size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, **scaling
        )
        return LlavaProcessor(
            images,
            tokenizer,
            patch_size=16,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=tokenizer.chat_template,
        )
    if name == "pocket-blip2":
        from transformers import Blip2Processor
        from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

        return Blip2Processor(
            BlipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, **scaling),
            tokenizer,
            num_query_tokens=IMAGE_TOKENS,
        )
    from fastedit.pocket.qwen_processor import make_qwen_processor

    return make_qwen_processor(tokenizer, scaling)


def make_model(name: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Return the named model with fresh random weights (torch's global generator), float32, eager attention.

    Raises:
        ValueError: unknown name.
    """
    if name not in MODELS:
        raise ValueError(f"make_model: name must be one of {MODELS} (got name={name!r})")
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
           "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    model = {"pocket-llava": _llava, "pocket-blip2": _blip2, "pocket-qwen2vl": _qwen}[name](tokenizer, ids)
    model.set_attn_implementation("eager")
    model.generation_config.update(**ids, max_new_tokens=64, do_sample=False)
    return model


def _llava(tokenizer: PreTrainedTokenizerFast, ids: dict[str, int]) -> PreTrainedModel:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=FFN, num_hidden_layers=4, num_attention_heads=HEADS, image_size=IMAGE_SIZE,
        patch_size=16, projection_dim=WIDTH, initializer_range=_STD, initializer_factor=1.0,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=FFN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=512, tie_word_embeddings=True,
        initializer_range=_STD, **ids,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1, vision_feature_select_strategy="default", image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=True, initializer_range=_STD,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config)


def _blip2(tokenizer: PreTrainedTokenizerFast, ids: dict[str, int]) -> PreTrainedModel:
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2QFormerConfig,
        Blip2VisionConfig,
        OPTConfig,
    )

    vision = Blip2VisionConfig(
        hidden_size=WIDTH, intermediate_size=FFN, num_hidden_layers=4, num_attention_heads=HEADS, image_size=IMAGE_SIZE,
        patch_size=16, initializer_range=_STD,
    )  # fmt: skip
    qformer = Blip2QFormerConfig(
        hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2, num_attention_heads=HEADS,
        encoder_hidden_size=WIDTH, cross_attention_frequency=1, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, initializer_range=_STD, vocab_size=1,
    )  # fmt: skip
    text = OPTConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, ffn_dim=FFN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        word_embed_proj_dim=WIDTH, max_position_embeddings=256, dropout=0.0, attention_dropout=0.0, layerdrop=0.0,
        init_std=_STD, tie_word_embeddings=True, **ids,
    )  # fmt: skip
    config = Blip2Config(
        vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=IMAGE_TOKENS,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), initializer_range=_STD, tie_word_embeddings=True,
    )  # fmt: skip
    model = Blip2ForConditionalGeneration(config)
    # Stock initialisation leaves the queries at zero, where they are all alike and stay so.
    torch.nn.init.normal_(model.query_tokens, std=0.5)
    return model


def _qwen(tokenizer: PreTrainedTokenizerFast, ids: dict[str, int]) -> PreTrainedModel:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    token = tokenizer.convert_tokens_to_ids
    vision = {"hidden_size": WIDTH, "out_hidden_size": WIDTH, "intermediate_size": 256, "depth": 4, "num_heads": HEADS,
              "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": IMAGE_SIZE,
              "fullatt_block_indexes": [0, 1, 2, 3], "initializer_range": _STD}  # fmt: skip
    text = {"vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "max_position_embeddings": 512,
            "tie_word_embeddings": True, "initializer_range": _STD, "use_sliding_window": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            **ids}  # fmt: skip
    config = Qwen2_5_VLConfig(
        vision_config=vision, text_config=text, image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"), vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"), tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config)
