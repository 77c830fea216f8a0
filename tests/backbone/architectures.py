"""Tiny stock models of many architectures with random weights, and processors for them. No download."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastedit.backbone import EditableModel
from fastedit.backbone.adapters import make_adapter
from fastedit.backbone.loading import end_tokens
from fastedit.backbone.synthetic.processors import made_up_tokenizer

VOCABULARY = 640
IMAGE, VIDEO, OPENS, CLOSES = 4, 5, 8, 9
PAD, VIDEO_PAD = 10, 11
_SIZES = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
_SIZES |= {"intermediate_size": 96, "vocab_size": VOCABULARY, "max_position_embeddings": 512}
_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _text(kind: str, **other: Any) -> dict[str, Any]:
    return {"model_type": kind, **_SIZES, **_ENDS, "tie_word_embeddings": False, **other}


def _rope(**other: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 1e4, **other}


_VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_VIT |= {"image_size": 32, "patch_size": 8}
_CLIP = {"model_type": "clip_vision_model", "projection_dim": 32, **_VIT}
_SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False, **_VIT}
_PIXTRAL = {"model_type": "pixtral", "head_dim": 16, **_VIT}
_QFORMER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_QFORMER |= {"encoder_hidden_size": 32, "vocab_size": VOCABULARY}
_MERGING = {"num_heads": 2, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}
_Q2 = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 4, **_MERGING}
_Q25 = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, **_MERGING}
_Q25 |= {"window_size": 32, "fullatt_block_indexes": [1]}
_Q35 = {"depth": 3, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, **_MERGING}
_Q35 |= {"num_position_embeddings": 64}
_Q3 = _Q35 | {"deepstack_visual_indexes": [0, 1]}
_GLM = {"depth": 2, "hidden_size": 32, "image_size": 32, "out_hidden_size": 64, "intermediate_size": 96, **_MERGING}
_MARKS = {"image_token_id": PAD, "video_token_id": VIDEO_PAD}
_QMARKS = _MARKS | {"vision_start_token_id": OPENS, "vision_end_token_id": CLOSES}
_EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
_EXPERTS |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
_LINEAR = {"linear_conv_kernel_dim": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
_LINEAR |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "head_dim": 16}
_LINEAR |= {"layer_types": ["linear_attention", "full_attention"] * 2}
_WINDOWS = {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
_MROPE = _rope(mrope_section=[2, 3, 3])
_LLAVA = {"image_token_index": IMAGE, "vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
_WHOLE = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
_GRID = {"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]}
_PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY}
_ALTUP = {"num_kv_shared_layers": 2, "laurel_rank": 8, "altup_num_inputs": 2}
_ALTUP |= {"activation_sparsity_pattern": [0.0] * 4}
_AUDIO = {"hidden_size": 32, "vocab_size": 20, "vocab_offset": VOCABULARY - 20, "conf_num_hidden_layers": 1}
_AUDIO |= {"conf_num_attention_heads": 2, "sscp_conv_channel_size": [8, 4]}
_MLA = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8}
_MLA |= {"qk_nope_head_dim": 8, "v_head_dim": 16, "moe_intermediate_size": 32, "n_routed_experts": 4}
_MLA |= {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1}
_SCOUT = {"head_dim": 16, "intermediate_size_mlp": 96, "num_local_experts": 4, "num_experts_per_tok": 1}
_SCOUT |= {"interleave_moe_layer_step": 2, "attention_chunk_size": 8, "no_rope_layer_interval": 2, "floor_scale": 4}
_LLAMA4 = {"image_size": 32, "patch_size": 8, "projector_input_dim": 32, "projector_output_dim": 32}
_LLAMA4 |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
_LLAMA4 |= {"vision_output_dim": 32, "rope_parameters": _rope()}
_GEMMA4 = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_GEMMA4 |= {"num_key_value_heads": 2, "head_dim": 16, "patch_size": 8, "pooling_kernel_size": 2}
_GEMMA4 |= {"position_embedding_size": 64}
_INTERN = _VIT | {"image_size": [32, 32], "patch_size": [8, 8]}
_OVIS = {"vocab_size": 32, "hidden_stride": 2, "num_visual_indicator_tokens": 5}
_OVIS |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_OVIS |= {"image_size": 32, "patch_size": 8}
_KIMI = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_KIMI |= {"patch_size": 8, "pos_emb_height": 8, "pos_emb_width": 8}
_MLLAMA = {"hidden_size": 32, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 2}
_MLLAMA |= {"intermediate_size": 64, "image_size": 32, "patch_size": 8, "vision_output_dim": 64, "max_num_tiles": 2}
_MLLAMA |= {"intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]}
_OPT = {"model_type": "opt", "hidden_size": 64, "word_embed_proj_dim": 64, "num_hidden_layers": 4, "dropout": 0.0}
_OPT |= {"num_attention_heads": 4, "ffn_dim": 96, "vocab_size": VOCABULARY, "max_position_embeddings": 512}
_OPT |= {"tie_word_embeddings": False, "pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 2}
_T5 = {"model_type": "t5", "d_model": 64, "d_kv": 12, "d_ff": 96, "num_layers": 4, "num_heads": 4}
_T5 |= {"vocab_size": VOCABULARY, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}
#: As Flan-T5 has it; few buckets, so that the distances of a short row are told apart and shared.
_FLAN = {"feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 8, "relative_attention_max_distance": 6}
_BLIP = {"qformer_config": _QFORMER, "num_query_tokens": 6, "image_token_index": IMAGE, "vision_config": _VIT}


def _llava(text: dict[str, Any], vision: dict[str, Any] = _CLIP, **other: Any) -> dict[str, Any]:
    return {"text_config": text, "vision_config": vision, **_LLAVA, **other}


#: Entries of a configuration by name, the model type before a "+".
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"text_config": _text("qwen2_vl_text", rope_parameters=_MROPE), "vision_config": _Q2, **_QMARKS},
    "qwen2_5_vl": {"text_config": _text("qwen2_5_vl_text", rope_parameters=_MROPE), "vision_config": _Q25, **_QMARKS},
    "qwen3_vl": {
        "text_config": _text("qwen3_vl_text", head_dim=16, rope_parameters=_MROPE),
        "vision_config": _Q3,
        **_QMARKS,
    },
    "qwen3_vl_moe": {
        "text_config": _text("qwen3_vl_moe_text", head_dim=16, rope_parameters=_MROPE, **_EXPERTS),
        "vision_config": _Q3,
        **_QMARKS,
    },
    "qwen3_5": {
        "text_config": _text("qwen3_5_text", rope_parameters=_MROPE, **_LINEAR),
        "vision_config": _Q35,
        **_QMARKS,
    },
    "qwen3_5_moe": {
        "text_config": _text(
            "qwen3_5_moe_text",
            rope_parameters=_MROPE,
            shared_expert_intermediate_size=32,
            **_EXPERTS,
            **_LINEAR,
        ),
        "vision_config": _Q35,
        **_QMARKS,
    },
    "gemma3": {
        "text_config": _text("gemma3_text", query_pre_attn_scalar=16, **_WINDOWS),
        "vision_config": _SIGLIP,
        "mm_tokens_per_image": 4,
        "image_token_index": IMAGE,
        "boi_token_index": OPENS,
        "eoi_token_index": CLOSES,
    },
    "gemma4": {
        "text_config": _text("gemma4_text", global_head_dim=16, num_kv_shared_layers=0, **_PER_LAYER, **_WINDOWS),
        "vision_config": _GEMMA4,
        "audio_config": None,
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "boi_token_id": OPENS,
        "eoi_token_id": CLOSES,
        "audio_token_id": 6,
    },
    "gemma3n": {
        "text_config": _text("gemma3n_text", **_PER_LAYER, **_WINDOWS, **_ALTUP) | {"intermediate_size": [96] * 4},
        "vision_config": {"hidden_size": 32, "vocab_size": 20, "vocab_offset": VOCABULARY - 40},
        "audio_config": _AUDIO,
        "image_token_id": IMAGE,
        "audio_token_id": 6,
        "vision_soft_tokens_per_image": 16,
    },
    "internvl": {
        "text_config": _text("qwen2"),
        "vision_config": _INTERN,
        "image_token_id": IMAGE,
        "image_seq_length": 4,
    },
    "llava": _llava(_text("llama")),
    "llava+mistral": _llava(_text("mistral", sliding_window=8)),
    "llava+qwen2siglip": _llava(_text("qwen2"), _SIGLIP, vision_feature_select_strategy="full", image_seq_length=16),
    "llava+phi3": _llava(_text("phi3")),
    "llava+gemma": _llava(_text("gemma", head_dim=16)),
    "llava+mixtral": _llava(_text("mixtral", num_local_experts=4)),
    "llava+pixtral": _llava(_text("mistral", head_dim=16), _PIXTRAL, **_WHOLE),
    "llava_next": _llava(_text("mistral", sliding_window=8), **_GRID),
    "llava_onevision": _llava(_text("qwen2"), _SIGLIP, video_token_index=VIDEO, **_WHOLE, **_GRID),
    "smolvlm": {
        "text_config": _text("llama"),
        "vision_config": _VIT | {"model_type": "smolvlm_vision"},
        "image_token_id": IMAGE,
        "scale_factor": 2,
    },
    "idefics3": {
        "text_config": _text("llama"),
        "vision_config": _VIT | {"model_type": "idefics3_vision"},
        "image_token_id": IMAGE,
        "scale_factor": 2,
    },
    "mistral3": {
        "text_config": _text("mistral", head_dim=16),
        "vision_config": _PIXTRAL,
        "image_token_index": IMAGE,
        "spatial_merge_size": 2,
    },
    "glm4v": {
        "text_config": _text("glm4v_text", rope_parameters=_rope(mrope_section=[2, 1, 1], partial_rotary_factor=0.5)),
        "vision_config": _GLM,
        **_MARKS,
        "image_start_token_id": OPENS,
        "image_end_token_id": CLOSES,
        "video_start_token_id": 6,
        "video_end_token_id": 7,
    },
    "paligemma": {
        "text_config": _text("gemma2", query_pre_attn_scalar=16, **_WINDOWS),
        "vision_config": _SIGLIP | {"projection_dim": 64},
        "image_token_index": IMAGE,
        "projection_dim": 64,
        "hidden_size": 64,
        "vocab_size": VOCABULARY,
    },
    "llama4": {
        "text_config": _text("llama4_text", rope_parameters=_rope(), **_SCOUT),
        "vision_config": _LLAMA4,
        "image_token_index": IMAGE,
        "boi_token_index": OPENS,
        "eoi_token_index": CLOSES,
    },
    "mllama": {
        "text_config": _text("mllama_text_model", cross_attention_layers=[1, 3], rope_parameters=_rope()),
        "vision_config": _MLLAMA,
        "image_token_index": IMAGE,
    },
    "blip-2": {"text_config": _OPT, **_BLIP},
    "blip-2+t5": {"text_config": _T5 | {"tie_word_embeddings": False, **_FLAN}, **_BLIP},
    "instructblip": {"text_config": _text("llama"), **_BLIP},
    "instructblip+opt": {"text_config": _OPT, **_BLIP},
    "instructblip+t5": {"text_config": _T5, **_BLIP},
    "kimi_k25": {
        "text_config": _text("deepseek_v3", **_MLA),
        "vision_config": _KIMI,
        "projection_hidden_size": 32,
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": OPENS,
        "vision_end_token_id": CLOSES,
    },
    "aya_vision": {
        "text_config": _text("cohere2", **_WINDOWS),
        "vision_config": _SIGLIP,
        "image_token_index": IMAGE,
        "downsample_factor": 2,
    },
    "cohere2_vision": {
        "text_config": _text("cohere2", **_WINDOWS),
        "vision_config": _SIGLIP,
        "image_token_id": IMAGE,
        "downsample_factor": 2,
        "alignment_intermediate_size": 64,
    },
    "deepseek_vl": {"text_config": _text("llama"), "vision_config": _SIGLIP, "image_token_id": IMAGE},
    "ovis2": {
        "text_config": _text("qwen2"),
        "vision_config": _OVIS,
        "image_token_id": IMAGE,
        "visual_indicator_token_ids": [5, 6, 7, 8, 9],
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
    },
    "video_llava": {
        "text_config": _text("llama"),
        "vision_config": _CLIP,
        "image_token_index": IMAGE,
        "video_token_index": VIDEO,
        "image_seq_length": 16,
        "video_seq_length": 32,
    },
}
#: Text models alone.
TEXTS: dict[str, dict[str, Any]] = {
    "llama": _text("llama"),
    "mistral": _text("mistral", sliding_window=6),
    "qwen3": _text("qwen3", head_dim=16),
    "qwen3_moe": _text("qwen3_moe", head_dim=16, **_EXPERTS),
    "gemma2": _text("gemma2", query_pre_attn_scalar=16, attn_logit_softcapping=5.0, **_WINDOWS),
    "gemma3_text": _text("gemma3_text", query_pre_attn_scalar=16, **_WINDOWS),
    "gemma3n_text": _text(
        "gemma3n_text",
        **_PER_LAYER,
        **_WINDOWS,
        **_ALTUP,
    )
    | {"intermediate_size": [96] * 4},
    "gemma4_text": _text("gemma4_text", global_head_dim=16, num_kv_shared_layers=2, **_PER_LAYER, **_WINDOWS),
    "phi3": _text("phi3"),
    "phi": _text("phi"),
    "cohere": _text("cohere"),
    "cohere2": _text("cohere2", **_WINDOWS),
    "glm4": _text("glm4", head_dim=16),
    "smollm3": _text("smollm3", no_rope_layer_interval=2),
    "llama4_text": _text("llama4_text", rope_parameters=_rope(), **_SCOUT | {"attention_chunk_size": 5}),
    "gpt_oss": _text("gpt_oss", num_local_experts=4, num_experts_per_tok=2, **_WINDOWS),
    "olmo2": _text("olmo2"),
    "granite": _text("granite", logits_scaling=4.0),
    "starcoder2": _text("starcoder2"),
    "stablelm": _text("stablelm"),
    "deepseek_v3": _text("deepseek_v3", **_MLA),
    "opt": _OPT,
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY},
    "qwen3_5_text": _text("qwen3_5_text", rope_parameters=_MROPE, **_LINEAR),
    "lfm2": _text("lfm2", layer_types=["conv", "full_attention"] * 2),
}


def model_type(key: str) -> str:
    """The model type that a name begins with."""
    return key.split("+")[0]


def make_stock(key: str, dtype: torch.dtype = torch.float64) -> Any:
    """Return a stock model with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    maker: Any
    if key in TEXTS:
        config, maker = AutoConfig.for_model(**TEXTS[key]), AutoModelForCausalLM
    else:
        config, maker = AutoConfig.for_model(model_type(key), **ARCHITECTURES[key]), AutoModelForImageTextToText
    # The grouped kernels of experts refuse float64
    config._experts_implementation = config.get_text_config()._experts_implementation = "eager"
    torch.manual_seed(0)
    with _towers_of_timm():
        hf = maker.from_config(config, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(parameter.dtype)
            is_norm = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(0.12 * noise + (1.0 if is_norm else 0.0))
    hf.tie_weights()
    return hf


class _TimmTower(torch.nn.Module):
    """Stands for the convolutions of timm, which needs torchvision: patches of 8 x 8 to 32 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = torch.nn.Conv2d(3, 32, 8, 8)

    def forward_features(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, 32, H / 8, W / 8)."""
        return self.patches(pixels)


@contextmanager
def _towers_of_timm() -> Iterator[None]:
    """Inside the block, stock towers that wrap a model of timm wrap another (Gemma 3n)."""
    from transformers.models.timm_wrapper import modeling_timm_wrapper as wrapper

    made = {
        "_create_timm_model_with_error_handling": lambda *_, **__: _TimmTower(),
        "requires_backends": lambda *_: None,
    }
    with mock.patch.multiple(wrapper, **made):
        yield


def _pixels(image: Image.Image, height: int, width: int, patch: int = 0) -> Tensor:
    """(3, height, width), or patches (P, 3 * patch * patch) in rows."""
    values = np.asarray(image.convert("RGB").resize((width, height)), dtype=np.float32) / 127.5 - 1
    pixels = torch.from_numpy(values.copy()).permute(2, 0, 1)
    if not patch:
        return pixels
    return pixels.unfold(1, patch, patch).unfold(2, patch, patch).permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1)


def _grid(image: Image.Image) -> tuple[dict[str, Tensor], list[int]]:
    """Patches of a tower that merges two by two, wide images with more of them."""
    wide = 2 if image.width > image.height else 1
    patches = _pixels(image, 32, 32 * wide, 8)
    grid = torch.tensor([[1, 4, 4 * wide]])
    return {"pixel_values": patches.repeat(1, 2), "image_grid_thw": grid}, [OPENS, *[PAD] * (4 * wide), CLOSES]


def _fixed(tokens: int, name: str = "pixel_values", **other: Tensor) -> Callable[[Image.Image], Any]:
    """One square image of so many tokens."""

    def made(image: Image.Image) -> tuple[dict[str, Tensor], list[int]]:
        return {name: _pixels(image, 32, 32)[None], **other}, [IMAGE] * tokens

    return made


def _between(tokens: int) -> Callable[[Image.Image], Any]:
    def made(image: Image.Image) -> tuple[dict[str, Tensor], list[int]]:
        return {"pixel_values": _pixels(image, 32, 32)[None]}, [OPENS, *[IMAGE] * tokens, CLOSES]

    return made


def _pixtral(merge: int) -> Callable[[Image.Image], Any]:
    """Rows of image tokens, each with a break behind it; wide images have longer rows."""

    def made(image: Image.Image) -> tuple[dict[str, Tensor], list[int]]:
        wide = 2 if image.width > image.height else 1
        pixels, size = _pixels(image, 32, 32 * wide)[None], torch.tensor([[32, 32 * wide]])
        row = [IMAGE] * (4 * wide // merge)
        return {"pixel_values": pixels, "image_sizes": size}, [*[*row, 20] * (4 // merge - 1), *row, 21]

    return made


def _mllama(image: Image.Image) -> tuple[dict[str, Tensor], list[int]]:
    """One tile, or two of a wide image."""
    wide = image.width > image.height
    tiles = torch.stack(_pixels(image, 32, 64 if wide else 32).split(32, 2))
    pixels = torch.zeros(1, 1, 2, 3, 32, 32)
    pixels[0, 0, : len(tiles)] = tiles
    used = torch.tensor([[[1, int(wide)]]])
    return {"pixel_values": pixels, "aspect_ratio_ids": torch.tensor([[1 + wide]]), "aspect_ratio_mask": used}, [IMAGE]


def _tiled(image: Image.Image) -> tuple[dict[str, Tensor], list[int]]:
    size = torch.tensor([[32, 60]])
    parts = torch.stack([_pixels(image, 32, 32), *_pixels(image, 32, 64).split(32, 2)])
    return {"pixel_values": parts[None], "image_sizes": size}, []


def _idefics(image: Image.Image) -> tuple[dict[str, Tensor], list[int]]:
    return {"pixel_values": _pixels(image, 32, 32)[None, None]}, [IMAGE] * 4


def _gemma4(image: Image.Image) -> tuple[dict[str, Tensor], list[int]]:
    axes = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy")
    places = torch.stack(axes, -1).reshape(1, 16, 2)
    tensors = {"pixel_values": _pixels(image, 32, 32, 8)[None], "image_position_ids": places}
    return tensors, [OPENS, *[IMAGE] * 4, CLOSES]


def _kimi(image: Image.Image) -> tuple[dict[str, Tensor], list[int]]:
    patches = _pixels(image, 32, 32, 8).view(16, 3, 8, 8)
    return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]])}, [OPENS, *[IMAGE] * 4, CLOSES]


_LAYOUTS: dict[str, Callable[[Image.Image], Any]] = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "glm4v"), _grid),
    **dict.fromkeys(("llava", "paligemma", "deepseek_vl", "gemma3n"), _fixed(16)),
    **dict.fromkeys(("internvl", "aya_vision", "cohere2_vision", "ovis2"), _fixed(4)),
    **dict.fromkeys(("smolvlm", "idefics3"), _idefics),
    **dict.fromkeys(("llava_next", "llava_onevision"), _tiled),
    **dict.fromkeys(("gemma3", "llama4"), _between(4)),
    **dict.fromkeys(("blip-2", "instructblip"), _fixed(6)),
    "video_llava": _fixed(16, "pixel_values_images"),
    "llava+pixtral": _pixtral(1),
    "mistral3": _pixtral(2),
    "gemma4": _gemma4,
    "mllama": _mllama,
    "kimi_k25": _kimi,
}


class LayoutProcessor:
    """Does what a checkpoint's processor does: tokens of a text with those of its image in place, and its tensors.

    Args:
        key: of an architecture. hf: the model, which tells how many tokens a tiled image has.
    """

    chat_template = None
    image_processor = None

    def __init__(self, key: str, hf: Any) -> None:
        marked = model_type(key).startswith(("qwen", "glm"))
        self.tokenizer = made_up_tokenizer(VOCABULARY, end="</s>", opens=not marked)
        self.image_token_id = PAD if marked else IMAGE
        self.image_token = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
        self._layout = _LAYOUTS.get(key) or _LAYOUTS.get(model_type(key))
        self._hf = hf
        #: Where image tokens lead; and where the Q-Former reads the prompt.
        self.num_query_tokens = getattr(hf.config, "num_query_tokens", None)
        self.qformer_tokenizer = self.tokenizer if model_type(key) == "instructblip" else None

    def __call__(self, text: list[str], images: list[Image.Image] | None = None, **_: Any) -> dict[str, Any]:
        """Return ids (1, N) and what the model takes of one image."""
        assert self._layout is not None
        read: dict[str, Any] = {}
        if self.qformer_tokenizer is not None:
            asked = torch.tensor([self.qformer_tokenizer("asked: " + text[0])["input_ids"]])
            read = {"qformer_input_ids": asked, "qformer_attention_mask": torch.ones_like(asked)}
        if images is None:
            return {"input_ids": torch.tensor([self.tokenizer(text[0])["input_ids"]]), **read}
        tensors, tokens = self._layout(images[0])
        if not tokens:
            dtype = next(self._hf.parameters()).dtype
            with torch.no_grad():
                features = self._hf.model.get_image_features(
                    tensors["pixel_values"].to(dtype), tensors["image_sizes"], return_dict=True
                ).pooler_output
            tokens = [IMAGE] * features[0].shape[0]
        ids = list(self.tokenizer(text[0])["input_ids"])
        if self.num_query_tokens is not None:
            return {"input_ids": torch.tensor([[*tokens, *ids]]), **tensors, **read}
        place = ids.index(self.image_token_id)
        ids = [*ids[:place], *tokens, *ids[place + 1 :]]
        if "aspect_ratio_mask" in tensors:
            seen = torch.arange(len(ids)) >= place
            tensors["cross_attention_mask"] = seen[None, :, None, None] * tensors["aspect_ratio_mask"][:, None]
        return {"input_ids": torch.tensor([ids]), **tensors}


def make_editable(key: str, hf: Any) -> EditableModel:
    """Return a stock model as one that can be edited, whatever its architecture, without its family's fast path."""
    from fastedit.backbone.generic.adapter import GenericAdapter

    processor = LayoutProcessor(key, hf)
    return EditableModel(
        hf,
        processor,
        GenericAdapter(hf, processor),
        name=key,
        quantize="none",
        dtype=hf.dtype,
        template="question: {} answer:",
        end_token_ids=end_tokens(hf, processor.tokenizer),
        image_cache_mib=16,
    )


__all__ = ["ARCHITECTURES", "TEXTS", "LayoutProcessor", "make_adapter", "make_editable", "make_stock"]
