"""The third-party image set `easy-vqa` (pip install easy-vqa): 5,000 images of 64 x 64 pixels, 48,248 questions.

Used beside the rendered world so that the embedded models are not only tested on what this project draws itself.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

from fastedit.data import open_image
from fastedit.pocket.facts import sentence

if TYPE_CHECKING:
    from PIL import Image


@dataclasses.dataclass(frozen=True, slots=True)
class EasyScene:
    """One easy-vqa image by its path, with its questions as (prompt, answer)."""

    path: str
    questions: tuple[tuple[str, str], ...]

    def image(self) -> Image.Image:
        """Return the image, RGB 64 x 64."""
        return open_image(self.path)


@functools.cache
def easy_scenes(split: str) -> tuple[EasyScene, ...]:
    """Return all images of split "train" or "test", ordered by their number.

    Raises:
        ImportError: the package is missing; it is only needed to train the models again and to test them on this set.
    """
    try:
        import easy_vqa
    except ImportError as error:
        raise ImportError("the easy-VQA images are in the package easy-vqa: pip install easy-vqa") from error
    paths = easy_vqa.get_train_image_paths() if split == "train" else easy_vqa.get_test_image_paths()
    texts, answers, owners = easy_vqa.get_train_questions() if split == "train" else easy_vqa.get_test_questions()
    questions: dict[int, list[tuple[str, str]]] = {}
    for text, answer, owner in zip(texts, answers, owners, strict=True):
        questions.setdefault(owner, []).append((sentence(text), answer))
    return tuple(EasyScene(paths[i], tuple(questions[i])) for i in sorted(paths) if i in questions)
