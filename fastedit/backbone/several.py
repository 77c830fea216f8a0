"""Lists of images and videos as a model takes them: how many, prepared together or each by itself, or refused."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastedit.visuals import Video, VisualSource, images_of

from .states import ImageInputs

if TYPE_CHECKING:
    from PIL.Image import Image

    from .adapters import Adapter


class Several:
    """What a model takes besides one image.

    Args:
        name: of the model, for messages. adapter: its family.
    """

    def __init__(self, name: str, adapter: Adapter) -> None:
        self._name, self._adapter = name, adapter

    def refusal(self, visual: VisualSource) -> str:
        """Return why the model does not take an image, a list or a video; "" where it does. Nothing is opened."""
        most = self._adapter.most_images
        if most != 0 and not isinstance(visual, (list, tuple, Video)):
            return ""
        count = len(images_of(visual))
        if most == 0:
            return f"{self._name} is a model of text alone, which takes no images (got {_told(visual)})"
        if isinstance(visual, Video):
            reason = self._adapter.no_video
            return f"{self._name} {reason} (got {_told(visual)})" if reason else ""
        if most is not None and count > most:
            return f"{self._name} takes {most} image a question (got {_told(visual)})"
        return ""

    @property
    def apart(self) -> bool:
        """Whether each image of a list is prepared by itself."""
        return not self._adapter.joins_lists

    def together(self, visual: VisualSource, images: Sequence[Image], keys: Sequence[str]) -> ImageInputs:
        """Return a list or a video prepared as a whole.

        Args:
            visual: the list or the video. images: its images, opened. keys: their content hashes.
        """
        if isinstance(visual, Video):
            return self._adapter.video_inputs(images, visual.fps)
        return self._adapter.list_inputs(images, keys)


def joined_key(visual: VisualSource, keys: Sequence[str]) -> str:
    """Return the content hash of a list or a video: of its images in order, and of the time between frames."""
    kind = f"video {visual.fps!r}" if isinstance(visual, Video) else "images"
    return hashlib.sha256("\n".join([kind, *keys]).encode()).hexdigest()


def joined(key: str, parts: Sequence[ImageInputs]) -> ImageInputs:
    """Return several preprocessed images as one row's, in order."""
    return ImageInputs(key, {}, sum(part.tokens for part in parts), parts=tuple(parts))


def most_images(config: Any) -> int | None:
    """Return how many images a question may be about by a model's configuration; None is any number.

    Models with a Q-Former were made for one; those with cross-attention take several, which is not done here.
    """
    crosses = getattr(config.get_text_config(), "cross_attention_layers", None)
    return 1 if crosses or getattr(config, "qformer_config", None) is not None else None


def without_video(processor: Any, token: str) -> str:
    """Return why a processor makes nothing of videos, "" where it does.

    Args:
        processor: of the model. token: what stands for a video in its prompts; "" where the model has no such token.
    """
    if not token:
        return "takes no video; its frames can be asked about as a list of images"
    if getattr(processor, "video_processor", None) is not None:
        return ""
    if importlib.util.find_spec("torchvision") is None:
        return "takes a video by a video processor of transformers, which needs torchvision: pip install torchvision"
    return "takes a video by a video processor, which its checkpoint does not have"


def _told(visual: VisualSource) -> str:
    count = len(images_of(visual))
    if isinstance(visual, Video):
        return f"a video of {count} {'frame' if count == 1 else 'frames'}"
    return "an image" if count == 1 else f"{count} images"
