"""MMEdit (E-VQA and E-IC): a list of records with 11 text fields.

Cheng et al., "Can We Edit Multimodal Large Language Models?", arXiv 2310.08475. The text-locality question carries
the literal prefix "nq question: ". It is kept, because the published (legacy) numbers were asked with it;
`without_prefix` removes it for protocols that ask the bare question.

Keys beside the 11, ours: `portability`, a list of {"prompt", "image", "answer", "kind"}; `probes`, a list of
{"kind", "prompt", "image", "answer", "wording"}; `paraphrases`, a list like `portability`; `tags`, a list of texts;
`id`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from fastedit.data.fields import Fields
from fastedit.data.schema import Schema, to_json, write_request, write_text
from fastedit.data.schema import read_request as _read
from fastedit.requests import EditRequest

KEYS = {
    "prompt": "src",
    "prediction": "pred",
    "rephrase": "rephrase",
    "target": "alt",
    "image": "image",
    "image_rephrase": "image_rephrase",
    "locality_prompt": "loc",
    "locality_answer": "loc_ans",
    "image_locality_image": "m_loc",
    "image_locality_prompt": "m_loc_q",
    "image_locality_answer": "m_loc_a",
}
SCHEMA = Schema("mmedit", KEYS, strict=True, needs_image=False)
LOCALITY_PREFIX = "nq question: "


def read_request(fields: Fields, name: str) -> EditRequest | None:
    """Return the request of one MMEdit record, or None after reporting what is wrong with it."""
    return _read(fields, SCHEMA, name)


def without_prefix(prompt: str) -> str:
    """Return a text-locality question without MMEdit's "nq question: "."""
    return prompt.removeprefix(LOCALITY_PREFIX)


def write_mmedit(
    edits: Iterable[EditRequest], path: str | os.PathLike[str], *, images: str | os.PathLike[str] | None = None
) -> None:
    """Write requests as one MMEdit JSON list, absent parts as null.

    Args:
        edits: the requests. Paths are written relative to `images`; images in memory are saved there as PNG.
        path: the file, replaced as a whole.
        images: image root of the file.
    Raises:
        ImageError: an image in memory without `images`, or a path outside of it.
    """
    lines = ",\n ".join(to_json(write_request(edit, SCHEMA, images)) for edit in edits)
    write_text(path, f"[\n {lines}\n]\n")
