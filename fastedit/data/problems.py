"""What is wrong with records and images, as data: problems are collected, then raised together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

#: Longest piece of an offending value that a problem keeps.
SHOWN = 80
#: Problems that the message of an error lists; the rest are counted.
LISTED = 20


def shorten(value: object) -> str:
    """Return a one-line picture of `value` of at most about `SHOWN` characters, whatever its type and size."""
    # repr of a long text or a deep list is not built: cut first, then picture.
    if isinstance(value, str):
        return repr(value if len(value) <= SHOWN else value[:SHOWN] + "…")
    if isinstance(value, (dict, list, tuple)):
        return f"{type(value).__name__} of {len(value)}"
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return f"int of {value.bit_length()} bits"
    return repr(value)[:SHOWN]


@dataclass(frozen=True, slots=True)
class Problem:
    """One broken rule in one place.

    Args:
        file: the file as it was named by the caller.
        index: record number, from 0; None for the file as a whole.
        field: path of the field inside the record, for example "port_new[0].port_q"; "" for the whole record.
        value: the offending value, shortened; "" where there is none.
        rule: the rule that was broken.
        level: "error", or "warning" for what is reported and does not stop reading.
        line: line number in the file, from 1, where records are lines.
        missing: image path below the image root that was not found, else "".
        id: of the record, where it has one.
        listed: whether `file` names a list of edits that was made in Python, and `index` a place in it.
    """

    file: str
    index: int | None
    field: str
    value: str
    rule: str
    level: str = "error"
    line: int | None = None
    missing: str = ""
    id: str = ""
    listed: bool = False

    def __str__(self) -> str:
        place = self.file
        if self.index is not None:
            place += f"[{self.index}]" if self.listed else f" record {self.index}"
        marks = [f"line {self.line}"] if self.line is not None else []
        marks += [f"id {shorten(self.id)}"] if self.id else []
        if marks:
            place += f" ({', '.join(marks)})"
        if self.field:
            place += f", {self.field}"
        got = f" (got {self.value})" if self.value else ""
        return f"{place}: {self.rule}{got}"


class RecordErrors(ValueError):
    """Everything that is wrong with the records of a file, raised once.

    Attributes:
        problems: errors and warnings in file order.
        missing: image paths that were not found below the image root, each once, in file order.
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems: list[Problem] = list(problems)
        self.missing: list[str] = list(dict.fromkeys(p.missing for p in self.problems if p.missing))
        super().__init__(_summary(self.problems, self.missing))

    @property
    def errors(self) -> list[Problem]:
        """The problems that stopped reading."""
        return [problem for problem in self.problems if problem.level == "error"]

    @property
    def warnings(self) -> list[Problem]:
        """The problems that alone would not have stopped reading."""
        return [problem for problem in self.problems if problem.level != "error"]


def _summary(problems: Sequence[Problem], missing: Sequence[str]) -> str:
    errors = [problem for problem in problems if problem.level == "error"]
    records = {(problem.file, problem.index) for problem in errors if problem.index is not None}
    head = f"{len(errors)} {'problem' if len(errors) == 1 else 'problems'}"
    if records:
        head += f" in {len(records)} {'record' if len(records) == 1 else 'records'}"
    if missing:
        head += f", {len(missing)} image {'file' if len(missing) == 1 else 'files'} not found"
    lines = [head, *(f"  {problem}" for problem in errors[:LISTED])]
    if len(errors) > LISTED:
        lines.append(f"  and {len(errors) - LISTED} more (all of them are in .problems)")
    return "\n".join(lines)


class ImageError(ValueError):
    """An image source that is refused or cannot be decoded."""


class MissingImageError(ImageError, FileNotFoundError):
    """An image file that does not exist."""

    def __str__(self) -> str:
        # OSError would print its errno fields.
        return str(self.args[0]) if self.args else ""


class Collector:
    """Collects the problems of one file."""

    def __init__(self, file: str | Path) -> None:
        self.file = str(file)
        self.problems: list[Problem] = []

    def add(
        self,
        rule: str,
        *,
        index: int | None = None,
        field: str = "",
        value: object = None,
        level: str = "error",
        line: int | None = None,
        missing: str = "",
        id: str = "",
        listed: bool = False,
    ) -> None:
        """Add one problem. `value` is shortened; None means that there is no value to show."""
        shown = "" if value is None else shorten(value)
        self.problems.append(Problem(self.file, index, field, shown, rule, level, line, missing, id, listed))

    @property
    def failed(self) -> bool:
        """Whether an error, not only warnings, was collected."""
        return any(problem.level == "error" for problem in self.problems)

    def stop_if_failed(self) -> None:
        """Raise everything that was collected if any of it is an error."""
        if self.failed:
            raise RecordErrors(self.problems)
