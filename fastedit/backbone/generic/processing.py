"""Images in prompts: what a checkpoint's own processor makes of one, put where its placeholder stands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..states import ImageInputs

if TYPE_CHECKING:
    from PIL.Image import Image

#: What a processor returns of text; everything else is of the image.
_OF_TEXT = frozenset({"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"})
#: Model types whose token types tell the prompt from what follows it.
_PROMPT_TYPES = frozenset({"paligemma"})
#: Stands behind a placeholder that a processor is asked to replace.
_WORD = " what"
#: Image tokens of a sample that a model is checked with when it is loaded: towers of large models take their time.
_SAMPLE = 96


class Placeholder:
    """What stands for an image in a prompt, and what a processor puts in its place.

    Args:
        hf: the model. processor: its processor.
    """

    def __init__(self, hf: Any, processor: Any) -> None:
        self.config, self.processor, self.tokenizer = hf.config, processor, processor.tokenizer
        self.token_id = self._token_id()
        #: What stands in a raw prompt: some processors expand another token than the one that features replace.
        self.text = self._text()
        #: What the processor puts before and behind a prompt with an image, learned from the first image.
        self.opening: tuple[int, ...] = ()
        self.closing: tuple[int, ...] = ()
        self._before: tuple[int, ...] = ()
        self.typed_id = int(self.tokenizer.convert_tokens_to_ids(self.text)) if self.text else -1

    def _token_id(self) -> int:
        if not hasattr(self.config, "vision_config"):
            return -1
        for owner, names in (
            (self.config, ("image_token_id", "image_token_index")),
            (self.processor, ("image_token_id",)),
        ):
            for name in names:
                found = getattr(owner, name, None)
                if isinstance(found, int):
                    return found
        return -1

    def _text(self) -> str:
        if self.token_id < 0:
            return ""
        found = None
        if getattr(self.config, "boi_token_index", None) is not None:
            # Gemma 3's processor expands the token that opens an image
            found = getattr(self.processor, "boi_token", None)
        found = found or getattr(self.processor, "image_token", None)
        text = found if isinstance(found, str) else self.tokenizer.convert_ids_to_tokens(self.token_id)
        return str(text)

    def some_ids(self, count: int) -> list[int]:
        """Tokens of some text, none of them special."""
        special = set(self.tokenizer.all_special_ids) | {self.token_id}
        size = int(self.config.get_text_config().vocab_size)
        known = [token for token in range(min(size, 4096)) if token not in special]
        return [known[(17 + 31 * number) % len(known)] for number in range(count)]

    def samples(self, processor: Any) -> list[tuple[list[int], ImageInputs]]:
        """A row with a small image; none where there are no images, or many tokens of one."""
        from PIL import Image

        if self.token_id < 0:
            return []
        noise = np.random.default_rng(0).integers(0, 255, (40, 56, 3), dtype=np.uint8)
        tensors, tokens, ids, _ = self.image_inputs(processor, Image.fromarray(noise))
        if tokens > _SAMPLE:
            return []
        return [([*self.some_ids(3), *ids, *self.some_ids(4)], ImageInputs("sample", tensors, tokens, ids))]

    def image_inputs(self, processor: Any, image: Image) -> tuple[dict[str, Tensor], int, tuple[int, ...], str]:
        """Return the tensors of one image, its image tokens, what its placeholder is replaced by, and the text of that.

        A processor is given a placeholder with a word behind it: what it puts before the word stands for the image.
        """
        batch = processor(text=[self.text + _WORD], images=[image], return_tensors="pt")
        expansion = self._expansion(batch["input_ids"][0].tolist())
        tensors = {
            name: torch.as_tensor(np.asarray(value)) if not isinstance(value, Tensor) else value
            for name, value in batch.items()
            if name not in _OF_TEXT
        }
        spelled = self.tokenizer.decode(expansion, skip_special_tokens=False)
        same = list(self.tokenizer(spelled, add_special_tokens=False)["input_ids"]) == expansion
        count = sum(token == self.token_id for token in expansion)
        return tensors, count, tuple(expansion), spelled if same else ""

    def _expansion(self, ids: list[int]) -> list[int]:
        """Tokens for the placeholder; learns what the processor puts around a prompt with an image."""
        word = list(self.tokenizer(_WORD, add_special_tokens=False)["input_ids"])
        plain = list(self.tokenizer(self.text + _WORD)["input_ids"])
        place = plain.index(self.typed_id)
        before, after = plain[:place], plain[place + 1 + len(word) :]
        ends = [end for end in range(len(word), len(ids) + 1) if ids[end - len(word) : end] == word]
        if not ends:
            first = ids.index(self.token_id)
            return ids[first : len(ids) - ids[::-1].index(self.token_id)]
        head, rest = ids[: ends[-1] - len(word)], ids[ends[-1] :]
        self.closing = tuple(rest[: len(rest) - len(after)] if rest[len(rest) - len(after) :] == after else rest)
        # PaliGemma's prompts begin with their image
        self.opening = tuple(before) if head[: len(before)] == before else ()
        self._before = tuple(before)
        return head[len(self.opening) :]

    def placed(self, ids: Sequence[int], image: ImageInputs | int) -> list[int]:
        """Return the tokens of a prompt with those of its image in the place of the placeholder."""
        place = list(ids).index(self.typed_id)
        expansion = (self.token_id,) * image if isinstance(image, int) else image.expansion
        return self.framed([*ids[:place], *expansion, *ids[place + 1 :]])

    def framed(self, ids: Sequence[int]) -> list[int]:
        """Return tokens of a prompt with an image with what the processor puts around such prompts."""
        size = len(self._before)
        opened = tuple(ids[:size]) == self._before
        return [*self.opening, *ids[size if opened else 0 :], *self.closing]

    def token_types(self, marks: Tensor, prompt: int) -> Tensor:
        """Return the token types (1, N) of a row: its image tokens, or what follows its prompt."""
        if self.config.model_type not in _PROMPT_TYPES:
            return marks.long()
        types = torch.zeros_like(marks, dtype=torch.long)
        types[:, prompt:] = 1
        return types
