"""From questions and answers to token ids, the way the model itself continues a prompt."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

from .rendering import rendered

#: Where the question and, optionally, the image go in a `template=`.
QUESTION_FIELD = "{}"
IMAGE_FIELD = "{image}"
_FIELDS = re.compile(f"{re.escape(QUESTION_FIELD)}|{re.escape(IMAGE_FIELD)}")


def check_template(template: str | None) -> None:
    """Refuse a template without exactly one place for the question.

    Raises:
        ValueError: "template must ... (got template=...)".
    """
    if template is not None and template.count(QUESTION_FIELD) != 1:
        raise ValueError(f"load: template must hold {QUESTION_FIELD} exactly once (got template={template!r})")
    if template is not None and template.count(IMAGE_FIELD) > 1:
        raise ValueError(f"load: template may hold {IMAGE_FIELD} at most once (got template={template!r})")


def chat(prompt: str, *, with_image: bool, images: int = 1, video: bool = False) -> list[dict[str, Any]]:
    """Return a question as the messages that chat templates are given.

    Args:
        prompt: the question. with_image: whether it is about anything. images: how many. video: about a video.
    """
    mark = {"type": "video" if video else "image"}
    content: list[dict[str, str]] = []
    if interleaved(prompt, images if with_image else 0):
        for number, text in enumerate(prompt.split(IMAGE_FIELD)):
            content += [mark] if number else []
            content += [{"type": "text", "text": text}] if text else []
    else:
        content = [*([mark] * images if with_image else ()), {"type": "text", "text": prompt}]
    return [{"role": "user", "content": content}]


def interleaved(prompt: str, images: int) -> bool:
    """Whether several images stand inside of a question: where it has as many "{image}"."""
    return images > 1 and prompt.count(IMAGE_FIELD) == images


def chat_template(processor: Any) -> str | None:
    """The text of a processor's chat template: of several by name, the one called "default"."""
    template = getattr(processor, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default", next(iter(template.values()), None))
    return template


class PromptBuilder:
    """Renders prompts and joins answers to them.

    An answer follows the prompt after one space, or directly where the prompt ends in white space. Its tokens are
    those that tokenising the joined text puts after the tokens of the prompt. Where joining changes the prompt's own
    tokens, which no model can generate, the answer is tokenised on its own.

    Args:
        processor: of the model; its chat template is used unless `template` is given.
        tokenizer: of the model.
        image_text: what stands for an image in a raw prompt; "" where images do not stand in the text.
        template: "Question: {} Short answer:", for example; "{image}" in it places the image, else it comes first.
        end_token_id: the token that ends an answer.
        video_text: what stands for a video in a raw prompt.
        listed_text: what stands for each of several images in a raw prompt; "" is `image_text`.
        apart: whether an encoder reads the prompt, ended as the tokenizer does, and an answer is a text of its own.
    """

    def __init__(
        self,
        processor: Any,
        tokenizer: Any,
        image_text: str,
        template: str | None,
        end_token_id: int,
        video_text: str = "",
        listed_text: str = "",
        *,
        apart: bool = False,
    ) -> None:
        check_template(template)
        self._tokenizer = tokenizer
        self._image_text, self._video_text = image_text, video_text
        self._listed_text = listed_text or image_text
        self._template = template
        self.end_token_id = end_token_id
        self._chat_template = chat_template(processor) if template is None else None
        self._processor = processor
        self._before, after = _special_tokens_around(tokenizer)
        self._after, self._apart = after if apart else (), apart
        self._ids: dict[str, tuple[int, ...]] = {}
        #: Tokens that no text may spell: they open, end or separate texts, or stand for what is no text.
        self.special_ids = frozenset((*_special_tokens(tokenizer), end_token_id))

    @property
    def template_text(self) -> str:
        """What prompts are made by: the `template`, else the processor's chat template, else the question alone."""
        return self._template or (QUESTION_FIELD if self._chat_template is None else self._chat_template)

    @property
    def template_hash(self) -> str:
        """SHA-256 of `template_text`."""
        return hashlib.sha256(self.template_text.encode()).hexdigest()

    def text(self, prompt: str, with_image: bool, *, images: int = 1, video: bool = False) -> str:
        """Return the full prompt text, one placeholder in it for each image, or for a video.

        Args:
            prompt: the question. with_image: whether it is about anything. images: how many. video: about a video.
        Raises:
            ValueError: the chat template fails, or takes too long.
        """
        mark = self._video_text if video else self._image_text if images == 1 else self._listed_text
        if self._chat_template is not None:
            messages = chat(prompt, with_image=with_image and bool(mark), images=images, video=video)
            return rendered(self._processor, messages, self._chat_template)
        template = self._template or QUESTION_FIELD
        before = mark * images if with_image else ""
        if with_image and interleaved(prompt, images):
            prompt, before = prompt.replace(IMAGE_FIELD, mark), ""
        values = {QUESTION_FIELD: prompt, IMAGE_FIELD: before}
        if IMAGE_FIELD not in template:
            template = IMAGE_FIELD + template
        # All at once: a question may hold what looks like a field
        return _FIELDS.sub(lambda field: values[field[0]], template)

    def ids(self, text: str) -> tuple[int, ...]:
        """Return the tokens of a prompt text, special tokens that open a text included, and for an encoder its end."""
        bare = self._bare_ids(text)
        # A chat template may spell the opening token itself.
        opened = bare if bare[: len(self._before)] == self._before else self._before + bare
        return opened + self._after

    def answer_ids(self, text: str, answer: str) -> tuple[int, ...]:
        """Return the tokens of an answer to a prompt text, the end token last."""
        answer = answer.strip()
        if self._apart:
            return (*self._bare_ids(answer), self.end_token_id)
        gap = "" if text[-1:].isspace() else " "
        prompt, joined = self._bare_ids(text), self._bare_ids(text + gap + answer)
        if joined[: len(prompt)] == prompt and len(joined) > len(prompt):
            return (*joined[len(prompt) :], self.end_token_id)
        return (*self._bare_ids(gap + answer), self.end_token_id)

    def _bare_ids(self, text: str) -> tuple[int, ...]:
        """Tokenise without special tokens, remembering short histories: views of one edit repeat prompts."""
        known = self._ids.get(text)
        if known is None:
            known = tuple(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            if len(self._ids) >= 65_536:
                self._ids.clear()
            self._ids[text] = known
        return known


def _special_tokens(tokenizer: Any) -> list[int]:
    """Return the special tokens of a tokenizer, those that were added as such among them."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return [*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)]


def _special_tokens_around(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return what the tokenizer puts before and behind every text; the second is wanted in no prompt that goes on."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return tuple(full[:start]), tuple(full[start + len(bare) :])
    return (), ()


def expand_image_token(ids: Sequence[int], image_token_id: int, *counts: int) -> tuple[list[int], list[bool]]:
    """Replace each image token, in order, by so many of them; return tokens and which of them are image tokens."""
    expanded: list[int] = []
    marks: list[bool] = []
    rest = list(ids)
    for count in counts:
        place = rest.index(image_token_id)
        expanded += [*rest[:place], *[image_token_id] * count]
        marks += [False] * place + [True] * count
        rest = rest[place + 1 :]
    return expanded + rest, marks + [False] * len(rest)


def replace_token(ids: Sequence[int], token_id: int, expansions: Sequence[Sequence[int]]) -> list[int]:
    """Return tokens with each occurrence of one of them replaced, in order, by a sequence of others."""
    expanded: list[int] = []
    remaining = iter(expansions)
    for token in ids:
        expanded += next(remaining) if token == token_id else [token]
    return expanded
