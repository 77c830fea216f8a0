"""Reading edit requests: one entry for every source, all problems at once, nothing half read."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import importlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal, SupportsIndex, TypeAlias, overload

from fastedit.data import jsonl, mmedit, vlkeb
from fastedit.data.detect import FORMATS, UNKNOWN_FORMAT, Detection, detect_records
from fastedit.data.fields import Fields
from fastedit.data.files import JsonObject, RawRecord, read_records
from fastedit.data.images import resolve_image
from fastedit.data.problems import Collector, ImageError, MissingImageError, Problem, RecordErrors
from fastedit.data.schema import IMAGE_FIELDS, MEMBER_FIELDS, Schema
from fastedit.requests import EditRequest
from fastedit.visuals import ImageSource, VisualSource, image_places, with_images

#: Edit sets that are built in.
EMBEDDED = ("pocket-vqa", "pocket-caption", "icon-entity", "icon-vqa", "icon-caption")
SPLITS = ("train", "eval")
SkipMissing: TypeAlias = bool | Literal["parts"]

_log = logging.getLogger(__name__)
_READERS: dict[str, tuple[Schema, Callable[[Fields, str], EditRequest | None]]] = {
    "mmedit": (mmedit.SCHEMA, mmedit.read_request),
    "vlkeb": (vlkeb.SCHEMA, vlkeb.read_request),
    "jsonl": (jsonl.SCHEMA, jsonl.read_request),
}


class EditList(list[EditRequest]):
    """A list of requests that knows where it came from.

    Attributes:
        source: the file or the name of the embedded set.
        detection: what the file was found to be; None for an embedded set.
        warnings: problems that did not stop reading.
        skipped: ids of the records that were left out because an image was missing.
        missing: image paths that were not found, each once.
        places: by id, the number of the record in the file and its line, None in a JSON list.
        keys: by field of a request, the key in the file.
    """

    def __init__(
        self,
        edits: Iterable[EditRequest] = (),
        *,
        source: str = "",
        detection: Detection | None = None,
        warnings: Iterable[Problem] = (),
        skipped: Iterable[str] = (),
        missing: Iterable[str] = (),
        places: Mapping[str, tuple[int, int | None]] = MappingProxyType({}),
        keys: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        super().__init__(edits)
        self.source = source
        self.detection = detection
        self.warnings = tuple(warnings)
        self.skipped = tuple(skipped)
        self.missing = tuple(missing)
        self.places, self.keys = dict(places), dict(keys)

    @overload
    def __getitem__(self, key: SupportsIndex) -> EditRequest: ...
    @overload
    def __getitem__(self, key: slice) -> EditList: ...
    def __getitem__(self, key: SupportsIndex | slice) -> EditRequest | EditList:
        """Return a request, or some of them with all that is known of the list."""
        if not isinstance(key, slice):
            return super().__getitem__(key)
        part = copy.copy(self)
        part[:] = super().__getitem__(key)
        return part

    def __repr__(self) -> str:
        return f"<EditList: {len(self)} edits of {self.source!r}>"


def read_edits(
    source: str | os.PathLike[str],
    *,
    format: str | None = None,
    images: str | os.PathLike[str] | None = None,
    split: str = "eval",
    limit: int | None = None,
    skip_missing: SkipMissing = False,
) -> EditList:
    """Return the edit requests of a file or an embedded set, in order.

    Every record is checked before one is returned, also those beyond `limit`.

    Args:
        source: one of `EMBEDDED` ("pocket-vqa", "icon-vqa" ...), or the path of a JSON or JSON Lines file.
        format: "mmedit", "vlkeb" or "jsonl"; None to detect it by content.
        images: image root. If given, every image of a returned request is a `pathlib.Path` to an existing file
            below it; else paths are text, relative to a root that is not known yet.
        split: "eval" or "train" of an embedded set. A file is one split, so only the default fits it.
        limit: the first so many requests; with `skip_missing` the first so many complete ones.
        skip_missing: False: a missing image is an error. True: records with a missing image are left out.
            "parts": a record is left out only if the image of the edit itself is missing; of the others the part is
            left out whose image is missing (image rephrase, image locality, a portability query, a probe).
    Returns:
        `EditList`, a list with `detection`, `warnings`, `skipped` and `missing`.
    Raises:
        FileNotFoundError: there is no such file, or `images` is no folder.
        RecordErrors: malformed records, refused paths or missing images, all of them at once.
        ValueError: an argument that makes no sense.
    """
    edits, problems = collect_edits(
        source, format=format, images=images, split=split, limit=limit, skip_missing=skip_missing
    )
    if any(problem.level == "error" for problem in problems):
        raise RecordErrors(problems)
    _report(edits)
    return edits


def collect_edits(
    source: str | os.PathLike[str],
    *,
    format: str | None = None,
    images: str | os.PathLike[str] | None = None,
    split: str = "eval",
    limit: int | None = None,
    skip_missing: SkipMissing = False,
) -> tuple[EditList, list[Problem]]:
    """Return the requests of the sound records, and the problems of all; arguments as those of `read_edits`.

    Raises:
        FileNotFoundError, ValueError: as `read_edits`. RecordErrors: the file as a whole cannot be read.
    """
    _check_arguments(format, split, limit, skip_missing)
    if isinstance(source, str) and source in EMBEDDED:
        if images is not None or format not in (None, "mmedit"):
            raise ValueError(f"read_edits: an embedded set takes no images and no format (got source={source!r})")
        return EditList(_embedded(source, split, limit), source=source), []
    if split != "eval":
        raise ValueError(f"read_edits: a file has no splits, read the other file (got split={split!r})")
    if images is not None and not Path(images).is_dir():
        raise FileNotFoundError(f"read_edits: images must be an existing folder (got images={os.fspath(images)!r})")
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(_no_such_file(os.fspath(source)))
    return _read_file(path, format, images, limit, skip_missing)


def _check_arguments(format: str | None, split: str, limit: int | None, skip_missing: SkipMissing) -> None:
    if format is not None and format not in FORMATS:
        raise ValueError(f"read_edits: format must be one of {', '.join(FORMATS)} (got format={format!r})")
    if split not in SPLITS:
        raise ValueError(f"read_edits: split must be one of {', '.join(SPLITS)} (got split={split!r})")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"read_edits: limit must be a positive number of requests (got limit={limit!r})")
    if skip_missing not in (True, False, "parts"):
        raise ValueError(f"read_edits: skip_missing must be True, False or 'parts' (got {skip_missing!r})")


def _no_such_file(source: str) -> str:
    near = difflib.get_close_matches(source, EMBEDDED, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; embedded sets are {', '.join(EMBEDDED)}"
    return f"read_edits: no such file{hint} (got source={source!r})"


def _embedded(name: str, split: str, limit: int | None) -> list[EditRequest]:
    # Drawing a world takes Pillow and time; who reads a file does not need it.
    world = importlib.import_module(f"fastedit.{'smol' if name.startswith('icon-') else 'pocket'}")
    return list(world.edit_set(name, split=split, limit=limit))


def _read_file(
    path: Path, format: str | None, images: str | os.PathLike[str] | None, limit: int | None, skip: SkipMissing
) -> tuple[EditList, list[Problem]]:
    collector = Collector(path)
    raw = read_records(path, collector)
    detection = detect_records(raw)
    if detection is None:
        collector.add(UNKNOWN_FORMAT)
        raise RecordErrors(collector.problems)
    if format is None:
        format = detection.format
    elif format != detection.format and "jsonl" in (format, detection.format):
        collector.add(f"looks like {detection.format}, read as {format}", level="warning")
    if detection.release == "old":
        rule = "older MMEdit release: other targets and 2 text-locality questions; not comparable with the newer one"
        collector.add(rule, level="warning")
    schema, read = _READERS[format]
    requests = _requests(raw, schema, read, path.name, collector)
    skipped: list[str] = []
    missing: dict[str, None] = {}
    if images is not None:
        resolver = _Resolver(os.fspath(images), schema, collector, skip, missing)
        kept: Iterable[EditRequest] = _resolved(requests, resolver, limit, skipped)
    else:
        kept = (edit for _, edit in requests[:limit])
    edits = list(kept)
    # Records in file order, whichever check found the problem.
    collector.problems.sort(key=lambda problem: -1 if problem.index is None else problem.index)
    result = EditList(
        edits,
        source=str(path),
        detection=detection,
        warnings=[problem for problem in collector.problems if problem.level != "error"],
        skipped=skipped,
        missing=missing,
        places={edit.id: (record.index, record.line) for record, edit in requests},
        keys=schema.keys,
    )
    return result, collector.problems


def _requests(
    raw: Iterable[RawRecord],
    schema: Schema,
    read: Callable[[Fields, str], EditRequest | None],
    name: str,
    collector: Collector,
) -> list[tuple[RawRecord, EditRequest]]:
    found: list[tuple[RawRecord, EditRequest]] = []
    ids: dict[str, int] = {}
    for record in raw:
        if not isinstance(record.value, JsonObject):
            collector.add("must be an object", index=record.index, value=record.value, line=record.line)
            continue
        edit = read(Fields(record, record.value, collector, strict=schema.strict), name)
        if edit is None:
            continue
        first = ids.setdefault(edit.id, record.index)
        if first != record.index:
            rule = f"must be unique; record {first} has the same"
            collector.add(rule, index=record.index, field="id", value=edit.id, line=record.line)
        found.append((record, edit))
    return found


def _resolved(
    requests: Iterable[tuple[RawRecord, EditRequest]], resolver: _Resolver, limit: int | None, skipped: list[str]
) -> Iterator[EditRequest]:
    count = 0
    for record, edit in requests:
        if count == limit:
            return
        complete = resolver.request(record, edit)
        if complete is None:
            skipped.append(edit.id)
        else:
            count += 1
            yield complete


class _Resolver:
    """Puts real paths in the place of record paths; reports refused and missing ones."""

    def __init__(
        self, root: str, schema: Schema, collector: Collector, skip: SkipMissing, missing: dict[str, None]
    ) -> None:
        self.root, self.keys, self.collector, self.skip, self.missing = root, schema.keys, collector, skip, missing
        self.known: dict[str, Path | ImageError] = {}

    def request(self, record: RawRecord, edit: EditRequest) -> EditRequest | None:
        """Return the request with real paths, or None where it is left out because a needed image is missing.

        Where nothing is to be left out a missing image is an error, and what the record has besides is still looked at.
        """
        found: dict[str, VisualSource | None] = {
            field: self._find(record, self.keys[field], getattr(edit, field)) for field in IMAGE_FIELDS
        }
        lost = [field for field in IMAGE_FIELDS if getattr(edit, field) is not None and found[field] is None]
        changes: dict[str, object] = dict(found)
        for name in MEMBER_FIELDS:
            members = []
            for position, member in enumerate(getattr(edit, name)):
                # The edit's own image is reported once, in its own field.
                same_image = member.image is not None and member.image == edit.image
                image = found["image"] if same_image else self._find(record, f"{name}[{position}].image", member.image)
                if member.image is None or image is not None:
                    members.append(dataclasses.replace(member, image=image))
                else:
                    lost.append(name)
            changes[name] = tuple(members)
        if lost and self.skip and (self.skip != "parts" or "image" in lost):
            return None
        if "image_locality_image" in lost:
            changes |= {"image_locality_prompt": None, "image_locality_answer": None}
        return dataclasses.replace(edit, **changes)  # type: ignore[arg-type]

    def _find(self, record: RawRecord, field: str, visual: VisualSource | None) -> VisualSource | None:
        """Return the same with real paths, or None after reporting every image that has none."""
        real = {source: self._real(record, field + place, source) for place, source in image_places(visual)}
        return with_images(visual, lambda source: real[source] or source) if visual and all(real.values()) else None

    def _real(self, record: RawRecord, field: str, source: ImageSource) -> Path | None:
        path = str(source)
        found = self.known.get(path)
        if found is None:
            try:
                found = resolve_image(path, self.root)
            except ImageError as error:
                found = error
            self.known[path] = found
        if isinstance(found, Path):
            return found
        lost = isinstance(found, MissingImageError)
        if lost:
            self.missing[path] = None
        if not lost or not self.skip:
            rule = str(found).removeprefix("image path: ").split(" (got ")[0]
            missing = path if lost else ""
            self.collector.add(rule, index=record.index, field=field, value=path, line=record.line, missing=missing)
        return None


def _report(edits: EditList) -> None:
    for problem in edits.warnings[:3]:
        _log.warning("%s", problem)
    if len(edits.warnings) > 3:
        _log.warning("%s: %d warnings in all", edits.source, len(edits.warnings))
    if edits.missing:
        _log.warning(
            "%s: %d of %d records left out, %d image files not found",
            edits.source, len(edits.skipped), len(edits.places), len(edits.missing),
        )  # fmt: skip
