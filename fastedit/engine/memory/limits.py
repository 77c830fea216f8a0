"""How much memory this process may have: of the machine or its container, or of a GPU."""

from __future__ import annotations

from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")
# (limit, use, the entry of memory.stat that counts files which can be dropped), version 2 and version 1
_GROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def available_bytes(device: torch.device) -> int | None:
    """Return the bytes that the process may hold on a device in all, what it holds now included; None if unknown.

    On the host the least of what the machine has available and what the control group's limit leaves.
    """
    if device.type == "cuda":
        free, _total = torch.cuda.mem_get_info(device)
        return int(free) + int(torch.cuda.memory_reserved(device))
    if device.type != "cpu":
        return None
    machine = _field(Path("/proc/meminfo"), "MemAvailable")
    if machine is None:
        return None
    held = process_bytes("RssAnon")
    return min([machine + held, *_group_limits(_CGROUP, held)])


def process_bytes(name: str) -> int:
    """Return a field of this process's status in bytes ("VmRSS", "RssAnon", "VmHWM"); 0 where there is none."""
    return _field(Path("/proc/self/status"), name) or 0


def _group_limits(root: Path, held: int) -> list[int]:
    """What the limits of the control group allow the process, by what others of the group use."""
    found = []
    for limit, use, stat, dropped in _GROUPS:
        try:
            text = (root / limit).read_text(encoding="ascii").strip()
            used = int((root / use).read_text(encoding="ascii"))
            lines = (root / stat).read_text(encoding="ascii").split("\n")
        except (OSError, ValueError):
            continue
        if not text.isdigit():
            continue
        counts = dict(line.split() for line in lines if len(line.split()) == 2)
        found.append(max(0, int(text) - (used - int(counts.get(dropped, 0))) + held))
    return found


def _field(path: Path, name: str) -> int | None:
    """A line ``name:  123 kB`` of a file of the kernel's, in bytes."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(name + ":")]
    return int(found[0]) << 10 if found else None
