"""LLaVA 1.5, LLaVA-NeXT and LLaVA-OneVision: image features at placeholders, positions in sequence.

arXiv 2310.03744 (1.5), 2408.03326 (OneVision). LLaVA-NeXT and OneVision cut an image into tiles, so its number of
tokens depends on its shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .adapters import check_count, image_token_id, input_place, sequential_positions, token_text
from .context import scoped_hooks
from .generic.processing import video_inputs
from .prompts import expand_image_token
from .several import joined, without_video
from .states import ImageFeatures, ImageInputs, join_padded
from .text import text_stack

if TYPE_CHECKING:
    from PIL.Image import Image


class LlavaAdapter:
    """LLaVA 1.5: every image has the same number of tokens."""

    family = "LLaVA"
    token_types = False
    most_images: int | None = None
    joins_lists = False
    video_token_id, video_text, listed_text = -1, "", ""
    no_video = without_video(None, "")

    def __init__(self, hf: Any, processor: Any) -> None:
        self.check(hf.config)
        self.hf = hf
        self.processor = processor
        self.text = text_stack(hf.model.language_model)
        self.head = hf.lm_head
        self.image_token_id = image_token_id(hf, processor, "<image>")
        self.image_text = token_text(processor, self.image_token_id)

    @staticmethod
    def check(config: Any) -> None:
        """Refuse towers whose features do not follow each other without other tokens between them."""
        tower = getattr(config.vision_config, "model_type", None)
        if tower == "pixtral":
            rule = (
                "vision_config.model_type must not be 'pixtral': its prompts hold [IMG_BREAK] between rows of features"
            )
            raise ValueError(f"{rule}, which is not served yet (got model_type={tower!r})")

    def check_inputs(self, image: ImageInputs) -> None:
        """Count the features of an image."""
        (features,) = self.image_features([image])
        check_count(features.tokens.shape[0], image.tokens)

    def image_inputs(self, image: Image) -> tuple[dict[str, Tensor], int]:
        """Return the tensors of one image and how many image tokens it takes."""
        batch = self.processor(images=[image], text=[self.image_text], return_tensors="pt")
        tokens = int((batch["input_ids"] == self.image_token_id).sum())
        return {"pixel_values": batch["pixel_values"]}, tokens

    def list_inputs(self, images: Sequence[Image], keys: Sequence[str]) -> ImageInputs:
        """Never called: each image is prepared by itself."""
        raise ValueError(f"{self.family} prepares images one by one (got {len(images)})")

    def video_inputs(self, frames: Sequence[Image], fps: float) -> ImageInputs:
        """Never called: videos are refused."""
        raise ValueError(f"{self.family} {self.no_video}")

    def vision_linears(self) -> dict[str, str]:
        """The projector's two maps."""
        path = "model.multi_modal_projector"
        return {"linear_1": f"{path}.linear_1", "linear_2": f"{path}.linear_2"}

    def look(self, images: Sequence[ImageInputs]) -> list[Tensor]:
        """Run the tower; what the projector is given of it stands for its output."""
        given: list[Tensor] = []

        def keep(_module: Any, args: tuple[Tensor, ...]) -> None:
            given.append(args[0])

        with scoped_hooks({self.hf.model.multi_modal_projector: keep}, before=True):
            self.image_features(images)
        return list(given[0])

    def join(self, seen: Sequence[Tensor]) -> Tensor:
        """Run the projector, which sees one token at a time."""
        joined: Tensor = self.hf.model.multi_modal_projector(torch.cat(list(seen))[None])
        return joined[0]

    def image_features(self, images: Sequence[ImageInputs]) -> list[ImageFeatures]:
        """Run tower and projector once over these images."""
        device, dtype = input_place(self.hf.model.vision_tower, self.hf)
        pixels = join_padded([image.tensors["pixel_values"] for image in images])
        arguments: dict[str, Any] = {"pixel_values": pixels.to(device, dtype)}
        if "image_sizes" in images[0].tensors:
            arguments["image_sizes"] = join_padded([image.tensors["image_sizes"] for image in images])
        output = self.hf.model.get_image_features(**arguments, return_dict=True)
        return [ImageFeatures(tokens=part) for part in output.pooler_output]

    def place_image(self, ids: Sequence[int], *tokens: int) -> tuple[list[int], list[bool]]:
        """Expand the placeholders."""
        return expand_image_token(ids, self.image_token_id, *tokens)

    def position_ids(self, lengths: Tensor, image_mask: Tensor, images: Sequence[ImageInputs | None]) -> Tensor:
        """Return positions in sequence (R, 1, N)."""
        return sequential_positions(image_mask)


def _kind(image: ImageInputs) -> str:
    """How LLaVA-OneVision looks at it."""
    if image.video:
        return "video"
    return "cut" if image.tensors["batch_num_images"].tolist() == [1] else "whole"


class LlavaTiledAdapter(LlavaAdapter):
    """LLaVA-NeXT and OneVision: an image is cut into tiles, their number and padding depend on its shape."""

    family = "LLaVA-NeXT/OneVision"

    def __init__(self, hf: Any, processor: Any) -> None:
        super().__init__(hf, processor)
        cut, joined = (
            [list(pair) for pair in getattr(part, "image_grid_pinpoints", None) or ()]
            for part in (processor.image_processor, hf.config)
        )
        if cut != joined:
            rule = "image_grid_pinpoints must be the same for the image processor and in config.json"
            raise ValueError(f"{rule} (got {cut!r:.80} and {joined!r:.80})")
        #: LLaVA-OneVision cuts an image into tiles where it is alone, and takes each of several whole.
        self.joins_lists = hasattr(hf.config, "vision_aspect_ratio")
        if self.joins_lists:
            self.video_token_id = int(hf.config.video_token_id)
            self.video_text = token_text(processor, self.video_token_id) or ""
            self.no_video = without_video(processor, self.video_text)

    def vision_linears(self) -> dict[str, str]:
        """None: features are cut and joined between projector and decoder."""
        return {}

    def image_inputs(self, image: Image) -> tuple[dict[str, Tensor], int]:
        """Return tiles (1, P, 3, H, W) and size (1, 2) of one image and how many image tokens it takes."""
        batch = self.processor.image_processor(images=[image], return_tensors="pt")
        tensors = {"pixel_values": batch["pixel_values"], "image_sizes": batch["image_sizes"]}
        if self.joins_lists:
            tensors["batch_num_images"] = torch.tensor([1])
        return tensors, self._count(tensors)

    def list_inputs(self, images: Sequence[Image], keys: Sequence[str]) -> ImageInputs:
        """Return images that are not cut."""
        batch = self.processor.image_processor(images=[list(images)], return_tensors="pt")
        parts = []
        for number, key in enumerate(keys):
            tensors = {name: batch[name][number : number + 1] for name in ("pixel_values", "image_sizes")}
            tensors["pixel_values"] = tensors["pixel_values"][:, :1]
            count = self._count(tensors)
            # How many a row has is told once a row
            tensors["batch_num_images"] = torch.tensor([] if number else [len(keys)], dtype=torch.long)
            parts.append(ImageInputs(f"{key} of a list", tensors, count))
        return joined("", parts)

    def image_features(self, images: Sequence[ImageInputs]) -> list[ImageFeatures]:
        """Run tower and projector over images that are cut, over those that are not, and over videos."""
        if not self.joins_lists:
            return super().image_features(images)
        looks: dict[str, Callable[[Sequence[ImageInputs]], list[ImageFeatures]]] = {
            "cut": partial(self._looked, whole=False),
            "whole": partial(self._looked, whole=True),
            "video": self._watched,
        }
        kinds = [_kind(image) for image in images]
        features: dict[int, ImageFeatures] = {}
        for kind in dict.fromkeys(kinds):
            chosen = [number for number, each in enumerate(kinds) if each == kind]
            features |= zip(chosen, looks[kind]([images[number] for number in chosen]), strict=True)
        return [features[number] for number in range(len(images))]

    def video_inputs(self, frames: Sequence[Image], fps: float) -> ImageInputs:
        """Return a video's frames, which the model pools."""
        return video_inputs(self.processor, self.video_text, self.video_token_id, self.image_token_id, frames, fps)

    def _watched(self, videos: Sequence[ImageInputs]) -> list[ImageFeatures]:
        device, dtype = input_place(self.hf.model.vision_tower, self.hf)
        # Frames are counted by the model over the whole call
        return [
            ImageFeatures(tokens=self.hf.model.get_video_features(pixels, return_dict=True).pooler_output[0])
            for pixels in (video.tensors["pixel_values_videos"].to(device, dtype) for video in videos)
        ]

    def _looked(self, images: Sequence[ImageInputs], *, whole: bool) -> list[ImageFeatures]:
        # The model cuts what is alone: one that is not to be cut gets a twin, whose features are left
        shown = [*images, *images] if whole and len(images) == 1 else list(images)
        device, dtype = input_place(self.hf.model.vision_tower, self.hf)
        pixels = join_padded([image.tensors["pixel_values"] for image in shown])
        output = self.hf.model.get_image_features(
            pixels.to(device, dtype),
            join_padded([image.tensors["image_sizes"] for image in shown]),
            batch_num_images=[len(shown)] if whole else [1] * len(shown),
            return_dict=True,
        )
        return [ImageFeatures(tokens=part) for part in output.pooler_output[: len(images)]]

    def _count(self, tensors: dict[str, Tensor]) -> int:
        """Pack features of width one as the model packs real ones, and count them."""
        config = self.hf.config
        side = config.vision_config.image_size // config.vision_config.patch_size
        blank = torch.zeros(tensors["pixel_values"].shape[1], side * side, 1)
        options: dict[str, Any] = {"image_newline": torch.zeros(1)}
        if hasattr(config, "vision_aspect_ratio"):
            options["vision_aspect_ratio"] = config.vision_aspect_ratio
        else:
            options["vision_feature_select_strategy"] = config.vision_feature_select_strategy
        packed, _ = self.hf.model.pack_image_features([blank], tensors["image_sizes"], **options)
        return int(packed[0].shape[0])
