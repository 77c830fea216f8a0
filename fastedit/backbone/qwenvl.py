"""Qwen2-VL (arXiv 2409.12191), Qwen2.5-VL (2502.13923) and Qwen3-VL: positions with time, height and width.

Qwen3-VL also adds visual features to the output of its first decoder layers (DeepStack, arXiv 2406.04334).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .adapters import check_count, image_token_id, input_place, sequential_positions
from .context import overridden
from .generic.processing import video_inputs
from .prompts import expand_image_token
from .several import without_video
from .states import ImageFeatures, ImageInputs
from .text import text_stack

if TYPE_CHECKING:
    from PIL.Image import Image


class QwenVLAdapter:
    """The number of image tokens follows from the image's patch grid."""

    family = "Qwen-VL"
    token_types = True
    listed_text = ""
    most_images: int | None = None
    joins_lists = False

    def __init__(self, hf: Any, processor: Any) -> None:
        self.hf = hf
        self.processor = processor
        self.text = text_stack(hf.model.language_model)
        self.head = hf.lm_head
        self.image_token_id = image_token_id(hf, processor, "<|image_pad|>")
        self.merge_size = int(hf.config.vision_config.spatial_merge_size)
        tokens = (getattr(hf.config, "vision_start_token_id", None), getattr(hf.config, "vision_end_token_id", None))
        names = [processor.tokenizer.convert_ids_to_tokens(token) for token in tokens if token is not None]
        opening, closing = names if len(names) == 2 else ("<|vision_start|>", "<|vision_end|>")
        self.image_text = opening + processor.tokenizer.convert_ids_to_tokens(self.image_token_id) + closing
        self.video_token_id = int(hf.config.video_token_id)
        token = processor.tokenizer.convert_ids_to_tokens(self.video_token_id)
        self.video_text = f"{opening}{token}{closing}" if token else ""
        self.no_video = without_video(processor, self.video_text)

    @staticmethod
    def check(config: Any) -> None:
        """Every configuration of these families is served."""

    def check_inputs(self, image: ImageInputs) -> None:
        """Embed an image's patches; as many of them as the grid says become a token each."""
        visual = self.hf.model.visual
        device, dtype = input_place(visual, self.hf)
        patches = visual.patch_embed(image.tensors["pixel_values"].to(device, dtype))
        check_count(patches.shape[0] // self.merge_size**2, image.tokens)

    def image_inputs(self, image: Image) -> tuple[dict[str, Tensor], int]:
        """Return patches (P, values) and grid (1, 3) of one image and how many image tokens it takes."""
        batch = self.processor.image_processor(images=[image], return_tensors="pt")
        grid = batch["image_grid_thw"]
        tensors = {"pixel_values": batch["pixel_values"], "image_grid_thw": grid}
        return tensors, int(grid[0].prod()) // self.merge_size**2

    def list_inputs(self, images: Sequence[Image], keys: Sequence[str]) -> ImageInputs:
        """Never called: each image is prepared by itself."""
        raise ValueError(f"{self.family} prepares images one by one (got {len(images)})")

    def video_inputs(self, frames: Sequence[Image], fps: float) -> ImageInputs:
        """Return patches and grid of a video, and its tokens, times of frames among them where the family has such."""
        return video_inputs(self.processor, self.video_text, self.video_token_id, self.image_token_id, frames, fps)

    def vision_linears(self) -> dict[str, str]:
        """The merger's two maps."""
        names = ("mlp.0", "mlp.2") if hasattr(self.hf.model.visual.merger, "mlp") else ("linear_fc1", "linear_fc2")
        return {name: f"model.visual.merger.{name}" for name in names}

    def look(self, images: Sequence[ImageInputs]) -> list[Tensor]:
        """Run the tower; return its patches in the order in which the decoder gets what is made of them."""
        merger, given = self.hf.model.visual.merger, []

        def numbered(x: Tensor) -> Tensor:
            # The tower may have gathered patches in windows: numbers come out where tokens would
            given.append(x)
            tokens = x.numel() // merger.hidden_size
            return torch.arange(tokens, device=x.device, dtype=torch.float64)[:, None]

        with overridden(merger, lambda _original: numbered):
            features = self.image_features(images)
        groups = given[0].reshape(-1, self.merge_size**2, given[0].shape[-1])
        return [groups[part.tokens[:, 0].long()].flatten(0, 1) for part in features]

    def join(self, seen: Sequence[Tensor]) -> Tensor:
        """Run the merger, which sees one token's patches at a time."""
        joined: Tensor = self.hf.model.visual.merger(torch.cat(list(seen)))
        return joined

    def image_features(self, images: Sequence[ImageInputs]) -> list[ImageFeatures]:
        """Run the tower once over these images, and once over the videos among them."""
        if all(image.video for image in images):
            return self._looked(images, "pixel_values_videos", "video_grid_thw", self.hf.model.get_video_features)
        if any(image.video for image in images):
            return [part for image in images for part in self.image_features([image])]
        return self._looked(images, "pixel_values", "image_grid_thw", self.hf.model.get_image_features)

    def _looked(
        self, images: Sequence[ImageInputs], pixels_name: str, grid_name: str, look: Callable[..., Any]
    ) -> list[ImageFeatures]:
        device, dtype = input_place(self.hf.model.visual, self.hf)
        pixels = torch.cat([image.tensors[pixels_name] for image in images]).to(device, dtype)
        grid = torch.cat([image.tensors[grid_name] for image in images]).to(device)
        output = look(pixels, grid, return_dict=True)
        deep = getattr(output, "deepstack_features", None) or []
        # Either one tensor per layer and image, or one per layer for all images.
        sizes = [image.tokens for image in images]
        layers = [torch.split(part, sizes) if isinstance(part, Tensor) else part for part in deep]
        return [
            ImageFeatures(tokens=tokens, deep=tuple(layer[number] for layer in layers))
            for number, tokens in enumerate(output.pooler_output)
        ]

    def place_image(self, ids: Sequence[int], *tokens: int) -> tuple[list[int], list[bool]]:
        """Expand the placeholders."""
        return expand_image_token(ids, self.image_token_id, *tokens)

    def position_ids(self, lengths: Tensor, image_mask: Tensor, images: Sequence[ImageInputs | None]) -> Tensor:
        """Return positions (R, 3, N): text counts on; an image spans a grid, and text resumes after its longer side.

        Those of a video are what the stock model makes of its grid and its time.
        """
        places = sequential_positions(image_mask).repeat(1, 3, 1)
        for row, image in enumerate(images):
            if image is None:
                continue
            if image.video:
                places[row] = self._video_positions(image_mask[row], image)
                continue
            marks, looked = image_mask[row].nonzero().flatten().tolist(), 0
            for part in image.each:
                _, height, width = (part.tensors["image_grid_thw"][0] // self.merge_size).tolist()
                frames = int(part.tensors["image_grid_thw"][0, 0])
                start = marks[looked]
                stop, looked = start + part.tokens, looked + part.tokens
                grid = torch.cartesian_prod(torch.arange(frames), torch.arange(height), torch.arange(width))
                places[row, :, start:stop] = places[row, 0, start] + grid.view(-1, 3).T.to(places.device)
                places[row, :, stop:] -= part.tokens - max(height, width)
        return places

    def _video_positions(self, marks: Tensor, video: ImageInputs) -> Tensor:
        """Positions (3, N) of one row."""
        stock = self.hf.model.get_rope_index
        known = inspect.signature(stock).parameters
        values = {name: value.to(marks.device) for name, value in video.tensors.items() if name in known}
        positions: Tensor = stock(torch.zeros_like(marks[None], dtype=torch.long), 2 * marks[None].int(), **values)[0]
        return positions[:, 0]
