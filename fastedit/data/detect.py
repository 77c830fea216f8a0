"""What a record file is: its format, and which of the two MMEdit releases it comes from, by content.

Two releases of MMEdit circulate under the same file names. They share images, prompts and predictions; targets of
E-IC (804 of 1,000) and nearly all text-locality questions differ, so their scores cannot be compared. The older one
asks 2 text-locality questions in 1,000 records, the newer one a different question in every record. That is what
is looked at, so that a subset, a re-indented copy or a corrected record is recognised too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastedit.data.files import JsonObject, RawRecord, read_records
from fastedit.data.mmedit import LOCALITY_PREFIX
from fastedit.data.problems import Collector, RecordErrors

FORMATS = ("mmedit", "vlkeb", "jsonl")

#: Content fingerprint of the known public files -> (name, release).
KNOWN: dict[str, tuple[str, str | None]] = {
    "15caa1f5da02388a32e76bd2007eb8c5dd7d4aaaf2a30d8ceea8578bc591ec64": ("E-VQA eval", "new"),
    "da27915300eb0636896a3695a82a26cf61f73cd06d35e88397577a11505daedc": ("E-VQA train", "new"),
    "427e2f959c5703731608324ebf30640067db16df3c7cdc1922865fd6526d5f25": ("E-IC eval", "new"),
    "a3312f49d06c9532ed05afa4c2cdb25ac4feeca273a6577d8037a1e06af89170": ("E-IC train", "new"),
    "e091fa5153e8f6e16108dff7e244f1310d59ce9b180bd3b8b365ce98a8468d7d": ("E-IC eval", "old"),
    "ca1b8647c216419f143e609f55f057b51247ee7ebab5654168fbed6b89ac8848": ("VLKEB eval", None),
    "2d0b46ede64fb89ef90d1955c353f6f5935c059b49fc71940d3802c06a3c1b80": ("VLKEB eval, one-hop edits", None),
}

#: Fewer records do not tell the releases apart.
_FEWEST = 5
_COCO = "val2014/COCO_val2014_"
_ENTITY = re.compile(r"[mg]\.[0-9a-z_]+/")


@dataclass(frozen=True, slots=True)
class Detection:
    """What a record file was found to be.

    Args:
        format: "mmedit", "vlkeb" or "jsonl".
        release: of an MMEdit file "new" or "old", None where the content does not tell; None for other formats.
        n_records: number of records, malformed ones included.
        fingerprint: sha256 over the records as canonical JSON; white space and key order do not change it.
        name: the public file with exactly this content, for example "E-VQA eval", or None.
        text_locality_questions: number of distinct text-locality questions.
    """

    format: str
    release: str | None
    n_records: int
    fingerprint: str
    name: str | None = None
    text_locality_questions: int = 0

    def __str__(self) -> str:
        parts = [self.format]
        if self.name:
            parts.append(self.name)
        if self.release:
            parts.append(f"{self.release} release")
        parts.append(f"{self.n_records} records")
        return f"{', '.join(parts)}, sha256 {self.fingerprint[:16]}"


def detect(path: str | os.PathLike[str]) -> Detection:
    """Return what a record file is, by its content alone.

    Raises:
        FileNotFoundError: there is no such file.
        RecordErrors: the file cannot be read as records, or they follow none of the formats.
    """
    collector = Collector(Path(path))
    records = read_records(Path(path), collector)
    found = detect_records(records)
    if found is None:
        collector.add(UNKNOWN_FORMAT)
        raise RecordErrors(collector.problems)
    return found


UNKNOWN_FORMAT = "must have the fields of a format: src and alt (mmedit, vlkeb), or prompt and target (jsonl)"


def detect_records(records: Sequence[RawRecord]) -> Detection | None:
    """Return what the records are, or None where no format fits."""
    objects = [record.value for record in records if isinstance(record.value, JsonObject)]
    format = _format(objects)
    if format is None:
        return None
    content = content_fingerprint(records)
    name, release = KNOWN.get(content, (None, None))
    questions = {loc for loc in (value.get("loc") for value in objects) if isinstance(loc, str)}
    if format == "mmedit" and name is None:
        release = _release(objects, len(questions))
    return Detection(format, release, len(records), content, name, len(questions))


def _format(objects: Sequence[JsonObject]) -> str | None:
    """Return the format that most objects follow."""
    ours = sum("prompt" in value and "target" in value for value in objects)
    theirs = sum("src" in value and "alt" in value for value in objects)
    if ours == theirs == 0:
        # Broken in every record: one of the two keys is still better than nothing.
        ours = sum("prompt" in value or "target" in value for value in objects)
        theirs = sum("src" in value or "alt" in value for value in objects)
    if ours == theirs == 0:
        return None
    if ours >= theirs:
        return "jsonl"
    entities = sum(isinstance(image := value.get("image"), str) and bool(_ENTITY.match(image)) for value in objects)
    ports = sum("port_new" in value for value in objects)
    return "vlkeb" if ports or 2 * entities > len(objects) else "mmedit"


def _release(objects: Sequence[JsonObject], n_questions: int) -> str | None:
    """Return the MMEdit release, None where the records are too few, mixed, or not MMEdit's own."""
    if len(objects) < _FEWEST:
        return None
    coco = sum(_begins(value.get("loc"), LOCALITY_PREFIX) and _begins(value.get("image"), _COCO) for value in objects)
    if coco < 0.9 * len(objects):
        return None
    if n_questions <= max(2, len(objects) // 100):
        return "old"
    return "new" if n_questions >= 0.9 * len(objects) else None


def _begins(value: object, prefix: str) -> bool:
    return isinstance(value, str) and value.startswith(prefix)


def content_fingerprint(records: Sequence[RawRecord]) -> str:
    """Return the sha256, in hex, over the records as canonical JSON, one a line."""
    digest = hashlib.sha256()
    for record in records:
        try:
            digest.update(canonical(record.value))
        except RecursionError:
            # Parsed, yet too deep to be written: malformed anyway, and reported as such by the reader.
            digest.update(b"too deep")
        digest.update(b"\n")
    return digest.hexdigest()


def canonical(value: object) -> bytes:
    """Return JSON with sorted keys and no white space, in ASCII: equal bytes for equal values."""
    return json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode("ascii")
