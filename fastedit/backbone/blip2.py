"""BLIP-2 (arXiv 2301.12597) with a decoder-only language model: query tokens before the text, opening token included.

With a LLaMA text model this is also the shape of MiniGPT-4 (arXiv 2304.10592).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .adapters import check_count, image_token_id, input_place, sequential_positions
from .states import ImageFeatures, ImageInputs, join_padded
from .text import text_stack

if TYPE_CHECKING:
    from PIL.Image import Image


class Blip2Adapter:
    """Every image is a fixed number of query outputs ahead of the prompt's first token."""

    family = "BLIP-2"
    image_text = video_text = listed_text = ""
    video_token_id = -1
    token_types = False
    most_images: int | None = 1
    joins_lists = False
    no_video = "takes one image a question, and no video"

    def __init__(self, hf: Any, processor: Any) -> None:
        self.check(hf.config)
        self.hf = hf
        self.processor = processor
        language_model = hf.language_model
        self.text = text_stack(getattr(language_model.model, "decoder", language_model.model))
        self.head = language_model.lm_head
        self.image_token_id = image_token_id(hf, processor, "<image>")

    @staticmethod
    def check(config: Any) -> None:
        """Refuse text models with an encoder."""
        if not config.use_decoder_only_language_model:
            kind = config.text_config.model_type
            raise ValueError(f"BLIP-2 needs a decoder-only text model (got model_type={kind!r})")

    def check_inputs(self, image: ImageInputs) -> None:
        """Run the tower on an image; each query becomes a token."""
        self.hf.vision_model(self._pixels([image]), return_dict=True)
        check_count(self.hf.query_tokens.shape[1], image.tokens)

    def image_inputs(self, image: Image) -> tuple[dict[str, Tensor], int]:
        """Return the tensors of one image and how many image tokens it takes."""
        batch = self.processor.image_processor(images=[image], return_tensors="pt")
        return {"pixel_values": batch["pixel_values"]}, int(self.hf.config.num_query_tokens)

    def list_inputs(self, images: Sequence[Image], keys: Sequence[str]) -> ImageInputs:
        """Never called: lists are refused."""
        raise ValueError(f"{self.family} takes one image a question (got {len(images)})")

    def video_inputs(self, frames: Sequence[Image], fps: float) -> ImageInputs:
        """Never called: videos are refused."""
        raise ValueError(f"{self.family} {self.no_video}")

    def vision_linears(self) -> dict[str, str]:
        """Every linear map of the Q-Former, and the projection behind it."""
        inner = [name for name, module in self.hf.qformer.named_modules() if isinstance(module, nn.Linear)]
        return {name: f"qformer.{name}" for name in inner} | {"language_projection": "language_projection"}

    def look(self, images: Sequence[ImageInputs]) -> list[Tensor]:
        """Run the tower."""
        return list(self.hf.vision_model(self._pixels(images), return_dict=True)[0])

    def join(self, seen: Sequence[Tensor]) -> Tensor:
        """Run Q-Former and projection, as the stock model does behind its tower."""
        images = torch.stack(list(seen))
        output = self.hf.qformer(
            query_embeds=self.hf.query_tokens.expand(images.shape[0], -1, -1),
            encoder_hidden_states=images,
            encoder_attention_mask=torch.ones(images.shape[:-1], dtype=torch.long, device=images.device),
            return_dict=True,
        )[0]
        joined: Tensor = self.hf.language_projection(output.to(images.dtype))
        return joined.flatten(0, 1)

    def image_features(self, images: Sequence[ImageInputs]) -> list[ImageFeatures]:
        """Run tower, Q-Former and projection once over these images."""
        output = self.hf.get_image_features(self._pixels(images), return_dict=True)
        return [ImageFeatures(tokens=part) for part in output.pooler_output]

    def _pixels(self, images: Sequence[ImageInputs]) -> Tensor:
        """Pixels of all images as the tower takes them."""
        device, dtype = input_place(self.hf.vision_model, self.hf)
        pixels = join_padded([image.tensors["pixel_values"] for image in images])
        return pixels.to(device, dtype)

    def place_image(self, ids: Sequence[int], *tokens: int) -> tuple[list[int], list[bool]]:
        """Put the image's tokens before everything else."""
        count = sum(tokens)
        return [self.image_token_id] * count + list(ids), [True] * count + [False] * len(ids)

    def position_ids(self, lengths: Tensor, image_mask: Tensor, images: Sequence[ImageInputs | None]) -> Tensor:
        """Return positions in sequence (R, 1, N), -1 at padding as the stock model has it for learned positions."""
        places = sequential_positions(image_mask)
        return torch.where(places < lengths[:, None, None], places, torch.zeros_like(places))
