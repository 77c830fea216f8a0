"""What a model family must provide, and which family serves which configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from .families import FAMILIES
from .placement import device_of
from .stacks import TextStack
from .states import ImageFeatures, ImageInputs
from .text import check_text

if TYPE_CHECKING:
    from PIL.Image import Image


class Adapter(Protocol):
    """One model family. An adapter is made from the Hugging Face model and its processor.

    Args:
        family: the name shown to people.
        text: the decoder.
        head: maps final hidden states to logits.
        image_token_id: the token that image features replace.
        image_text: what stands for an image in a raw prompt; "" where image tokens do not stand in the text.
        listed_text: what stands for each of several; "" is the same.
        video_token_id, video_text: the same for a video; -1 and "" where the family has none.
        most_images: that a question may be about; None is any number.
        joins_lists: whether images of a list are prepared together, else each by itself.
        no_video: why videos are refused, in words that follow the model's name; "" where they are taken.
        token_types: whether the stock forward takes `mm_token_type_ids`.
    """

    family: str
    text: TextStack
    head: nn.Module
    image_token_id: int
    image_text: str
    listed_text: str
    video_token_id: int
    video_text: str
    most_images: int | None
    joins_lists: bool
    no_video: str
    token_types: bool

    @staticmethod
    def check(config: Any) -> None:
        """Refuse with a ValueError what a configuration asks for and the adapter does not do."""

    def check_inputs(self, image: ImageInputs) -> None:
        """Refuse a processor whose images do not fit the model. The model may be on the meta device."""

    def image_inputs(self, image: Image) -> tuple[dict[str, Tensor], int]:
        """Return the tensors of one image and how many image tokens it takes."""

    def list_inputs(self, images: Sequence[Image], keys: Sequence[str]) -> ImageInputs:
        """Return several images prepared together, by their content hashes; for families with `joins_lists`."""

    def video_inputs(self, frames: Sequence[Image], fps: float) -> ImageInputs:
        """Return a video's frames prepared as a video, which `no_video` does not refuse."""

    def image_features(self, images: Sequence[ImageInputs]) -> list[ImageFeatures]:
        """Run the vision side once over these images."""

    def vision_linears(self) -> dict[str, str]:
        """Return paths of the linear maps between the vision tower and the decoder by name; none if not editable."""

    def look(self, images: Sequence[ImageInputs]) -> list[Tensor]:
        """Run the vision tower once over these images; return what the maps behind it read (N, d_vision) of each."""

    def join(self, seen: Sequence[Tensor]) -> Tensor:
        """Run what is behind the tower on outputs of `look`; return embeddings (T, d) at the images' tokens."""

    def place_image(self, ids: Sequence[int], *tokens: int) -> tuple[list[int], list[bool]]:
        """Return prompt tokens with each image's tokens in place, and which of them are image tokens."""

    def position_ids(self, lengths: Tensor, image_mask: Tensor, images: Sequence[ImageInputs | None]) -> Tensor:
        """Return positions (R, A, N) of right-padded rows."""


def check_configuration(name: str, config: Any) -> None:
    """Refuse a configuration that cannot be edited, before any weight is read.

    Raises:
        ValueError: says which entry, and why.
    """
    if has_family(config):
        return
    from .generic.kinds import check_kind

    try:
        check_kind(config)
    except ValueError as error:
        raise ValueError(f"load: {name!r}: {str(error).removeprefix('load: ')}") from None


def make_adapter(hf: Any, processor: Any) -> Adapter:
    """Return the adapter of a loaded model."""
    if not has_family(hf.config):
        from .generic.adapter import GenericAdapter

        traced: Any = GenericAdapter(hf, processor)
        return cast(Adapter, traced)
    adapter: Adapter = FAMILIES[hf.config.model_type].adapter_class()(hf, processor)
    return adapter


def has_family(config: Any) -> bool:
    """Whether a configuration is served by a family of its own: a fast path, with a walk written for its decoder."""
    if config.model_type not in FAMILIES:
        return False
    try:
        FAMILIES[config.model_type].adapter_class().check(config)
        check_text(config.get_text_config().model_type)
    except ValueError:
        return False
    return True


def sequential_positions(image_mask: Tensor) -> Tensor:
    """Return positions 0, 1, 2, ... for rows (R, N): (R, 1, N), int64."""
    rows, length = image_mask.shape
    return torch.arange(length, device=image_mask.device).expand(rows, 1, length)


def image_token_id(hf: Any, processor: Any, fallback: str) -> int:
    """Return the token that stands for image features: the configuration's, else the processor's."""
    for name in ("image_token_id", "image_token_index"):
        found = getattr(hf.config, name, None)
        if found is not None:
            return int(found)
    return int(processor.tokenizer.convert_tokens_to_ids(fallback))


#: Types that a model computes in. Codes of quantized weights are integers, or 8-bit floats, and never among them.
COMPUTE_DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def input_place(*modules: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return device and type of the inputs of a module: those of its first parameter that is no quantized weight's.

    Args:
        modules: the one that gets the inputs, then others that are asked where it has no such parameter.
    """
    offloaded: tuple[torch.device, torch.dtype] | None = None
    for module in modules:
        for parameter in module.parameters():
            if parameter.dtype not in COMPUTE_DTYPES:
                continue
            if not parameter.is_meta:
                return parameter.device, parameter.dtype
            # Kept elsewhere until its module runs, whose hook says where; or a model without weights
            offloaded = offloaded or (device_of(module), parameter.dtype)
    if offloaded is not None:
        return offloaded
    names = ", ".join(type(module).__name__ for module in modules)
    raise ValueError(f"load: a model needs a parameter of a floating-point type that is not quantized (got {names})")


def token_text(processor: Any, token_id: int) -> str:
    """Return the text of a token."""
    text: str = processor.tokenizer.convert_ids_to_tokens(token_id)
    return text


def check_count(features: int, tokens: int) -> None:
    """Refuse a processor that makes room for another number of features than the model puts out for an image."""
    if features != tokens:
        rule = "the processor must make as many tokens of an image as the model makes features"
        raise ValueError(f"{rule} (got tokens={tokens}, features={features})")
