"""Images in prompts: what a checkpoint's own processor makes of one, put where its placeholder stands."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..prompts import replace_token
from ..states import ImageInputs
from .cross import SEEN

if TYPE_CHECKING:
    from PIL.Image import Image

#: What a processor returns of text; everything else is of the image.
_OF_TEXT = frozenset({"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"})
#: What a processor returns of a prompt for those who look at its image with the question in mind (InstructBLIP).
OF_PROMPT = frozenset({"qformer_input_ids", "qformer_attention_mask"})
#: Model types whose token types tell the prompt from what follows it.
_PROMPT_TYPES = frozenset({"paligemma"})
#: Stands behind a placeholder that a processor is asked to replace.
_WORD = " what"
#: Image tokens of a sample that a model is checked with when it is loaded: towers of large models take their time.
_SAMPLE = 96


def tensors_of(batch: Any) -> dict[str, Tensor]:
    """Return what a processor makes of images or videos, without what it makes of text."""
    tensors = {
        name: torch.as_tensor(np.asarray(value)) if not isinstance(value, Tensor) else value
        for name, value in batch.items()
        if name not in _OF_TEXT | OF_PROMPT
    }
    if SEEN in tensors:
        # Of the word behind the image, which sees all of it
        tensors[SEEN] = tensors[SEEN][:, -1:]
    return tensors


def video_inputs(
    processor: Any, text: str, token_id: int, image_token_id: int, frames: Sequence[Image], fps: float
) -> ImageInputs:
    """Return a video as a checkpoint's own processor prepares it, every frame kept.

    Args:
        processor: with a video processor. text: what stands for a video in a prompt. token_id: its placeholder in it.
        image_token_id: what some processors put for the frames of a video too. frames, fps: of the video.
    Raises:
        ValueError: the processor refuses it.
    """
    tokenizer = processor.tokenizer
    metadata: dict[str, Any] = {"fps": fps, "total_num_frames": len(frames), "frames_indices": list(range(len(frames)))}
    metadata |= {"duration": len(frames) / fps, "height": frames[0].height, "width": frames[0].width}
    batch = processor(
        text=[text + _WORD],
        videos=[[np.asarray(frame) for frame in frames]],
        video_metadata=[metadata],
        do_sample_frames=False,
        return_tensors="pt",
    )
    ids = batch["input_ids"][0].tolist()
    plain = list(tokenizer(text + _WORD)["input_ids"])
    before = plain.index(token_id)
    expansion = ids[before : len(ids) - (len(plain) - before - 1)]
    spelled = tokenizer.decode(expansion, skip_special_tokens=False)
    same = list(tokenizer(spelled, add_special_tokens=False)["input_ids"]) == expansion
    features_id = token_id if token_id in expansion else image_token_id
    types = batch.get("mm_token_type_ids")
    kind = 2 if types is None else max(torch.as_tensor(types)[0].tolist())
    return ImageInputs(
        "", tensors_of(batch), expansion.count(features_id), tuple(expansion), spelled if same else "",
        video=True, kind=kind, features_id=features_id,
    )  # fmt: skip


def split_tensors(tensors: Mapping[str, Tensor], counts: Sequence[int]) -> list[dict[str, Tensor]]:
    """Return the tensors of each image of a list, those that can be told apart.

    The first dimension counts images, or parts of images, as many of each as it has tokens in proportion.

    Args:
        tensors: of the list. counts: image tokens of each image.
    """
    total, alone = sum(counts), [dict[str, Tensor]() for _ in counts]
    for name, tensor in tensors.items():
        size = tensor.shape[0] if tensor.dim() else 0
        if size != len(counts) and any(size * count % max(total, 1) or not size for count in counts):
            continue
        sizes = [1] * len(counts) if size == len(counts) else [size * count // total for count in counts]
        for each, part in zip(alone, torch.split(tensor, sizes), strict=True):
            each[name] = part
    return alone


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash of what the model is given of an image."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


class Placeholder:
    """What stands for an image in a prompt, and what a processor puts in its place.

    Args:
        hf: the model. processor: its processor.
    """

    def __init__(self, hf: Any, processor: Any) -> None:
        self.config, self.processor, self.tokenizer = hf.config, processor, processor.tokenizer
        self.token_id = self._token_id()
        #: Whether a prompt's image tokens come first, without a placeholder in its text.
        self.leads = getattr(processor, "num_query_tokens", None) is not None
        #: Whether the features of an image depend on the prompt.
        self.reads_prompts = getattr(processor, "qformer_tokenizer", None) is not None
        #: What stands in a raw prompt: some processors expand another token than the one that features replace.
        self.text = self._text()
        #: What the processor puts before and behind a prompt with an image, learned from the first image.
        self.opening: tuple[int, ...] = ()
        self.closing: tuple[int, ...] = ()
        self._before: tuple[int, ...] = ()
        self.typed_id = int(self.tokenizer.convert_tokens_to_ids(self.text)) if self.text else self.token_id
        self.video_token, self.video_id = self._video()

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
        if self.token_id < 0 or self.leads:
            return ""
        found = None
        if getattr(self.config, "boi_token_index", None) is not None:
            # Gemma 3's processor expands the token that opens an image
            found = getattr(self.processor, "boi_token", None)
        found = found or getattr(self.processor, "image_token", None)
        text = found if isinstance(found, str) else self.tokenizer.convert_ids_to_tokens(self.token_id)
        return str(text)

    def _video(self) -> tuple[str, int]:
        """What stands for a video in a raw prompt, and its token; "" and -1 where there are no videos."""
        text = getattr(self.processor, "video_token", None)
        if not isinstance(text, str) or not hasattr(self.processor, "video_processor"):
            return "", -1
        token = self.tokenizer.convert_tokens_to_ids(text)
        return ("", -1) if token is None or token == self.tokenizer.unk_token_id else (text, int(token))

    def marked(self, hf: Any, text: str, *kinds: str) -> str:
        """Return a placeholder for raw prompts, between marks of its beginning and end where positions need those.

        Positions with time, height and width take image tokens that follow each other for one image: between the marks
        that chat templates of such models write, each is told from the next.

        Args:
            hf: the model. text: of the placeholder. kinds: names of marks in the configuration, the first known counts.
        """
        if not text or not hasattr(getattr(hf, "model", None), "get_rope_index"):
            return text
        for kind in kinds:
            tokens = [getattr(self.config, f"{kind}_{end}_token_id", None) for end in ("start", "end")]
            if None not in tokens:
                opening, closing = self.tokenizer.convert_ids_to_tokens(tokens)
                return f"{opening}{text}{closing}"
        return text

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
        image = self.asked(ImageInputs("sample", tensors, tokens, ids), _WORD)
        before = [] if self.leads else self.some_ids(3)
        return [([*before, *ids, *self.some_ids(4)], image)]

    def image_inputs(self, processor: Any, image: Image) -> tuple[dict[str, Tensor], int, tuple[int, ...], str]:
        """Return the tensors of one image, its image tokens, what its placeholder is replaced by, and the text of that.

        A processor is given a placeholder with a word behind it: what it puts before the word stands for the image.
        """
        batch = processor(text=[self.text + _WORD], images=[image], return_tensors="pt")
        (expansion,) = self._expansions(batch["input_ids"][0].tolist(), 1)
        return tensors_of(batch), expansion.count(self.token_id), tuple(expansion), self._spelled(expansion)

    def list_inputs(self, processor: Any, images: Sequence[Image], keys: Sequence[str]) -> ImageInputs:
        """Return the tensors of several images of one prompt, with what each placeholder is replaced by in the parts.

        Args:
            processor: of the model. images: in order. keys: their content hashes.
        Raises:
            ValueError: the processor refuses them, or does not put each in the place of its placeholder.
        """
        batch = processor(text=[(self.text + _WORD) * len(images)], images=[list(images)], return_tensors="pt")
        expansions = self._expansions(batch["input_ids"][0].tolist(), len(images))
        tensors, counts = tensors_of(batch), [tokens.count(self.token_id) for tokens in expansions]
        alone = split_tensors(tensors, counts)
        parts = tuple(
            ImageInputs(_digest(each) if each else key, each, count, tuple(tokens), self._spelled(tokens))
            for key, each, count, tokens in zip(keys, alone, counts, expansions, strict=True)
        )
        return ImageInputs("", tensors, sum(counts), parts=parts)

    def asked(self, image: ImageInputs, text: str) -> ImageInputs:
        """Return an image as it is looked at with the text of its prompt in mind, where the model does that."""
        if not self.reads_prompts:
            return image
        batch = self.processor(text=[text], return_tensors="pt")
        read = {name: batch[name] for name in sorted(OF_PROMPT & set(batch))}
        digest = hashlib.sha256(repr([(name, value.tolist()) for name, value in read.items()]).encode()).hexdigest()
        return replace(image, key=f"{image.key}:{digest}", tensors=dict(image.tensors) | read)

    def _spelled(self, expansion: list[int]) -> str:
        if self.leads:
            return ""
        text: str = self.tokenizer.decode(expansion, skip_special_tokens=False)
        return text if list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) == expansion else ""

    def _expansions(self, ids: list[int], count: int) -> list[list[int]]:
        """Tokens for each placeholder; learns what the processor puts around a prompt with an image."""
        if self.leads:
            return [ids[: next(place for place, token in enumerate(ids) if token != self.token_id)]]
        word = list(self.tokenizer(_WORD, add_special_tokens=False)["input_ids"])
        plain = list(self.tokenizer(self.text + _WORD)["input_ids"])
        place = plain.index(self.typed_id)
        before, after = plain[:place], plain[place + 1 + len(word) :]
        ends = [end for end in range(len(word), len(ids) + 1) if ids[end - len(word) : end] == word]
        if not ends and count == 1:
            first = ids.index(self.token_id)
            return [ids[first : len(ids) - ids[::-1].index(self.token_id)]]
        if len(ends) < count or (len(ends) > count > 1):
            rule = "a processor must put each image of a prompt in the place of its placeholder"
            raise ValueError(f"{rule} (got {len(ends)} of {count} words between images)")
        rest = ids[ends[-1] :]
        self.closing = tuple(rest[: len(rest) - len(after)] if rest[len(rest) - len(after) :] == after else rest)
        # PaliGemma's prompts begin with their image
        self.opening = tuple(before) if ids[: len(before)] == before else ()
        self._before = tuple(before)
        ends = ends[-count:]
        starts = [len(self.opening), *ends[:-1]]
        return [ids[start : end - len(word)] for start, end in zip(starts, ends, strict=True)]

    def placed(self, ids: Sequence[int], image: ImageInputs | int) -> list[int]:
        """Return the tokens of a prompt with those of its images in the places of the placeholders."""
        if self.leads:
            expansion = (self.token_id,) * image if isinstance(image, int) else image.expansion
            return [*expansion, *ids]
        if isinstance(image, int):
            return self.framed(replace_token(ids, self.typed_id, [(self.token_id,) * image]))
        token = self.video_id if image.video else self.typed_id
        return self.framed(replace_token(ids, token, [part.expansion for part in image.each]))

    def written(self, text: str, image: ImageInputs) -> str:
        """Return a prompt's text with the text of each image in the place of its placeholder; "" without such text."""
        if self.leads:
            return ""
        between = text.split(self.video_token if image.video else self.text)
        spelled = [part.spelled for part in image.each]
        if not all(spelled) or len(between) != len(spelled) + 1:
            return ""
        return "".join([between[0], *(a + b for a, b in zip(spelled, between[1:], strict=True))])

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
