"""Small pictures of a page: each image once, as a class of its style sheet, within a bound in all."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

from fastedit.data.images import image_key, open_image
from fastedit.data.problems import ImageError
from fastedit.visuals import ImageSource, VisualSource, images_of

#: Longest side in pixels, pictures of one question, and bytes of all pictures of a page.
SIDE, PER_QUESTION, MOST_BYTES = 144, 3, 4 * 2**20


class Pictures:
    """Thumbnails by class name; an image that cannot be read, or has no room, has none."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.most_bytes, self.used = most_bytes, 0
        #: Images that were left out.
        self.left_out = 0
        self._names: dict[str, str] = {}
        self._urls: dict[str, str] = {}

    def of(self, visual: VisualSource | None) -> list[str]:
        """Class names of the first images of what a question is about."""
        return [name for source in images_of(visual)[:PER_QUESTION] if (name := self._name(source)) is not None]

    def style(self) -> str:
        """The style sheet of all classes; nothing but what was made here is in it."""
        return "".join(f".{name}{{background-image:url({url})}}" for name, url in self._urls.items())

    def _name(self, source: ImageSource) -> str | None:
        try:
            key = image_key(source)
            if key not in self._names:
                url = _data_url(source)
                if self.used + len(url) > self.most_bytes:
                    self.left_out += 1
                    return None
                self._names[key] = f"p{len(self._names)}"
                self._urls[self._names[key]], self.used = url, self.used + len(url)
        except (ImageError, OSError):
            self.left_out += 1
            return None
        return self._names[key]


def _data_url(source: ImageSource) -> str:
    """An image as a data URL: JPEG, or where it is drawn with few pixels, PNG."""
    image = open_image(source)
    small = max(image.size) <= SIDE
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, **({"format": "PNG"} if small else {"format": "JPEG", "quality": 80}))
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def more_words(visual: VisualSource | None, shown: Sequence[str]) -> str:
    """What there is beside the pictures that are shown: "" for nothing, "+5" for five frames more."""
    left = len(images_of(visual)) - len(shown)
    return f"+{left}" if left > 0 and shown else "picture not shown" if left > 0 else ""
