"""Peak memory of one implementation: what another one left behind does not count.

On a CPU in a process of its own. On a GPU torch's allocator counts every byte, so the model that was timed will do.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    import _package  # noqa: F401

from benchmarks.cases import Case, edits_of, one_batch
from benchmarks.variants import as_run, is_variant

if TYPE_CHECKING:
    from fastedit.backbone import EditableModel

ROOT = Path(__file__).resolve().parents[1]
#: Enough for every buffer of a fit to exist: memory does not grow with further steps.
STEPS = 2


@dataclass(frozen=True)
class PeakMemory:
    """Mebibytes.

    Args:
        peak_mib: highest resident memory of the process (of the device, on a GPU), model and libraries included.
        working_mib: that minus what was held once the model was loaded.
    """

    peak_mib: float
    working_mib: float


def measure(case: Case, implementation: str, *, timeout_s: float = 600.0) -> PeakMemory:
    """Run one batch of a case's edits in a fresh process and return its peak memory.

    Raises:
        RuntimeError: the process failed; its last words.
    """
    import torch

    command = [sys.executable, str(Path(__file__).resolve()), implementation, str(torch.get_num_threads())]
    text = json.dumps(asdict(case))
    done = subprocess.run(command, input=text, capture_output=True, text=True, cwd=ROOT, timeout=timeout_s, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"memory: {implementation} ended with {done.returncode}: {done.stderr.strip()[-400:]}")
    return PeakMemory(**json.loads(done.stdout.strip().splitlines()[-1]))


def _worker(case: Case, implementation: str) -> PeakMemory:
    import fastedit
    from benchmarks import implementations

    small = _one_batch(case, implementation)
    edits = edits_of(small)
    model = fastedit.load(small.model, **as_run(case, implementation).loading())
    if model.device.type == "cuda":
        return on_device(model, case, implementation)
    before = _status_mib("VmRSS")
    _reset_peak()
    implementations.run(implementation, model, edits, small)
    peak = _status_mib("VmHWM")
    return PeakMemory(peak, max(0.0, peak - before))


def _one_batch(case: Case, implementation: str) -> Case:
    """One batch of the engine; one edit is as much as the others ever hold."""
    from benchmarks.implementations import ENGINE

    own = as_run(case, implementation)
    batched = implementation == ENGINE or is_variant(implementation)
    count = one_batch(own) if batched else 1
    return replace(case, edits=count, steps=min(case.steps, STEPS))


def on_device(model: EditableModel, case: Case, implementation: str) -> PeakMemory:
    """Run one batch of a case's edits on a model that is on a GPU and return the peak of that GPU's memory."""
    import torch

    from benchmarks import implementations

    small = _one_batch(case, implementation)
    edits = edits_of(small)
    implementations.forget(model)
    gc.collect()
    before = torch.cuda.memory_allocated(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    implementations.run(implementation, model, edits, small)
    peak = torch.cuda.max_memory_allocated(model.device)
    return PeakMemory(peak / 2**20, (peak - before) / 2**20)


def _reset_peak() -> None:
    """Let the kernel forget the peak reached while loading, where it can (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def _status_mib(name: str) -> float:
    """A field of /proc/self/status in MiB; elsewhere the peak so far."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith(name + ":"):
                return float(line.split()[1]) / 1024
    import resource

    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def main() -> None:
    """Worker: a case as JSON on standard input, the answer as JSON on standard output."""
    import torch

    torch.set_num_threads(int(sys.argv[2]))
    data = json.load(sys.stdin)
    data["baselines"] = tuple(data["baselines"])
    print(json.dumps(asdict(_worker(Case(**data), sys.argv[1]))))


if __name__ == "__main__":
    main()
