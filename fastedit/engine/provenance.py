"""What a result must say about where it came from, so that it can be repeated and compared."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from fastedit.backbone import EditableModel
from fastedit.backbone.prompts import QUESTION_FIELD

PACKAGES = ("fastedit-mllm", "torch", "transformers", "triton", "bitsandbytes", "numpy")


def versions() -> dict[str, str]:
    """Installed versions of the packages that matter; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Processor, cores, memory and accelerator of this machine."""
    import torch

    described: dict[str, Any] = {
        "system": platform.system(),
        "arch": platform.machine(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name()
    return described


def commit() -> str:
    """The commit of the working tree that this package lies in; "" for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def utc_now() -> str:
    """The time in ISO 8601, UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def prompts(model: EditableModel) -> dict[str, Any]:
    """What is sent to the model for a question: the texts, with "{}" where the question stands, and their template.

    Returns:
        template: the text of a prompt that has an image, as ``load(template=)`` takes it.
        text_template: of one that has none.
        template_source: "given", "processor" (its chat template) or "none".
        template_sha256: of the given or the processor's template, all of it.
    """
    of_processor = "none" if model.prompts.template_text == QUESTION_FIELD else "processor"
    return {
        "template": model.prompts.text(QUESTION_FIELD, True),
        "text_template": model.prompts.text(QUESTION_FIELD, False),
        "template_source": of_processor if model.template is None else "given",
        "template_sha256": model.prompts.template_hash,
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
