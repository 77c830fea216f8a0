"""Programs in processes of their own for the time of one import: a host imports, and is forked for every program.

Each begins with what its host has imported and nothing else: no model, no setting, no state of the tests or of programs
before it. What has to be there as Python starts (encodings of streams, threads of libraries) is a host's environment.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
#: For a program that hangs, seconds.
PATIENCE_S = 600
#: What programs that edit import, and what others have that know nothing of fastedit.
EDITING = """
import fastedit, fastedit.cli, fastedit.cli.edit, fastedit.cli.inputs, fastedit.cli.compare, fastedit.cli.train
import fastedit.cli.undo, typer.rich_utils
fastedit.plan_memory("random:llava-tiny", method="lora")
"""
OTHERS = """
import peft, PIL.Image, torch, transformers.pipelines
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
assert "fastedit" not in sys.modules
"""

_HOST = """
import gc, json, os, signal, sys, traceback
# Ignored where tests were started in the background, and so by every program
signal.signal(signal.SIGINT, signal.default_int_handler)
exec(sys.argv[1])
gc.freeze()
print("ready", flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, path in enumerate((os.devnull, asked["out"], asked["err"])):
            opened = os.open(path, os.O_RDWR)
            os.dup2(opened, number)
            os.close(opened)
        os.chdir(asked["cwd"])
        os.environ.clear()
        os.environ.update(asked["environment"])
        sys.argv[:] = asked["arguments"]
        status = 0
        try:
            exec(compile(asked["code"], asked["arguments"][0], "exec"), {"__name__": "__main__"})
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
            if not isinstance(ended.code, int) and ended.code is not None:
                print(ended.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Program:
    """One that runs: ``pid``, and what it wrote once it has ended."""

    def __init__(self, host: Host, pid: int, files: tuple[IO[bytes], IO[bytes]], arguments: list[str]) -> None:
        self.host, self.pid, self.arguments, self._files = host, pid, arguments, files

    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return not select.select([self.host.process.stdout], [], [], 0)[0]

    def wait(self) -> subprocess.CompletedProcess[str]:
        """Its exit status, and what it wrote."""
        if not select.select([self.host.process.stdout], [], [], PATIENCE_S)[0]:
            os.kill(self.pid, signal.SIGKILL)
        status = int(self.host.told())
        texts = []
        for file in self._files:
            texts.append(Path(file.name).read_text(errors="replace"))
            file.close()
        return subprocess.CompletedProcess(self.arguments, status, *texts)


class Host:
    """A process that has imported something and waits for programs, one at a time.

    Args:
        imports: code that is run once. environment: of the process, beside that of the tests.
    """

    def __init__(self, imports: str, environment: Mapping[str, str]) -> None:
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment, "PYTHONPATH": os.pathsep.join(paths)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _HOST, imports], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
            env=self.environment,
        )  # fmt: skip
        assert self.told() == "ready"

    def told(self) -> str:
        """The next line that it says."""
        assert self.process.stdout is not None
        line: str = self.process.stdout.readline().decode().strip()
        assert line, "the host of programs has ended"
        return line

    def start(
        self, code: str, *arguments: Any, cwd: Path | None = None, name: str = "-c", **environment: str
    ) -> Program:
        """Run code as ``python -c`` does."""
        files = tempfile.NamedTemporaryFile(), tempfile.NamedTemporaryFile()  # noqa: SIM115
        words = [name, *map(str, arguments)]
        asked = {
            "code": code, "arguments": words, "cwd": str(cwd or ROOT), "out": files[0].name, "err": files[1].name,
            "environment": {**self.environment, **environment},
        }  # fmt: skip
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asked).encode() + b"\n")
        return Program(self, int(self.told()), files, words)

    def run(self, code: str, *arguments: Any, **given: Any) -> subprocess.CompletedProcess[str]:
        """Run code to its end."""
        return self.start(code, *arguments, **given).wait()


@cache
def _host(imports: str, environment: tuple[tuple[str, str], ...]) -> Host:
    return Host(imports, dict(environment))


def host(imports: str = EDITING, environment: Mapping[str, str] | None = None) -> Host:
    """The host of these imports in this process; it ends with it."""
    return _host(imports, tuple(sorted((environment or {}).items())))
