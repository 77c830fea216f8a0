"""Any model that transformers has: prompts by its own processor, rows by its own forward, layers by tracing."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..context import Frozen
from ..packed import PackedState
from ..placement import device_of
from ..several import most_images, without_video
from ..states import Encoded, ImageFeatures, ImageInputs
from .cross import SEEN
from .decoder import Decoder
from .door import Row, enter, follow, follows
from .encoder import start_token
from .features import FeatureMemory
from .head import find_head
from .kinds import check_forward, check_kind
from .processing import OF_PROMPT, Placeholder, video_inputs
from .sites import usual_sites
from .stack import TracedStack
from .trace import learn_returns, sample_logits, trace_decoder
from .walker import Walker

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..prompts import PromptBuilder

#: Bytes of image features kept on the device.
FEATURES = 1 << 30


class GenericAdapter:
    """A model without a family of its own.

    Args:
        hf: the model, in eval mode. processor: its processor; of a model of text alone, whatever has its tokenizer.
    Raises:
        ValueError: packed rows do not come out as rows alone do, or the model is of a kind that cannot be walked.
    """

    family = "any"
    joins_lists = True

    def __init__(self, hf: Any, processor: Any) -> None:
        check_kind(hf.config)
        self.hf, self.processor = hf, processor
        self.placeholder = Placeholder(hf, processor)
        check_forward(hf, OF_PROMPT if self.placeholder.reads_prompts else ())
        self.decoder = Decoder(hf)
        #: What the decoder begins rows with where an encoder reads the prompt; None where it reads prompts itself.
        self.start_token_id = start_token(hf) if self.decoder.encoded else None
        self.image_token_id = self.placeholder.token_id
        self.image_text = self.placeholder.text
        self.listed_text = self.placeholder.marked(hf, self.image_text, "vision", "image")
        self.video_token_id = self.placeholder.video_id
        self.video_text = self.placeholder.marked(hf, self.placeholder.video_token, "video", "vision")
        self.no_video = without_video(processor, self.video_text)
        self.most_images = most_images(hf.config) if self.image_token_id >= 0 else 0
        self.features = FeatureMemory(hf, FEATURES)
        taken = set(inspect.signature(hf.forward).parameters)
        self.token_types = "mm_token_type_ids" in taken
        self._block_types = "token_type_ids" in taken
        #: What answers a question in text only, where the whole model insists on an image.
        self.text_only = hf if _takes_text(hf) else hf.language_model
        if self.device.type == "meta":
            self._without_weights()
            return
        with Frozen(hf).block(), self.decoder.instrumented():
            self.walker = self._traced()
            ids = self._sample(self.placeholder.some_ids(4), None)
            self.head: nn.Module = find_head(hf, self.decoder, *sample_logits(self.decoder, self.text_only, ids))
        self.text = TracedStack(self.decoder)

    def _without_weights(self) -> None:
        """What can be told of a model on the meta device: shapes and names, for a plan of its memory."""
        for trace, layer in zip(self.decoder.traces, self.decoder.layers, strict=True):
            trace.sites = usual_sites(layer)
            keys = [layer.get_submodule(trace.sites[name]).out_features for name in "kv" if name in trace.sites]
            trace.stored = sum(keys) or 2 * int(self.decoder.config.hidden_size)
        self.text = TracedStack(self.decoder)
        self.head = self.hf.get_output_embeddings()

    def _traced(self) -> Walker:
        first = torch.tensor([self.placeholder.some_ids(4)], device=self.device)
        learn_returns(self.decoder, first)
        samples: list[tuple[list[int], ImageInputs | None]] = [
            (self.placeholder.some_ids(count), None) for count in (5, 9)
        ]
        samples += self.placeholder.samples(self.processor)
        entered = [self._enter(self._sample(ids, image), image) for ids, image in samples]
        walker = trace_decoder(self.decoder, [row for row, _ in entered], [given for _, given in entered])
        #: Whether what a decoder is handed of text behind a prompt is known without its stock forward.
        self.follows = all(self._follows(ids, image) for ids, image in samples)
        return walker

    def _sample(self, ids: Sequence[int], image: ImageInputs | None) -> dict[str, Any]:
        """Arguments of a row of these tokens; where an encoder reads them, the decoder gets some others."""
        if self.start_token_id is None:
            return self.inputs(ids, image, len(ids))
        return self.inputs(self._written(ids), image, 1, ids)

    def _written(self, ids: Sequence[int]) -> list[int]:
        """Tokens of the decoder for a sample that an encoder reads."""
        return [int(self.start_token_id or 0), *self.placeholder.some_ids(2 + len(ids) // 2)]

    def _follows(self, ids: Sequence[int], image: ImageInputs | None) -> bool:
        read, row = ((), ids) if self.start_token_id is None else (ids, self._written(ids))
        inputs = [self.inputs(part, image, len(row) - 2, read) for part in (row, row[:-2])]
        whole, short = (self._enter(each, image)[0] for each in inputs)
        return follows(self.decoder, short, torch.tensor([list(row[-2:])], device=self.device), whole)

    @property
    def device(self) -> torch.device:
        """Where word embeddings are looked up."""
        return device_of(self.hf.get_input_embeddings())

    def image_inputs(self, image: Image) -> tuple[dict[str, Tensor], int, tuple[int, ...], str]:
        """Return the tensors of one image, how many image tokens it takes, which stand for it, and their text."""
        return self.placeholder.image_inputs(self.processor, image)

    def list_inputs(self, images: Sequence[Image], keys: Sequence[str]) -> ImageInputs:
        """Return several images as the processor prepares those of one prompt."""
        return self.placeholder.list_inputs(self.processor, images, keys)

    def video_inputs(self, frames: Sequence[Image], fps: float) -> ImageInputs:
        """Return a video as the processor prepares it."""
        return video_inputs(self.processor, self.video_text, self.video_token_id, self.image_token_id, frames, fps)

    def place_image(self, text: str, prompts: PromptBuilder, image: ImageInputs | int) -> tuple[list[int], list[bool]]:
        """Return the tokens of a prompt with those of an image in place, and which of them are image tokens.

        Args:
            text: of the prompt, with a placeholder for each image. image: or how many tokens a single one takes.
        """
        # As the processor does it: tokens of text beside those of an image may depend on them
        written = self.placeholder.written(text, image) if isinstance(image, ImageInputs) else ""
        opens = getattr(self.processor.tokenizer, "bos_token", None)
        if self.decoder.cross and opens and opens in text:
            # One token stands for the whole image, and what the processor puts behind it is there already
            placed = list(prompts.ids(text))
        elif written:
            placed = self.placeholder.framed(prompts.ids(written))
        else:
            placed = self.placeholder.placed(prompts.ids(text), image)
        features = self.features_id(image)
        return placed, [token == features for token in placed]

    def features_id(self, image: ImageInputs | int | None) -> int:
        """The token that features replace in a row."""
        return image.features_id if isinstance(image, ImageInputs) and image.video else self.image_token_id

    def asked(self, image: ImageInputs, text: str) -> ImageInputs:
        """Return an image as it is looked at with the text of its prompt in mind, where the model does that."""
        return self.placeholder.asked(image, text)

    def rows(self, encoded: Encoded) -> list[Row]:
        """Return what the decoder is handed of encoded rows."""
        found = []
        for row, image in enumerate(encoded.images):
            ids = encoded.input_ids[row, : int(encoded.attention_mask[row].sum())].tolist()
            found.append(self._row(ids, image, int(encoded.last_prompt[row]) + 1, encoded.read_by_encoder(row)))
        return found

    def _row(self, ids: Sequence[int], image: ImageInputs | None, prompt: int, read: Sequence[int] = ()) -> Row:
        """A row whose answer may hold tokens that stand for images in prompts: there they are words."""
        if self.start_token_id is not None:
            return self._enter(self.inputs(ids, image, prompt, read), image)[0]
        seen = (self.image_token_id, self.video_token_id)
        words = [place for place in range(prompt, len(ids)) if ids[place] in seen]
        if not words:
            return self._enter(self.inputs(ids, image, prompt), image)[0]
        (other,) = self.placeholder.some_ids(1)
        plain = [other if place in words else token for place, token in enumerate(ids)]
        row = self._enter(self.inputs(plain, image, prompt), image)[0]
        tokens = torch.tensor([list(ids)], device=self.device)
        embedded = row.values["inputs_embeds"].clone()
        embedded[:, words] = self.decoder.root.embed_tokens(tokens[:, words])
        row.values["inputs_embeds"] = embedded
        return row

    def start(self, encoded: Encoded, wanted: Tensor) -> PackedState:
        """Return the packed state entering layer 0; ``wanted`` (R, N) marks tokens."""
        kept = encoded.attention_mask
        number = torch.cumsum(kept.flatten(), 0) - 1
        return self.walker.state(self.rows(encoded), number[wanted.flatten()], wanted.sum(1).tolist())

    def further(
        self,
        encoded: Encoded,
        prompts: PackedState,
        more: Mapping[int, Sequence[int]],
        firsts: Mapping[int, int],
        *,
        stored: bool,
    ) -> PackedState:
        """Return the state of tokens behind encoded prompts.

        Args:
            prompts: their state. more: by row, all tokens behind its prompt.
            firsts: by row, the place of the first of them that is to be read.
            stored: whether keys and values of those before are; else whole rows are read.
        """
        lengths = encoded.lengths.tolist()
        rows: list[Row | None] = [None] * len(encoded)
        for row, tokens in more.items():
            prompt = prompts.entries[row]
            behind = firsts[row] - lengths[row]
            if stored and self.follows and prompt is not None and not bool(encoded.image_mask[row, lengths[row] - 1]):
                rows[row] = follow(self.decoder, prompt, torch.tensor([tokens[behind:]], device=self.device), behind)
            else:
                ids = encoded.input_ids[row, : lengths[row]].tolist()
                read = encoded.read_by_encoder(row)
                rows[row] = self._row([*ids, *tokens], encoded.images[row], lengths[row], read)
        ends = [0 if row is None else row.count for row in rows]
        starts = [firsts.get(number, lengths[number] if stored else 0) for number in range(len(rows))]
        new = [end - start if row is not None else 0 for row, end, start in zip(rows, ends, starts, strict=True)]
        shown = starts if stored else [0] * len(rows)
        counts = [0 if row is None else end - a for row, end, a in zip(rows, ends, shown, strict=True)]
        wanted: list[int] = []
        offset = 0
        for row, count in enumerate(counts):
            wanted += range(offset + count - new[row], offset + count)
            offset += count
        device = encoded.input_ids.device
        state = self.walker.state(rows, torch.tensor(wanted, device=device), new, first=shown)
        state.behind = tuple(1 + firsts.get(row, lengths[row]) - lengths[row] for row in range(len(rows)))
        if not stored:
            parts = [_live(encoded, row, counts[row]) for row in range(len(rows)) if counts[row]]
            state.live = torch.cat(parts).to(device)
        return state

    def _enter(self, inputs: dict[str, Any], image: ImageInputs | None) -> tuple[Row, dict[str, Any]]:
        with self._without_deltas(), self.features.looking_at(image):
            return enter(self.decoder, self.text_only if image is None else self.hf, inputs)

    @contextmanager
    def _without_deltas(self) -> Iterator[None]:
        """Inside the block nothing is there that the last stock forward left behind, for rows of another shape."""
        parts: list[Any] = [self.hf, getattr(self.hf, "model", None)]
        holders = [each for each in parts if hasattr(each, "rope_deltas")]
        before = [each.rope_deltas for each in holders]
        for each in holders:
            each.rope_deltas = None
        try:
            yield
        finally:
            # Whoever goes on behind a cache that it keeps needs them
            for each, deltas in zip(holders, before, strict=True):
                each.rope_deltas = deltas

    def inputs(
        self, ids: Sequence[int], image: ImageInputs | None, prompt: int, read: Sequence[int] = ()
    ) -> dict[str, Any]:
        """Arguments of the stock forward for one row.

        Args:
            ids: of the decoder. image: or None. prompt: how many of them are the prompt's.
            read: tokens that an encoder reads, where the text model has one.
        """
        weight = self.hf.get_input_embeddings().weight
        row = torch.tensor([list(read or ids)], device=self.device)
        marks = row == self.features_id(image)
        inputs: dict[str, Any] = {"input_ids": row, "attention_mask": torch.ones_like(row)}
        if read:
            inputs["decoder_input_ids"] = torch.tensor([list(ids)], device=self.device)
        if self.token_types:
            inputs["mm_token_type_ids"] = marks.int() * (1 if image is None else image.kind)
        if self._block_types:
            inputs["token_type_ids"] = self.placeholder.token_types(marks, prompt)
        if image is not None:
            for name, tensor in image.tensors.items():
                kind = weight.dtype if tensor.is_floating_point() else tensor.dtype
                if name == SEEN:
                    tensor = tensor.to(marks.device) * (marks.cumsum(1) > 0)[:, :, None, None]
                inputs[name] = tensor.to(row.device, kind)
        return inputs

    def image_features(self, images: Sequence[ImageInputs]) -> list[ImageFeatures]:
        """Not separate from a row."""
        raise ValueError(f"image_features: the images of {self.hf.config.model_type!r} are looked at with their rows")

    def vision_linears(self) -> dict[str, str]:
        """None: what lies between tower and decoder is the stock model's own."""
        return {}

    look = join = position_ids = image_features


def _takes_text(hf: Any) -> bool:
    """Whether the stock forward runs without an image."""
    pixels = inspect.signature(hf.forward).parameters.get("pixel_values")
    return pixels is None or pixels.default is not inspect.Parameter.empty


def _live(encoded: Encoded, row: int, count: int) -> Tensor:
    """(N,), bool: the places of a row behind its image, of the tokens behind its prompt too."""
    marks = encoded.image_mask[row].nonzero()
    first = int(marks.max()) + 1 if len(marks) else 0
    return torch.arange(count) >= first


def generic(adapter: Any) -> GenericAdapter | None:
    """The adapter, where it is that of a model without a family of its own."""
    return adapter if isinstance(adapter, GenericAdapter) else None


def walkable(adapter: Any) -> AbstractContextManager[None]:
    """Return a block for several walks, inside of which a decoder's parts ask for them; else each walk sees to it."""
    traced = generic(adapter)
    return nullcontext() if traced is None else traced.decoder.instrumented()
