"""Configurations of the `random:` models, as data: stock sizes, and small ones for tests.

Speed does not depend on what weights know, so a stock configuration with random weights times like the real model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Shape:
    """One configuration.

    Args:
        model_type: of the whole model.
        text, vision: entries of the text and vision configurations, `model_type` among them.
        top: entries of the whole configuration.
        qformer: entries of the Q-Former's configuration, where there is one.
        image_size: pixels of a side that images are brought to.
        std: standard deviation of the weights.
    """

    model_type: str
    text: dict[str, Any]
    vision: dict[str, Any]
    top: dict[str, Any]
    image_size: int
    qformer: dict[str, Any] | None = None
    std: float = 0.02


def _llama(d: int, layers: int, heads: int, ffn: int, vocab: int, **other: Any) -> dict[str, Any]:
    sizes: dict[str, Any] = {"model_type": "llama", "hidden_size": d, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads, "intermediate_size": ffn, "vocab_size": vocab}
    return sizes | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False} | other


def _qwen_text(d: int, layers: int, heads: int, kv_heads: int, ffn: int, vocab: int, **other: Any) -> dict[str, Any]:
    sizes: dict[str, Any] = {"hidden_size": d, "num_hidden_layers": layers, "num_attention_heads": heads}
    sizes |= {"num_key_value_heads": kv_heads, "intermediate_size": ffn, "vocab_size": vocab}
    quarter = d // heads // 8
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [quarter, 3 * quarter // 2, 3 * quarter // 2]}
    return sizes | {"max_position_embeddings": 32768, "tie_word_embeddings": False, "rope_parameters": rope} | other


def _vision(kind: str, d: int, layers: int, heads: int, ffn: int, image: int, patch: int) -> dict[str, Any]:
    sizes = {"model_type": kind, "hidden_size": d, "num_hidden_layers": layers, "num_attention_heads": heads}
    return sizes | {"intermediate_size": ffn, "image_size": image, "patch_size": patch}


_CLIP_LARGE = _vision("clip_vision_model", 1024, 24, 16, 4096, 336, 14) | {"projection_dim": 768}
_SIGLIP = _vision("siglip_vision_model", 1152, 26, 16, 4304, 384, 14) | {"vision_use_head": False}
_VIT_G = _vision("blip_2_vision_model", 1408, 39, 16, 6144, 224, 14)
_VIT_TINY = _vision("blip_2_vision_model", 32, 2, 2, 64, 32, 8)
_CLIP_TINY = _vision("clip_vision_model", 32, 2, 2, 64, 32, 8) | {"projection_dim": 32}
_SIGLIP_TINY = _vision("siglip_vision_model", 32, 2, 2, 64, 32, 8) | {"vision_use_head": False}
_QFORMER = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
_QFORMER_TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_OPT = {"model_type": "opt", "dropout": 0.0, "attention_dropout": 0.0, "max_position_embeddings": 2048}
_GRID = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
_ONEVISION_GRID = [[384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)]
_TINY_GRID = [[32, 64], [64, 32], [64, 64]]
_LLAVA_15 = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
_FULL = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
_OPT_27B = {"hidden_size": 2560, "word_embed_proj_dim": 2560, "num_hidden_layers": 32, "num_attention_heads": 32}
_OPT_TINY = {"hidden_size": 64, "word_embed_proj_dim": 64, "num_hidden_layers": 4, "num_attention_heads": 4}


def _qwen2_vision(depth: int, d: int, out: int, heads: int, patch: int = 14) -> dict[str, Any]:
    sizes = {"depth": depth, "embed_dim": d, "hidden_size": out, "num_heads": heads, "mlp_ratio": 4}
    return sizes | {"patch_size": patch, "spatial_merge_size": 2, "temporal_patch_size": 2}


def _qwen25_vision(depth: int, d: int, ffn: int, out: int, heads: int, full: list[int], **other: Any) -> dict[str, Any]:
    sizes = {"depth": depth, "hidden_size": d, "intermediate_size": ffn, "out_hidden_size": out, "num_heads": heads}
    merging = {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112}
    return sizes | merging | {"fullatt_block_indexes": full} | other


def _qwen3_vision(depth: int, d: int, ffn: int, out: int, heads: int, deep: list[int], grid: int) -> dict[str, Any]:
    sizes = {"depth": depth, "hidden_size": d, "intermediate_size": ffn, "out_hidden_size": out, "num_heads": heads}
    merging = {"patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2}
    return sizes | merging | {"deepstack_visual_indexes": deep, "num_position_embeddings": grid}


SHAPES: dict[str, Shape] = {
    "llava-1.5-7b": Shape("llava", _llama(4096, 32, 32, 11008, 32064), _CLIP_LARGE, _LLAVA_15, 336),
    "llava-1.5-13b": Shape("llava", _llama(5120, 40, 40, 13824, 32064), _CLIP_LARGE, _LLAVA_15, 336),
    "llava-next-mistral-7b": Shape(
        "llava_next",
        _llama(4096, 32, 32, 14336, 32064, model_type="mistral", num_key_value_heads=8, sliding_window=None),
        _CLIP_LARGE,
        _LLAVA_15 | {"image_grid_pinpoints": _GRID},
        336,
    ),
    "llava-onevision-7b": Shape(
        "llava_onevision",
        _llama(3584, 28, 28, 18944, 152064, model_type="qwen2", num_key_value_heads=4, max_position_embeddings=32768),
        _SIGLIP,
        _FULL | {"image_grid_pinpoints": _ONEVISION_GRID},
        384,
    ),
    "blip2-opt-2.7b": Shape(
        "blip-2",
        _OPT | _OPT_27B | {"ffn_dim": 10240, "vocab_size": 50304},
        _VIT_G,
        {"num_query_tokens": 32},
        224,
        _QFORMER,
    ),
    "minigpt4-7b": Shape("blip-2", _llama(4096, 32, 32, 11008, 32000), _VIT_G, {"num_query_tokens": 32}, 224, _QFORMER),
    "qwen2vl-77m": Shape("qwen2_vl", _qwen_text(512, 12, 8, 8, 1376, 32000), _qwen2_vision(6, 256, 512, 8), {}, 224),
    "qwen2-vl-2b": Shape(
        "qwen2_vl",
        _qwen_text(1536, 28, 12, 2, 8960, 151936, tie_word_embeddings=True),
        _qwen2_vision(32, 1280, 1536, 16),
        {"tie_word_embeddings": True},
        448,
    ),
    "qwen2-vl-7b": Shape(
        "qwen2_vl", _qwen_text(3584, 28, 28, 4, 18944, 152064), _qwen2_vision(32, 1280, 3584, 16), {}, 448
    ),
    "qwen2.5-vl-7b": Shape(
        "qwen2_5_vl",
        _qwen_text(3584, 28, 28, 4, 18944, 152064),
        _qwen25_vision(32, 1280, 3420, 3584, 16, [7, 15, 23, 31]),
        {},
        448,
    ),
    "qwen3-vl-8b": Shape(
        "qwen3_vl",
        _qwen_text(4096, 36, 32, 8, 12288, 151936, head_dim=128),
        _qwen3_vision(27, 1152, 4304, 4096, 16, [8, 16, 24], 2304),
        {},
        448,
    ),
    "llava-tiny": Shape(
        "llava",
        _llama(64, 4, 4, 96, 640, num_key_value_heads=2, max_position_embeddings=256),
        _CLIP_TINY,
        _LLAVA_15,
        32,
        std=0.12,
    ),
    "llava-next-tiny": Shape(
        "llava_next",
        _llama(64, 3, 4, 96, 640, model_type="mistral", num_key_value_heads=2, sliding_window=24),
        _CLIP_TINY,
        _LLAVA_15 | {"image_grid_pinpoints": _TINY_GRID},
        32,
        std=0.12,
    ),
    "llava-onevision-tiny": Shape(
        "llava_onevision",
        _llama(64, 3, 4, 96, 640, model_type="qwen2", num_key_value_heads=2),
        _SIGLIP_TINY,
        _FULL | {"image_grid_pinpoints": _TINY_GRID},
        32,
        std=0.12,
    ),
    "blip2-tiny": Shape(
        "blip-2",
        _OPT | _OPT_TINY | {"ffn_dim": 96, "vocab_size": 640},
        _VIT_TINY,
        {"num_query_tokens": 6},
        32,
        _QFORMER_TINY,
        std=0.12,
    ),
    "blip2-postnorm-tiny": Shape(
        "blip-2",
        _OPT | _OPT_TINY | {"ffn_dim": 96, "vocab_size": 640, "do_layer_norm_before": False},
        _VIT_TINY,
        {"num_query_tokens": 6},
        32,
        _QFORMER_TINY,
        std=0.12,
    ),
    "minigpt4-tiny": Shape(
        "blip-2", _llama(64, 3, 4, 96, 640), _VIT_TINY, {"num_query_tokens": 6}, 32, _QFORMER_TINY, std=0.12
    ),
    "qwen2vl-tiny": Shape(
        "qwen2_vl",
        _qwen_text(64, 4, 4, 2, 96, 640, tie_word_embeddings=True),
        _qwen2_vision(2, 32, 64, 2, patch=8),
        {"tie_word_embeddings": True},
        64,
        std=0.12,
    ),
    "qwen2.5vl-tiny": Shape(
        "qwen2_5_vl",
        _qwen_text(64, 3, 4, 2, 96, 640),
        _qwen25_vision(2, 32, 64, 64, 2, [1], patch_size=8, window_size=32),
        {},
        64,
        std=0.12,
    ),
    "qwen3vl-tiny": Shape(
        "qwen3_vl",
        _qwen_text(64, 4, 4, 2, 96, 640, head_dim=16),
        _qwen3_vision(3, 32, 64, 64, 2, [0, 1], 64),
        {},
        64,
        std=0.12,
    ),
}
