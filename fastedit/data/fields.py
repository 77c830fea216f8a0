"""One JSON object read field by field. What is wrong becomes a problem; nothing is raised here."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator

from fastedit.data.files import JsonObject, RawRecord
from fastedit.data.images import RecordPath, path_rule
from fastedit.data.problems import Collector
from fastedit.visuals import Video, VisualSource

#: Longest text of a field, in characters. The longest public one has 1,024.
MAX_TEXT = 20_000
#: Longest list of queries, probes or tags in one record.
MAX_MEMBERS = 1_000


def text_rule(text: str, *, empty: bool = False) -> str:
    """Return the rule that a text breaks, or ""."""
    if not empty and not text.strip():
        return "must not be empty"
    if len(text) > MAX_TEXT:
        return f"must not be longer than {MAX_TEXT} characters (has {len(text)})"
    if "\x00" in text:
        return "must not hold a NUL character"
    # A lone surrogate can be written in JSON ("\\ud800") and is no text: it cannot be encoded or tokenized.
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "must be valid Unicode, without lone surrogates"
    return ""


class Fields:
    """The fields of one record, or of an object inside it.

    Args:
        record: where the object stands, for the problems.
        value: the object.
        collector: receives the problems.
        path: where in the record the object stands, for example "probes[2]"; "" for the record itself.
        strict: every field that is asked for must be present, if only as null.
    """

    def __init__(
        self, record: RawRecord, value: JsonObject, collector: Collector, path: str = "", *, strict: bool = False
    ) -> None:
        self.record, self.value, self.collector, self.path, self.strict = record, value, collector, path, strict
        self.failed = False
        for key in value.repeated:
            self.problem("must occur once in an object", key)

    def problem(self, rule: str, key: str = "", value: object = None, *, level: str = "error") -> None:
        """Report a problem with the field `key` of this object."""
        where = f"{self.path}.{key}" if self.path and key else self.path or key
        self.failed = self.failed or level == "error"
        self.collector.add(rule, index=self.record.index, field=where, value=value, level=level, line=self.record.line)

    def unknown(self, known: Collection[str]) -> None:
        """Report fields that no reader looks at, as warnings: a typing error must not be silent."""
        for key in self.value:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                self.problem(f"unknown field, ignored{hint}", key[:40], level="warning")

    def _get(self, key: str, *, required: bool) -> object:
        """Return the value, None where it is absent or null."""
        if key not in self.value:
            if required or self.strict:
                rule = "must be present" if required else "must be present (null where the record has none)"
                self.problem(rule, key)
            return None
        value = self.value[key]
        if value is None and required:
            self.problem("must not be null", key)
        return value

    def text(self, key: str, *, required: bool = False, empty: bool = False, strip: bool = False) -> str | None:
        """Return a text field; `strip` removes white space around it, `empty` allows ""."""
        value = self._get(key, required=required)
        if value is None:
            return None
        if not isinstance(value, str):
            self.problem("must be text", key, value)
            return None
        rule = text_rule(value, empty=empty)
        if rule:
            self.problem(rule, key, value)
            return None
        return value.strip() if strip else value

    def image(self, key: str, *, required: bool = False) -> VisualSource | None:
        """Return what an image field holds: a path, a list of paths, or {"video": [paths], "fps": number}.

        The text of every path stays below the image root.
        """
        value = self._get(key, required=required)
        if value is None:
            return None
        if isinstance(value, JsonObject):
            return self._video(key, value)
        if not isinstance(value, list):
            return self._path_at(key, value)
        paths = self._paths(key, value)
        return None if paths is None else paths[0] if len(paths) == 1 else paths

    def _video(self, key: str, value: JsonObject) -> Video | None:
        inner = Fields(self.record, value, self.collector, self._path(key))
        frames, fps = value.get("video"), value.get("fps", 1.0)
        paths = None
        if isinstance(frames, list):
            paths = inner._paths("video", frames)
        else:
            inner.problem("must be a list of paths, one a frame", "video", frames)
        if isinstance(fps, bool) or not isinstance(fps, (int, float)) or not 0 < fps < float("inf"):
            inner.problem("must be a finite number above 0", "fps", fps)
        inner.unknown(("video", "fps"))
        self.failed = self.failed or inner.failed
        return None if paths is None or inner.failed else Video(paths, float(fps))  # type: ignore[arg-type]

    def _paths(self, key: str, values: list[object]) -> tuple[RecordPath, ...] | None:
        """The paths of a list, or None after reporting what is wrong with it."""
        if not values or len(values) > MAX_MEMBERS:
            self.problem(f"must hold 1 to {MAX_MEMBERS} paths", key, values)
            return None
        paths = [self._path_at(f"{key}[{number}]", value) for number, value in enumerate(values)]
        known = tuple(path for path in paths if path is not None)
        return known if len(known) == len(paths) else None

    def _path_at(self, key: str, value: object) -> RecordPath | None:
        if not isinstance(value, str):
            self.problem("must be a path as text", key, value)
            return None
        rule = path_rule(value)
        if rule:
            self.problem(rule, key, value)
            return None
        return RecordPath(value)

    def members(self, key: str) -> Iterator[Fields]:
        """Yield the objects of a list field, which may be absent or null."""
        for position, value in enumerate(self._list(key)):
            if isinstance(value, JsonObject):
                member = Fields(self.record, value, self.collector, f"{self._path(key)}[{position}]")
                yield member
                self.failed = self.failed or member.failed
            else:
                self.problem("must be an object", f"{key}[{position}]", value)

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a list of texts, which may be absent or null."""
        found = []
        for position, value in enumerate(self._list(key)):
            rule = text_rule(value) if isinstance(value, str) else "must be text"
            if rule or not isinstance(value, str):
                self.problem(rule, f"{key}[{position}]", value)
            else:
                found.append(value)
        return tuple(found)

    def inner(self, key: str) -> Fields | None:
        """Return the object at `key`, which must be present."""
        value = self._get(key, required=True)
        if value is None:
            return None
        if not isinstance(value, JsonObject):
            self.problem("must be an object", key, value)
            return None
        return Fields(self.record, value, self.collector, self._path(key))

    def _path(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def _list(self, key: str) -> list[object]:
        value = self.value.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            self.problem("must be a list", key, value)
            return []
        if len(value) > MAX_MEMBERS:
            self.problem(f"must not have more than {MAX_MEMBERS} members", key, value)
            return []
        return value
