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


def chat(prompt: str, *, with_image: bool) -> list[dict[str, Any]]:
    """Return a question as the messages that chat templates are given."""
    content: list[dict[str, str]] = [{"type": "image"}] if with_image else []
    return [{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}]


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
    """

    def __init__(
        self, processor: Any, tokenizer: Any, image_text: str, template: str | None, end_token_id: int
    ) -> None:
        check_template(template)
        self._tokenizer = tokenizer
        self._image_text = image_text
        self._template = template
        self.end_token_id = end_token_id
        self._chat_template = chat_template(processor) if template is None else None
        self._processor = processor
        self._before = _leading_special_tokens(tokenizer)
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

    def text(self, prompt: str, with_image: bool) -> str:
        """Return the full prompt text, one image placeholder in it where it has an image.

        Raises:
            ValueError: the chat template fails, or takes too long.
        """
        if self._chat_template is not None:
            messages = chat(prompt, with_image=with_image and bool(self._image_text))
            return rendered(self._processor, messages, self._chat_template)
        template = self._template or QUESTION_FIELD
        values = {QUESTION_FIELD: prompt, IMAGE_FIELD: self._image_text if with_image else ""}
        if IMAGE_FIELD not in template:
            template = IMAGE_FIELD + template
        # All at once: a question may hold what looks like a field
        return _FIELDS.sub(lambda field: values[field[0]], template)

    def ids(self, text: str) -> tuple[int, ...]:
        """Return the tokens of a prompt text, special tokens that open a text included."""
        bare = self._bare_ids(text)
        # A chat template may spell the opening token itself.
        return bare if bare[: len(self._before)] == self._before else self._before + bare

    def answer_ids(self, text: str, answer: str) -> tuple[int, ...]:
        """Return the tokens of an answer to a prompt text, the end token last."""
        answer = answer.strip()
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


def _leading_special_tokens(tokenizer: Any) -> tuple[int, ...]:
    """Return what the tokenizer puts before every text; what it would put after it is never wanted in a prompt."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return tuple(full[:start])
    return ()


def expand_image_token(ids: Sequence[int], image_token_id: int, count: int) -> tuple[list[int], list[bool]]:
    """Replace the one image token by `count` of them; return tokens and which of them are image tokens."""
    place = list(ids).index(image_token_id)
    expanded = [*ids[:place], *[image_token_id] * count, *ids[place + 1 :]]
    marks = [False] * place + [True] * count + [False] * (len(ids) - place - 1)
    return expanded, marks
