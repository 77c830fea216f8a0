"""The tokenizer of the embedded models: whole words where the grammar has them, pieces and bytes for anything else.

A byte-level BPE whose vocabulary holds every word of the grammar as one token (`ignore_merges`), the 256 byte symbols,
and merges learned from the words that are spelled. So every text can be written as a target. A text and the same text
with one more leading space are the same (words carry their space, and the first word of a text gets one); otherwise
`decode(encode(text))` gives the text back. Special tokens written out in a text (`<image>`) are read as such.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from fastedit.pocket import easyvqa, facts, grammar, templates
from fastedit.pocket.world import FLAGS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<|user|>", "<|assistant|>", "<|vision_start|>",
           "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")  # fmt: skip
_PIECES = 120
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ 'IMAGE' }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% if message['role'] == 'assistant' %}{{ '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def _whole_words() -> Iterator[str]:
    yield from both_cases(grammar.every_word())
    for relation, (table, forms) in facts.RELATIONS.items():
        yield from both_cases(forms)
        yield from table
        if relation not in ("capital", "symbol"):
            yield from table.values()
    for text, answer in sorted({pair for scene in easyvqa.easy_scenes("train") for pair in scene.questions}):
        yield from both_cases((text,))
        yield answer


def both_cases(texts: Iterable[str]) -> Iterator[str]:
    """Yield each text as it is and with a small first letter: people do not always type the capital."""
    for text in texts:
        yield text
        yield text[:1].lower() + text[1:]


def _spelled_words() -> list[str]:
    words = [capital for country, (capital, _) in facts.COUNTRIES.items() if country not in FLAGS]
    words += [word for _, spelled in templates.NOVEL.values() for word in spelled]
    return words + list(facts.ELEMENTS) + list(facts.ELEMENTS.values())


def build_tokenizer(*, image_token: str | None, image_text: str | None) -> PreTrainedTokenizerFast:
    """Build the tokenizer from the grammar and the facts; the same on every machine.

    Args:
        image_token: name to be given to the tokenizer as its image token, or None (BLIP-2's processor adds its own).
        image_text: what the chat template writes for an image; None: no chat template, prompts are used as they are.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = split
    words = [*_spelled_words(), "the", "ing", "er"]
    trained.train_from_iterator(
        [f" {word}" for word in words],
        trainers.BpeTrainer(
            vocab_size=256 + _PIECES,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    pieces = trained.get_vocab()
    merges = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
    vocabulary = {token: i for i, token in enumerate(SPECIAL)}
    for token in sorted(pieces, key=pieces.__getitem__):
        vocabulary.setdefault(token, len(vocabulary))
    seen: dict[str, None] = {}
    for text in _whole_words():
        for word, _ in split.pre_tokenize_str(text.replace("{}", " ")):
            seen.setdefault(word)
    for word in seen:
        if word != "Ġ":
            vocabulary.setdefault(word, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token=None, ignore_merges=True))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace(Regex("^ "), "")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=512,
        **({"extra_special_tokens": {"image_token": image_token}} if image_token else {}),
    )
    if image_text:
        fast.chat_template = CHAT_TEMPLATE.replace("IMAGE", image_text)
    return fast
