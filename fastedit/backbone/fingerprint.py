"""What a model is, in 64 hexadecimal digits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .placement import host_weights, stored_weights

#: Bytes of a weight that are on the host at a time.
PART = 64 << 20
#: Configuration entries that say where or how a model was loaded or saved, not what it computes; the type of weights is
#: told by the weights.
_VOLATILE = (
    "_name_or_path", "transformers_version", "_attn_implementation", "attn_implementation",
    "architectures", "dtype", "torch_dtype",
)  # fmt: skip


def weights_hash(module: nn.Module) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes of a state dict. Equal means bit-identical."""
    digest = hashlib.sha256()
    for name, value in stored_weights(module):
        digest.update(name.encode())
        if not isinstance(value, Tensor):
            digest.update(repr(value).encode())
            continue
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        for part in _bytes(value):
            digest.update(part)
    return digest.hexdigest()


def model_fingerprint(hf: Any) -> str:
    """Return the SHA-256 over configuration and weights of a Hugging Face model."""
    config = hf.config.to_dict()
    # A trainer that is made around a model sets it; nothing is computed otherwise
    config.pop("use_cache", None)
    digest = hashlib.sha256(json.dumps(_stable(config), sort_keys=True, default=str).encode())
    digest.update(weights_hash(hf).encode())
    return digest.hexdigest()


def architecture_fingerprint(hf: nn.Module) -> str:
    """Return "architecture:" and the SHA-256 over names and shapes of the linear maps, embeddings and norms.

    A quantized map has the shape of the one that it stands for, and adapters beside it do not count.
    """
    digest = hashlib.sha256()
    for name, module in sorted(hf.named_modules()):
        if hasattr(module, "in_features") and hasattr(module, "out_features") and "lora_" not in name:
            name = name.removesuffix(".base_layer")
            digest.update(f"{name}:{module.in_features}:{module.out_features}\n".encode())
    return f"architecture:{digest.hexdigest()}"


def weights_version(hf: nn.Module) -> tuple[int, int]:
    """Return what changes with every in-place change of a parameter, and with every exchange of one.

    A parameter that is kept elsewhere until its module runs is exchanged at every call, and does not count; what is
    kept of it in host memory does.
    """
    every = list(hf.parameters())
    parts = [part for part in every if not part.is_meta]
    kept = host_weights(hf) if len(parts) < len(every) else []
    version = sum(part._version for part in (*parts, *kept) if not part.is_inference())
    return version, hash(tuple(map(id, parts)))


def _bytes(value: Tensor) -> Iterator[Any]:
    """The raw bytes of a tensor of any dtype, a part at a time: the largest weight is not copied whole."""
    flat = value.detach().contiguous().reshape(-1)
    if flat.numel():
        for part in torch.split(flat.view(torch.uint8), PART):
            yield part.cpu().numpy()


def _stable(config: Any) -> Any:
    """Drop volatile entries at every level."""
    if isinstance(config, dict):
        return {str(key): _stable(value) for key, value in config.items() if key not in _VOLATILE}
    if isinstance(config, (list, tuple)):
        return [_stable(value) for value in config]
    return config
