"""Render a chat template in a process of its own: run as a script, without the package, with a limit on memory.

Reads {"template", "chats", "variables", "seconds", "bytes"} in JSON from standard input and ends with status 0 whatever
the template does, if it ends at all: what it renders to, or fails with, is seen where it is rendered in earnest.
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any


def limit(seconds: int, size: int) -> None:
    """Let this process use no more than so much time and memory, where the system can.

    The time is the process's own: pages that the kernel clears for it count only towards three times as much, or a
    template that fills the memory of a slow machine would end by the clock.
    """
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource
        import signal

        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        resource.setrlimit(resource.RLIMIT_CPU, (3 * seconds, 3 * seconds + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)


def render(task: dict[str, Any]) -> None:
    """Render each chat once, in the sandbox that transformers renders in."""
    from jinja2 import ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """The block in which transformers marks the assistant's tokens."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            """Parse the block into its body."""
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def stop(message: str) -> None:
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value)
    environment.globals |= {"raise_exception": stop, "strftime_now": lambda form: "2026"}
    template = environment.from_string(task["template"])
    for chat in task["chats"]:
        template.render(messages=chat, add_generation_prompt=True, **task["variables"])


if __name__ == "__main__":
    given = json.loads(sys.stdin.buffer.read())
    limit(given["seconds"], given["bytes"])
    try:
        render(given)
    except MemoryError:
        sys.exit(3)
    except Exception:
        sys.exit(0)
