"""smol-llava as transformers loads it: configuration, processor, and a folder put together once from two sources.

The language model comes from the installed package, vision tower, projector and low-rank changes of the language model
from the weights that are shipped here. The folder lies in the user's cache, bound to both.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastedit.smol.icons import cache_folder
from fastedit.smol.language import SHA256, language_settings, make_tokenizer, read_language
from fastedit.smol.names import MODEL as NAME
from fastedit.smol.scenes import IMAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaProcessor, PreTrainedTokenizerFast

ASSETS = Path(__file__).parent / "assets"
WEIGHTS, CARD = "smol-llava.safetensors", "model_card.json"
PATCH, VISION_WIDTH, VISION_LAYERS, VISION_HEADS, VISION_FFN = 16, 192, 6, 3, 768
IMAGE_TOKENS = (IMAGE_SIZE // PATCH) ** 2
IMAGE_TOKEN = "<image>"
ROWS = 49216  # of the embedding: 49,152 texts' tokens, the image token, and rows up to a multiple of 64
_FORMAT = 1  # of the folder; another one is put together anew
#: A question with a picture, and one without; the answer follows after a space.
IMAGE_PROMPT = "Picture:" + IMAGE_TOKEN + "\nQuestion: {} Short answer:"
TEXT_PROMPT = "Question: {} Short answer:"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% if message['content'] is string %}{{ 'Question: ' + message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ 'Picture:IMAGE\\n' }}{% endif %}"
    "{% endfor %}{{ 'Question: ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{{ ' Short answer:' }}{% else %}"
    "{% if message['content'] is string %}{{ ' ' + message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ ' ' + part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ 'END\\n' }}{% endif %}{% endfor %}"
).replace("IMAGE", IMAGE_TOKEN).replace("END", "<|im_end|>")  # fmt: skip


def vision_config() -> CLIPVisionConfig:
    """Return the configuration of the vision tower."""
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=VISION_WIDTH, intermediate_size=VISION_FFN, num_hidden_layers=VISION_LAYERS,
        num_attention_heads=VISION_HEADS, image_size=IMAGE_SIZE, patch_size=PATCH, projection_dim=VISION_WIDTH,
        hidden_act="gelu", initializer_range=0.04, initializer_factor=1.0,
    )  # fmt: skip


def llava_config() -> LlavaConfig:
    """Return the configuration of the whole model."""
    from transformers import LlamaConfig, LlavaConfig

    return LlavaConfig(
        vision_config=vision_config(), text_config=LlamaConfig(**language_settings(ROWS)),
        image_token_id=language_settings()["vocab_size"], vision_feature_layer=-1,
        vision_feature_select_strategy="default", image_seq_length=IMAGE_TOKENS, tie_word_embeddings=True,
    )  # fmt: skip


def make_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Return the processor: 96 x 96 pixels in [-1, 1], one image token for each of 36 patches."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    return LlavaProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def model_card() -> dict[str, Any]:
    """Return what is known of smol-llava: accuracies per kind of question, its sources, how to make it anew."""
    card: dict[str, Any] = json.loads((ASSETS / CARD).read_text(encoding="utf-8"))
    return card


def model_path() -> Path:
    """Return the folder that AutoProcessor and AutoModelForImageTextToText load; put together at the first call.

    Raises:
        ModuleNotFoundError: the language model's package, or what reads it, is not installed; says what to install.
    """
    shipped = ASSETS / WEIGHTS
    key = hashlib.sha256(f"{_FORMAT}:{SHA256}:".encode() + shipped.read_bytes()).hexdigest()[:16]
    folder = cache_folder() / f"{NAME}-{key}"
    if not (folder / CARD).is_file():
        from safetensors.torch import load_file

        assemble(load_file(shipped), folder, model_card())
    return folder


def assemble(trained: Mapping[str, Tensor], folder: Path, card: Mapping[str, Any]) -> Path:
    """Write the model's folder, all of it or nothing.

    Args:
        trained: what is not the language model's own: parts of the vision tower and the projector by their names in
            the model, and changes of the language model as "adapter.<module>.up" (d_out, r) and ".down" (r, d_in).
        folder: must not exist. card: what is known of the model.
    """
    import torch
    from transformers import LlavaForConditionalGeneration

    language, fields = read_language()
    tokenizer = make_tokenizer(fields, image_token=IMAGE_TOKEN)
    # Of no text: as likely as the average token, which is never the likeliest
    table = language["embed_tokens.weight"]
    language["embed_tokens.weight"] = torch.cat([table, table.mean(0, keepdim=True).expand(ROWS - len(table), -1)])
    for name, weight in merged(language, trained).items():
        language[name] = weight
    state = {f"model.language_model.{name}": weight for name, weight in language.items()}
    state |= {name: weight for name, weight in trained.items() if not name.startswith("adapter.")}
    model = LlavaForConditionalGeneration.from_pretrained(
        None, config=llava_config(), state_dict=state, dtype=torch.bfloat16
    )
    ids = {name: language_settings()[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config.update(**ids, max_new_tokens=64, do_sample=False)
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        model.save_pretrained(part)
        make_processor(tokenizer).save_pretrained(part)
        (part / CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
        part.chmod(0o755)
        try:
            part.rename(folder)
        except OSError:  # another process was faster
            if not (folder / CARD).is_file():
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def merged(language: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the language model's weights that have a low-rank change, with it added."""
    out: dict[str, Tensor] = {}
    for name, up in trained.items():
        if name.startswith("adapter.") and name.endswith(".up"):
            module = name.removeprefix("adapter.").removesuffix(".up")
            down = trained[f"adapter.{module}.down"]
            out[f"{module}.weight"] = language[f"{module}.weight"] + up.float() @ down.float()
    return out
