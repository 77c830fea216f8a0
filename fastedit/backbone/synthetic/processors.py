"""Tokenizers and processors for models with random weights: enough to encode prompts and images, no download."""

from __future__ import annotations

from typing import Any

from ..processors import PartsProcessor
from .shapes import Shape

# Common words of questions, captions and short answers, the most needed first. Each becomes one token; other words are
# spelled letter by letter.
_WORDS = """
what is the a it of in on color colour shape which where how many are there red blue green yellow black white gray
brown orange pink purple one two three four five yes no left right top bottom small large question answer short
image photo picture object caption describe user assistant and with at to for do you see this that about above
across after all an animal any area around baby back background ball bat beach bear bed behind below beside between
big bike bird board boat book bottle bowl box boy building bus by cake can car cat center chair child city clear
clock close cloudy computer country cow cup dark day desk did dog doing door down drink driving eating eight
elephant empty field fire floor flower food from fruit full game giraffe girl glass grass grey ground group hair
hand hanging has hat have head her his holding horse house indoors inside its jacket kind kitchen laptop laying
light line little living long looking made making man meal men metal middle mirror mountain mouse near next night
nine not number off old open or other out outdoors outside over paper park parked people person phone pizza plane
plant plate playing police position racket rain riding river road room round running sand sandwich sea seven she
sheep ship shirt shoes show side sign sitting six sky sleeping smiling snow sofa some sport square standing station
stop street striped sun surfing table taken talking tall ten tennis their them these thing through time toilet
towards tower town traffic train tree truck type umbrella under up used using vase vehicle walking wall water wave
wearing weather who why window wine woman women wood wooden young zebra zero name does capital only kinds material
happening season brand says say word written read cyan magenta circle triangle star heart cross ring diamond
pentagon hexagon rectangle arrow moon dotted plain texture size flag colours colors objects scene things fact
continent symbol opposite sound named called current president bananas cell suitcase luggage skateboard snowboard
surfboard frisbee kite pillow blanket lamp refrigerator oven sink
"""

_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<video>")
_SPECIAL_CHAT = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")

_COLON_CHAT = (
    "{% for message in messages %}USER: {% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
_MARKED_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def made_up_tokenizer(vocab_size: int, *, end: str, opens: bool) -> Any:
    """Return a byte-level BPE tokenizer that spells any text, its vocabulary filled up to `vocab_size` entries.

    Args:
        vocab_size: at least 274, the special tokens and the bytes.
        end: the special token that ends texts. opens: whether every text opens with "<s>".
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = (*_SPECIAL, *_SPECIAL_CHAT)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = _WORDS.split()
    cased = [*words, *(word.capitalize() for word in words), "USER", "ASSISTANT"]
    entries = [*special, *letters, *(f"Ġ{word}" for word in words), *cased, *(f"Ġ{word}" for word in cased)]
    entries = list(dict.fromkeys(entries))[:vocab_size]
    entries += [f"<unused{number}>" for number in range(vocab_size - len(entries))]
    vocabulary = {token: number for number, token in enumerate(entries)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if opens:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token=end, pad_token="<pad>", unk_token="<unk>"
    )


def made_up_processor(shape: Shape) -> Any:
    """Return tokenizer and image processor for a shape, in the family's own processor class where that can be made."""
    vocab_size = shape.text["vocab_size"]
    marked = shape.model_type.startswith("qwen")
    end = "<|im_end|>" if marked else "</s>"
    tokenizer = made_up_tokenizer(vocab_size, end=end, opens=not marked)
    makers = {
        "llava": _llava_processor,
        "llava_next": _llava_next_processor,
        "llava_onevision": _llava_onevision_processor,
        "blip-2": _blip2_processor,
    }
    return makers.get(shape.model_type, _qwen_processor)(shape, tokenizer)


def _square(size: int) -> dict[str, int]:
    return {"height": size, "width": size}


def _llava_processor(shape: Shape, tokenizer: Any) -> Any:
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    size = shape.image_size
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=_square(size)),
        tokenizer=tokenizer,
        patch_size=shape.vision["patch_size"],
        vision_feature_select_strategy=shape.top["vision_feature_select_strategy"],
        num_additional_image_tokens=1,
        chat_template=_COLON_CHAT,
    )


def _llava_next_processor(shape: Shape, tokenizer: Any) -> Any:
    from transformers import LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    size = shape.image_size
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image_processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": size},
        crop_size=_square(size),
        image_grid_pinpoints=shape.top["image_grid_pinpoints"],
    )
    return LlavaNextProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=shape.vision["patch_size"],
        vision_feature_select_strategy=shape.top["vision_feature_select_strategy"],
        num_additional_image_tokens=1,
        chat_template=_COLON_CHAT,
    )


def _llava_onevision_processor(shape: Shape, tokenizer: Any) -> Any:
    from transformers import LlavaOnevisionProcessor
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    size = shape.image_size
    image_processor = LlavaOnevisionImageProcessorPil(
        size=_square(size), image_grid_pinpoints=shape.top["image_grid_pinpoints"]
    )
    try:
        return LlavaOnevisionProcessor(
            image_processor=image_processor,
            tokenizer=tokenizer,
            num_image_tokens=(size // shape.vision["patch_size"]) ** 2,
            vision_feature_select_strategy=shape.top["vision_feature_select_strategy"],
            chat_template=_COLON_CHAT,
        )
    except (ImportError, AttributeError, TypeError, ValueError):
        return PartsProcessor(image_processor, tokenizer, _COLON_CHAT)


def _blip2_processor(shape: Shape, tokenizer: Any) -> Any:
    from transformers import Blip2Processor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    image_processor = BlipImageProcessorPil(size=_square(shape.image_size))
    return Blip2Processor(image_processor, tokenizer, num_query_tokens=shape.top["num_query_tokens"])


def _qwen_processor(shape: Shape, tokenizer: Any) -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    area = shape.image_size**2
    image_processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": area, "longest_edge": area},
        patch_size=shape.vision["patch_size"],
        merge_size=shape.vision["spatial_merge_size"],
        temporal_patch_size=shape.vision["temporal_patch_size"],
    )
    return PartsProcessor(image_processor, tokenizer, _MARKED_CHAT)
