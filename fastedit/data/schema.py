"""What the formats share: an edit request is read from named keys, and written to them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fastedit.data.fields import Fields
from fastedit.data.images import store_image
from fastedit.requests import (
    PARAPHRASE_KINDS,
    PROBE_KINDS,
    WORDINGS,
    EditRequest,
    Probe,
    Query,
    Video,
    VisualSource,
    images_of,
)

#: Keys that every format accepts beside its own.
SHARED_KEYS = ("portability", "probes", "paraphrases", "tags", "id")


@dataclass(frozen=True, slots=True)
class Schema:
    """The names of a format.

    Args:
        format: "mmedit", "vlkeb" or "jsonl".
        keys: `EditRequest` field -> key in the record, for every text and image field.
        strict: every key must be present, if only as null.
        needs_image: a record without `image` is an error.
        extra: further keys that the format's reader looks at itself.
    """

    format: str
    keys: Mapping[str, str]
    strict: bool
    needs_image: bool
    extra: tuple[str, ...] = ()

    def known(self) -> tuple[str, ...]:
        """All keys that a record may have."""
        return (*self.keys.values(), *self.extra, *SHARED_KEYS)


#: (field, companion that must be present with it)
_NEEDS = (
    ("locality_answer", "locality_prompt"),
    ("image_locality_image", "image_locality_prompt"),
    ("image_locality_prompt", "image_locality_image"),
    ("image_locality_answer", "image_locality_prompt"),
    ("image_rephrase", "image"),
)


def read_request(fields: Fields, schema: Schema, name: str, portability: tuple[Query, ...] = ()) -> EditRequest | None:
    """Return the request, or None after reporting what is wrong with it.

    White space around target and answers is removed: 144 of MMEdit's 1,000 E-IC eval targets end in a newline or a
    blank, which would become a token to be learned. Prompts stay as they are.

    Args:
        fields: the record.
        schema: names of its keys.
        name: file name, for the id of a record that has none.
        portability: queries that the format's reader found under its own keys.
    """
    keys = schema.keys
    read: dict[str, object] = {
        "prompt": fields.text(keys["prompt"], required=True),
        "target": fields.text(keys["target"], required=True, strip=True),
        "image": fields.image(keys["image"], required=schema.needs_image),
        "rephrase": fields.text(keys["rephrase"]),
        "image_rephrase": fields.image(keys["image_rephrase"]),
        "locality_prompt": fields.text(keys["locality_prompt"]),
        "locality_answer": fields.text(keys["locality_answer"], strip=True),
        "image_locality_image": fields.image(keys["image_locality_image"]),
        "image_locality_prompt": fields.text(keys["image_locality_prompt"]),
        "image_locality_answer": fields.text(keys["image_locality_answer"], strip=True),
        "prediction": fields.text(keys["prediction"], empty=True, strip=True),
    }
    for field, companion in _NEEDS:
        if fields.value.get(keys[field]) is not None and fields.value.get(keys[companion]) is None:
            fields.problem(f"needs {keys[companion]!r}, which is absent", keys[field])
    queries = (*portability, *_queries(fields, "portability"))
    paraphrases = tuple(_queries(fields, "paraphrases", PARAPHRASE_KINDS))
    probes = tuple(_probes(fields))
    tags = fields.texts("tags")
    own_id = fields.text("id", empty=True) if "id" in fields.value else None
    fields.unknown(schema.known())
    if fields.failed:
        return None
    identity = own_id or f"{name}#{fields.record.index}"
    parts = {"portability": queries, "probes": probes, "paraphrases": paraphrases, "id": identity, "tags": tags}
    return EditRequest(**read, **parts)  # type: ignore[arg-type]


def _queries(fields: Fields, name: str, kinds: tuple[str, ...] = ()) -> Iterator[Query]:
    for member in fields.members(name):
        prompt = member.text("prompt", required=True)
        image = member.image("image")
        answer = member.text("answer", strip=True)
        kind = member.text("kind", empty=True)
        member.unknown(("prompt", "image", "answer", "kind"))
        if kinds and kind not in kinds:
            member.problem(f"must be one of {', '.join(kinds)}", "kind", kind)
        if prompt is not None and not member.failed:
            yield Query(prompt, image, answer, kind or "")


def _probes(fields: Fields) -> Iterator[Probe]:
    for member in fields.members("probes"):
        kind = member.text("kind", required=True)
        prompt = member.text("prompt", required=True)
        image = member.image("image")
        answer = member.text("answer", strip=True)
        wording = member.text("wording", empty=True) or ""
        member.unknown(("kind", "prompt", "image", "answer", "wording"))
        if wording not in WORDINGS:
            member.problem('must be "" or "unseen"', "wording", wording)
        if kind is not None and kind not in PROBE_KINDS:
            member.problem(f"must be one of {', '.join(PROBE_KINDS)}", "kind", kind)
        has_image = member.value.get("image") is not None
        if kind in ("blind", "text_locality") and has_image:
            member.problem(f"must be null in a {kind} probe", "image", member.value.get("image"))
        if kind in ("near", "image_locality") and not has_image:
            member.problem(f"must be another image in a {kind} probe", "image")
        if kind is not None and prompt is not None and not member.failed:
            yield Probe(kind, prompt, image, answer, wording)


def write_request(edit: EditRequest, schema: Schema, images: str | os.PathLike[str] | None) -> dict[str, object]:
    """Return the record of a request, ready for JSON; images in memory are saved under `images`.

    Raises:
        ImageError: an image cannot be written as a path below `images`; the message begins with the request's id.
    """

    def path(visual: VisualSource | None) -> object:
        paths = [store_image(source, images) for source in images_of(visual)]
        if isinstance(visual, Video):
            return {"video": paths, "fps": visual.fps}
        return paths if len(paths) > 1 else next(iter(paths), None)

    record: dict[str, object] = {}
    for field, key in schema.keys.items():
        value = getattr(edit, field)
        record[key] = path(value) if field in IMAGE_FIELDS else value
    for name, queries in (("portability", edit.portability), ("paraphrases", edit.paraphrases)):
        if queries:
            record[name] = [
                {"prompt": q.prompt, "image": path(q.image), "answer": q.answer} | ({"kind": q.kind} if q.kind else {})
                for q in queries
            ]
    if edit.probes:
        record["probes"] = [
            {"kind": p.kind, "prompt": p.prompt, "image": path(p.image), "answer": p.answer}
            | ({"wording": p.wording} if p.wording else {})
            for p in edit.probes
        ]
    if edit.tags:
        record["tags"] = list(edit.tags)
    if edit.id:
        record["id"] = edit.id
    if not schema.strict:
        record = {key: value for key, value in record.items() if value is not None}
    return record


#: Fields of a request that hold questions with images of their own, then those that hold an image.
MEMBER_FIELDS = ("portability", "probes", "paraphrases")
IMAGE_FIELDS = ("image", "image_rephrase", "image_locality_image")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file so that either the old or the new one is found there, never a part."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def to_json(record: Mapping[str, object]) -> str:
    """Return one line of JSON."""
    return json.dumps(record, ensure_ascii=False)
