"""Run many command lines, each in a process of its own, for the time of one import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Imports once, then forks for every command line; whatever leaves main() is shown as Python would show it.
_DRIVER = """
import json, os, sys, tempfile, traceback
import fastedit
from fastedit.cli import main
import fastedit.cli.edit, fastedit.cli.inputs, fastedit.cli.compare, fastedit.cli.train, fastedit.cli.undo
import gc, typer.rich_utils
fastedit.plan_memory("random:llava-tiny", method="lora")
gc.freeze()
results = []
for arguments in json.load(sys.stdin):
    out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
    child = os.fork()
    if child == 0:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.argv = ["fastedit", *arguments]
        code = 70
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    _, status = os.waitpid(child, 0)
    texts = []
    for file in (out, err):
        file.seek(0)
        texts.append(file.read().decode(errors="replace"))
    results.append([os.waitstatus_to_exitcode(status), *texts])
json.dump(results, sys.stdout)
"""


@dataclass(frozen=True)
class Done:
    """How a command line ended."""

    status: int
    out: str
    err: str


def run_all(
    commands: Sequence[Sequence[str]], folder: Path, environment: Mapping[str, str] | None = None
) -> list[Done]:
    """Run command lines one after another in ``folder``."""
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100", **(environment or {})}
    settings["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).resolve().parents[2]), settings.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", _DRIVER],
        input=json.dumps([list(command) for command in commands]),
        capture_output=True, text=True, cwd=folder, env=settings, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [Done(*each) for each in json.loads(done.stdout)]
