"""Chat templates of strangers: rendered once apart before they are trusted, and never longer than some seconds."""

from __future__ import annotations

import contextlib
import ctypes
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

#: Time for one rendering, and memory and text of a rendering apart: filling it takes a part of the time alone.
SECONDS, BYTES, MOST_TEXT = 2, 1 << 28, 1 << 20


class TemplateTooLong(BaseException):
    """Raised inside a rendering that takes too long; no handler of the template's own stands in its way."""


def check_template_ends(template: str, chats: Sequence[Any], variables: Mapping[str, Any]) -> None:
    """Refuse a chat template that does not end, or fills the memory, in a process of its own.

    Args:
        template: Jinja text. chats: messages to render, one rendering each. variables: besides.
    Raises:
        ValueError: names the limit that it did not keep.
    """
    task = {
        "template": template,
        "chats": list(chats),
        "variables": {name: str(value) for name, value in variables.items()},
        "seconds": SECONDS,
        "bytes": BYTES,
    }
    script = Path(__file__).with_name("render_apart.py")
    try:
        ended = subprocess.run(
            [sys.executable, "-I", str(script)],
            input=json.dumps(task).encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # Where processes have no limit on their time of computing; a busy machine is no reason
            timeout=6 * SECONDS,
            check=False,
        ).returncode
    except subprocess.TimeoutExpired:
        ended = -1
    except OSError:
        # No interpreter to start, as inside some programs that embed one: the limit on time still holds
        return
    if ended == 3:
        raise ValueError(f"load: the chat template must need less than {BYTES >> 20} MiB (got {_shown(template)})")
    if ended != 0:
        raise ValueError(f"load: the chat template must end within {SECONDS} s (got {_shown(template)})")


def rendered(processor: Any, chat: Sequence[Any], template: str) -> str:
    """Return the text that a processor makes of a chat, for generation behind it.

    Raises:
        ValueError: the template takes too long, makes too much text, or fails.
    """
    try:
        with _within(SECONDS):
            text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    except TemplateTooLong:
        raise ValueError(f"the chat template must end within {SECONDS} s (got {_shown(template)})") from None
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"the chat template must render a question (got {type(error).__name__}: {reason:.200})"
        ) from error
    if not isinstance(text, str) or len(text) > MOST_TEXT + 16 * len(json.dumps(chat)):
        got = f"{len(text)} characters" if isinstance(text, str) else type(text).__name__
        raise ValueError(f"the chat template must make a prompt of at most {MOST_TEXT} characters (got {got})")
    return text


def _shown(template: str) -> str:
    """The beginning of a template."""
    return f"template={template!r:.100}"


class _Watch:
    """One thread that stops renderings which take too long; it sleeps while there are none.

    A rendering costs two entries in a table; nothing is started or traced for it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._ends: dict[int, float] = {}
        self._thread: threading.Thread | None = None

    def begin(self, thread: int, seconds: float) -> None:
        """Stop what a thread does once it has computed for so long, unless it says that it is done."""
        with self._lock:
            self._ends[thread] = _computed(thread) + seconds
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="fastedit-templates", daemon=True)
                self._thread.start()
        if not self._wake.is_set():
            self._wake.set()

    def done(self, thread: int) -> bool:
        """Say that a thread is done; False if it has been stopped, and an error may be on its way to it."""
        with self._lock:
            return self._ends.pop(thread, None) is not None

    def _run(self) -> None:
        while True:
            self._wake.wait()
            # Long after the last rendering began, sleep again
            time.sleep(SECONDS / 8)
            with self._lock:
                for thread, end in list(self._ends.items()):
                    if _computed(thread) >= end:
                        del self._ends[thread]
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(
                            ctypes.c_ulong(thread), ctypes.py_object(TemplateTooLong)
                        )
                if not self._ends:
                    self._wake.clear()


_WATCH = _Watch()


def _computed(thread: int) -> float:
    """Seconds that a running thread has computed, which waiting for a busy machine does not add to."""
    if hasattr(time, "pthread_getcpuclockid"):
        return time.clock_gettime(time.pthread_getcpuclockid(thread))
    return time.monotonic()


@contextlib.contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Raise TemplateTooLong inside the block once it has taken so long."""
    thread = threading.get_ident()
    try:
        # Inside: an interrupt that comes behind it must not leave the watch running
        _WATCH.begin(thread, seconds)
        yield
    finally:
        if not _WATCH.done(thread):
            # Stopped at the very end: the error may not have come yet, and must not come later
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), None)
