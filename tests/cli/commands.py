"""Run many command lines, each in a process of its own, for the time of one import."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.programs import EDITING, host

MAIN = "from fastedit.cli import main; main()"


@dataclass(frozen=True)
class Done:
    """How a command line ended."""

    status: int
    out: str
    err: str


def run_all(
    commands: Sequence[Sequence[str]], folder: Path, environment: Mapping[str, str] | None = None
) -> list[Done]:
    """Run command lines one after another in ``folder``; whatever leaves main() is shown as Python would show it."""
    of_these = host(EDITING, {"COLUMNS": "100", **(environment or {})})
    done = [of_these.run(MAIN, *command, cwd=folder, name="fastedit") for command in commands]
    return [Done(each.returncode, each.stdout, each.stderr) for each in done]
