"""`load`: from a name to an editable model, every mistake in the arguments refused before any work."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastedit.ops import release_workspaces

from .adapters import check_family, make_adapter
from .model import EditableModel
from .processors import load_processor
from .products import LINEAR, choose_linear, use_onednn
from .prompts import check_template
from .quantization import QUANTIZATIONS, Quantizer
from .random_models import make_random
from .random_shapes import SHAPES

RANDOM_PREFIX = "random:"
POCKET_PREFIX = "pocket-"
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
ATTENTIONS: tuple[str, ...] = (
    "sdpa",
    "eager",
    "flash_attention_2",
    "flash_attention_3",
    "flex_attention",
)


def load(
    name_or_path: str | os.PathLike[str],
    *,
    quantize: str = "none",
    dtype: str | None = "float32",
    device: str | torch.device | None = None,
    attention: str | None = None,
    template: str | None = None,
    keep: Sequence[int | str] = (),
    seed: int = 0,
    image_cache_mib: int = 1024,
    state_cache_mib: int = 256,
    linear: str = "auto",
) -> EditableModel:
    """Return a frozen multimodal model that can be edited.

    Args:
        name_or_path: an embedded model ("pocket-llava"), "random:<shape>" (a stock configuration with random weights),
            a local folder, or a Hugging Face id. Only safetensors are read; code from a checkpoint is never run.
        quantize: "none", "nf4" or "int8" (bitsandbytes) for the decoder's linear maps; head, vision side and
            projector are left as they are. A checkpoint that is already quantized keeps its own.
        dtype: "float32", "bfloat16", "float16", "float64", or None for what the checkpoint was stored in.
        device: None is the first GPU where there is one, else the CPU.
        attention: attention implementation of transformers; None is its default.
        template: prompt text around the question, "Question: {} Short answer:"; None is the processor's chat template
            where it has one, else the bare question.
        keep: what stays unquantized besides: decoder layers by number, modules by dotted path.
        seed: of random weights.
        image_cache_mib: memory for image features, and as much for preprocessed images.
        state_cache_mib: memory on the device for prefix states of locality questions, and as much for their reference
            logits. What no longer fits, of this and of image features, goes to as much host memory, then is made again.
        linear: who multiplies frozen float32 weights on a CPU: "torch", "onednn", or "auto", which takes oneDNN where
            torch's own library does not use the processor's full width (AVX-512 that is not Intel's).
    Raises:
        ValueError, FileNotFoundError, ImportError: what is wrong, with the value, the rule and the nearest known name.
    """
    name = os.fspath(name_or_path)
    check_choice("quantize", quantize, QUANTIZATIONS)
    if dtype is not None:
        check_choice("dtype", dtype, tuple(DTYPES))
    if attention is not None:
        check_choice("attention", attention, ATTENTIONS)
    check_choice("linear", linear, LINEAR)
    check_template(template)
    for field, budget in (("image_cache_mib", image_cache_mib), ("state_cache_mib", state_cache_mib)):
        if budget < 0:
            raise ValueError(f"load: {field} must not be negative (got {field}={budget})")
    place = torch.device(device) if device is not None else default_device()
    choose_linear(linear, DTYPES[dtype or "float32"], place)
    if name.startswith(RANDOM_PREFIX):
        shape_name = name.removeprefix(RANDOM_PREFIX)
        check_choice("random shape", shape_name, tuple(SHAPES))
        model_type = SHAPES[shape_name].model_type
        quantizer = Quantizer(quantize, model_type, keep, DTYPES[dtype or "float32"])
        hf, processor = make_random(
            shape_name,
            dtype=DTYPES[dtype or "float32"],
            device=place,
            attention=attention,
            seed=seed,
            convert=quantizer.convert if quantizer.active else None,
        )
    else:
        source = resolve_name(name)
        hf, processor, quantizer = _load_checkpoint(name, source, quantize, dtype, place, attention, keep)
    quantizer.cure(hf)
    multiplied_by = choose_linear(linear, _float_dtype(hf), place)
    if multiplied_by == "onednn":
        use_onednn(hf)
    # What reading and quantizing weights left behind
    release_workspaces()
    return EditableModel(
        hf,
        processor,
        make_adapter(hf, processor),
        name=name,
        quantize=quantizer.kind,
        dtype=_float_dtype(hf),
        template=template,
        end_token_ids=end_tokens(hf, processor.tokenizer),
        image_cache_mib=image_cache_mib,
        state_cache_mib=state_cache_mib,
        linear=multiplied_by,
    )


def _load_checkpoint(
    name: str,
    source: str,
    quantize: str,
    dtype: str | None,
    place: torch.device,
    attention: str | None,
    keep: Sequence[int | str],
) -> tuple[Any, Any, Quantizer]:
    """Load model and processor of a folder or Hugging Face id."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    local = Path(source).is_dir()
    if local:
        _check_files(Path(source))
    try:
        config = AutoConfig.from_pretrained(source, local_files_only=local, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"load: no readable configuration (got name_or_path={name!r}): {error}") from error
    check_family(name, config.model_type)
    stored = getattr(config, "quantization_config", None)
    compute = DTYPES[dtype] if dtype is not None else stored_dtype(config)
    quantizer = Quantizer(quantize, config.model_type, keep, compute, stored=stored)
    options: dict[str, Any] = {"dtype": DTYPES[dtype] if dtype is not None else "auto"}
    if attention is not None:
        options["attn_implementation"] = attention
    if quantizer.active and stored is None:
        options["quantization_config"] = quantizer.config(config)
    if quantizer.active or place.type != "cpu":
        # Straight to the device; needs accelerate, which a plain model on the CPU does not.
        options["device_map"] = {"": place}
    with _quiet() if local else nullcontext():
        hf = AutoModelForImageTextToText.from_pretrained(
            source,
            local_files_only=local,
            trust_remote_code=False,
            use_safetensors=True,
            **options,
        )
    return hf, load_processor(source, config.model_type, local_only=local), quantizer


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the progress bar over weights: only a download takes long enough for one."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def resolve_name(name: str) -> str:
    """Return the folder or Hugging Face id that a name stands for."""
    if Path(name).is_dir():
        return name
    if name.startswith(POCKET_PREFIX):
        from fastedit.pocket import model_path

        return str(model_path(name))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        return name
    known = ("pocket-llava", "pocket-blip2", "pocket-qwen2vl", *(RANDOM_PREFIX + shape for shape in SHAPES))
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    raise ValueError(
        "load: name_or_path must be an embedded model, random:<shape>, a folder that exists, or a Hugging Face id "
        f"owner/name (got name_or_path={name!r}; the nearest known name is {nearest!r})"
    )


def _check_files(folder: Path) -> None:
    """Refuse a folder without all parts of a checkpoint, naming every part that is absent."""
    groups = {
        "config.json": ("config.json",),
        "weights (*.safetensors)": ("*.safetensors",),
        "an image processor (processor_config.json or preprocessor_config.json)": (
            "processor_config.json",
            "preprocessor_config.json",
        ),
        "a tokenizer (tokenizer.json, tokenizer.model or vocab.json)": (
            "tokenizer.json",
            "tokenizer.model",
            "vocab.json",
        ),
    }
    absent = [label for label, patterns in groups.items() if not any(any(folder.glob(p)) for p in patterns)]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        import json

        shards = set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
        absent += sorted(shard for shard in shards if not (folder / shard).is_file())
    if absent:
        raise FileNotFoundError(f"load: the folder {str(folder)!r} lacks {', '.join(absent)}")


def check_choice(field: str, value: str, known: Sequence[str]) -> None:
    """Refuse a value that is not among the known ones, naming the nearest."""
    if value in known:
        return
    nearest = difflib.get_close_matches(str(value), known, n=1, cutoff=0.0)
    hint = f"; the nearest is {nearest[0]!r}" if nearest else ""
    raise ValueError(f"load: {field} must be one of {', '.join(known)} (got {field}={value!r}{hint})")


def default_device() -> torch.device:
    """The first GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def stored_dtype(config: Any) -> torch.dtype:
    """The type that a checkpoint says it was stored in; float32 where it says nothing."""
    for part in (config, getattr(config, "text_config", None)):
        found = getattr(part, "dtype", None)
        if isinstance(found, torch.dtype):
            return found
        if isinstance(found, str) and found in DTYPES:
            return DTYPES[found]
    return torch.float32


def _float_dtype(hf: nn.Module) -> torch.dtype:
    """The type of the word embeddings, which is that of the residual stream."""
    dtype: torch.dtype = hf.get_input_embeddings().weight.dtype  # type: ignore[operator]
    return dtype


def end_tokens(hf: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a generated answer, the tokenizer's own end token first where it is among them."""
    found: list[int] = []
    for config in (getattr(hf, "generation_config", None), getattr(hf.config, "text_config", None), hf.config):
        ends = getattr(config, "eos_token_id", None)
        if ends is not None:
            found = [ends] if isinstance(ends, int) else list(ends)
            break
    own = tokenizer.eos_token_id
    if not found:
        found = [own]
    return sorted(dict.fromkeys(found), key=lambda token: token != own)
