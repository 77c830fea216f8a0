"""How a page is made of its template: escaped, self-contained, and written whole or not at all."""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastedit.files import replacing
from fastedit.report.gallery import MOST_EDITS
from fastedit.report.pictures import MOST_BYTES

if TYPE_CHECKING:
    from jinja2 import Environment

#: Name of a run's page in its folder.
REPORT = "report.html"
# Bytes of a page without edits; of an edit its texts, and pictures of noise at their full size
_FRAME, _TEXT, _PICTURES = 30_000, 20_000, 110_000


@dataclass(frozen=True)
class Section:
    """A part that a caller adds to a page.

    Args:
        title: as text. html: of which everything that was not made by the caller is escaped.
    """

    title: str
    html: str


def expected_page_bytes(n_edits: int) -> int:
    """Bytes of the page of a run of so many edits that are scored. An estimate from above, for a disk's room."""
    shown = min(n_edits, MOST_EDITS)
    return _FRAME + shown * _TEXT + min(MOST_BYTES, shown * _PICTURES)


def render(template: str, content: Mapping[str, Any]) -> str:
    """The text of a page. Whatever is put into a template is escaped.

    The page loads nothing, and runs no script but its own (its policy names that script's SHA-256).
    """
    environment = _environment()
    source, _, _ = environment.loader.get_source(environment, "page.js")  # type: ignore[union-attr]
    digest = base64.b64encode(hashlib.sha256(source.encode("utf-8")).digest()).decode("ascii")
    return environment.get_template(template).render(**content, script_digest=digest)


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("fastedit.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True, auto_reload=False,
    )  # fmt: skip
    environment.filters["number"] = lambda value: f"{value:,.3g}" if value < 100 else f"{value:,.0f}"
    return environment


def write_page(path: Path, text: str) -> Path:
    """Write a page in the place of the one that is there, if any. Lone surrogates of untrusted text become "?".

    Raises:
        OSError: it cannot be written; what was there is as it was.
    """
    with replacing(path) as file:
        file.write(text.encode("utf-8", errors="replace"))
    return path
