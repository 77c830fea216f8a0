"""A model with some other weights as a folder that ``from_pretrained`` loads; the model in memory is only read."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastedit.backbone import EditableModel
from fastedit.backbone.loading import without_bars
from fastedit.backbone.opening import POCKET_PREFIX, resolve_name
from fastedit.backbone.placement import kept_weight

#: What belongs to a checkpoint besides, copied from the one that the model was loaded from where nothing else wrote it.
_OTHER_FILES = (
    "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "chat_template.jinja",
    "chat_template.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip


def write_checkpoint(
    model: EditableModel,
    changed: Mapping[str, Tensor],
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "50GB",
) -> None:
    """Write the stock model with some weights exchanged, by its own ``save_pretrained``, and all that it needs beside.

    That is called of a model without memory that is made anew of the configuration, with the state dict given: the
    live model's configuration and weights stay as they are, whoever uses them meanwhile.

    Args:
        model: the base. changed: name in its state dict -> the value to be written.
        folder: which exists.
        dtype: of the weights, but for those that the model keeps in another type than most; None is theirs.
        max_shard_size: of a file, as for ``save_pretrained``.
    Raises:
        ValueError: parts of the model are not of its architecture (adapters, for example).
        OSError: it cannot be written.
    """
    state = state_dict(model.hf, changed, model.dtype, dtype)
    skeleton = _skeleton(model.hf, model.dtype if dtype is None else dtype)
    _require_same(skeleton, state)
    with without_bars():
        skeleton.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)
    save_processor(model, folder)


def state_dict(
    hf: Any, changed: Mapping[str, Tensor], before: torch.dtype, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """The state dict of a model with some tensors exchanged; all others are the model's own, or copies in ``dtype``.

    Args:
        hf: the stock model. changed: by name. before: the type of most weights. dtype: what those become; None leaves
            them.
    """
    state: dict[str, Tensor] = {}
    converted: dict[tuple[object, ...], Tensor] = {}
    for name, value in hf.state_dict().items():
        if name in changed:
            state[name] = changed[name]
            continue
        tensor = kept_weight(hf, name) if value.is_meta else value
        if dtype is not None and tensor.dtype == before and dtype != before:
            # Tied weights stay one
            key = tensor.data_ptr(), tensor.shape, tensor.stride()
            if key not in converted:
                converted[key] = tensor.to(dtype)
            tensor = converted[key]
        state[name] = tensor
    return state


def size_bytes(hf: Any, before: torch.dtype, dtype: torch.dtype | None) -> int:
    """Bytes of the weights as they will be written, tied ones once."""
    wide = before.itemsize if dtype is None else dtype.itemsize
    return sum(part.numel() * (wide if part.dtype == before else part.element_size()) for part in hf.parameters())


def save_processor(model: EditableModel, folder: Path) -> None:
    """Write processor, tokenizer and chat template beside the weights."""
    model.processor.save_pretrained(folder)
    if not (Path(model.name).is_dir() or model.name.startswith(POCKET_PREFIX)):
        return
    source = Path(resolve_name(model.name))
    for name in _OTHER_FILES:
        if not (folder / name).exists() and (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _skeleton(hf: Any, dtype: torch.dtype) -> Any:
    """A model of the same configuration on the meta device."""
    config = copy.deepcopy(hf.config)
    with torch.device("meta"):
        made = type(hf)._from_config(config, dtype=dtype)
    if getattr(hf, "generation_config", None) is not None:
        made.generation_config = copy.deepcopy(hf.generation_config)
    # How the names and shapes of a checkpoint's tensors became those of the model
    if getattr(hf, "_weight_conversions", None) is not None:
        made._weight_conversions = copy.deepcopy(hf._weight_conversions)
    return made


def _require_same(skeleton: Any, state: Mapping[str, Tensor]) -> None:
    shapes = {name: tuple(value.shape) for name, value in skeleton.state_dict().items()}
    for name in sorted({*shapes, *state}):
        there = tuple(state[name].shape) if name in state else None
        if there != shapes.get(name):
            raise ValueError(
                "export: the model has the weights of its configuration and no others; adapters are merged or removed "
                f"before (got {name!r} with shape {there}, by the configuration {shapes.get(name)})"
            )
