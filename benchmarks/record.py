"""The row: one measured number with everything needed to repeat and compare it. Rows are appended, never changed."""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import subprocess
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any

#: Where rows are kept; FASTEDIT_RESULTS names another folder.
RESULTS = Path(os.environ.get("FASTEDIT_RESULTS") or Path(__file__).resolve().parent / "results")

#: Unit of every metric; seconds of a phase are ``phase_<name>_s``.
METRICS: Mapping[str, str] = {
    "edits_per_s": "edits/s",
    "run_s": "s",
    "load_s": "s",
    "first_loss": "nat",
    "last_loss": "nat",
    "peak_memory_mib": "MiB",
    "working_memory_mib": "MiB",
    "necessary_gflop": "GFLOP",
    "nfu": "1",
    "matmul_peak_gflop_per_s": "GFLOP/s",
    "copy_bandwidth_gib_per_s": "GiB/s",
    "copy_fraction": "1",
    "matmul_fraction": "1",
    "parameters": "1",
    "token_accuracy": "1",
    "rss_mib": "MiB",
    "rate_drift": "1",
    "rss_drift": "1",
    "open_s": "s",
    "state_s": "s",
    "files": "1",
    "disk_mib": "MiB",
    "delta_bytes": "B",
    "serve_s": "s",
    "held": "1",
    "reworded": "1",
    "tries": "1",
    "kills": "1",
    "lost": "1",
    "half": "1",
    "unequal": "1",
    "problems": "1",
    "disk_full": "1",
}
#: A score, of the unedited model or under a protocol; ``_low`` and ``_high`` are the bounds of its 95 % interval.
SCORE_METRIC = re.compile(r"(?:base|legacy|strict)_[a-z0-9_]+")
PHASE_METRIC = re.compile(r"phase_[a-z0-9_]+_s")
#: Largest relative difference between a stored ratio and the ratio of the stored values.
RATIO_TOLERANCE = 1e-6


class RowError(ValueError):
    """Rows that break a rule; the message names every rule that was broken and the row."""


@dataclass(frozen=True)
class Row:
    """One measured number.

    Args:
        case: name of what was run.
        implementation: "engine", "plain_loop", "peft", "engine@float32" ... or "machine" (numbers of the machine and of
            the work itself).
        metric, unit: see METRICS.
        value: median over repeats; p20, p80: percentiles over repeats.
        baseline: implementation that ``ratio`` = value / (value of the baseline's row of the same run) refers to; both
            None where nothing is compared.
        config: settings of the case, the same for every implementation of a run.
        machine, versions, commit, seed, time: provenance; time is ISO 8601 in UTC and shared by the rows of one run.
    """

    case: str
    implementation: str
    metric: str
    unit: str
    value: float
    p20: float
    p80: float
    baseline: str | None
    ratio: float | None
    config: Mapping[str, Any]
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    commit: str
    seed: int
    time: str

    def key(self) -> tuple[str, str, str, str, int, str]:
        """What a row shares with the baseline row of its run."""
        config = json.dumps(self.config, sort_keys=True)
        return (self.case, self.metric, config, self.commit, self.seed, self.time)


_EDITS = re.compile(r".*/edits=(\d+)(?:/.*)?")


def edits_of(row: Row) -> int:
    """How many edits a run of the row's implementation made; 0 where a row is not about edits."""
    named = _EDITS.fullmatch(row.implementation)
    return int(named[1]) if named else int(row.config.get("edits", 0))


def quantile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between order statistics, as numpy's default."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, p20 and p80."""
    return median(values), quantile(values, 0.2), quantile(values, 0.8)


def row_problems(data: Mapping[str, Any]) -> list[str]:
    """Every rule that one row, as plain values, breaks; empty when it is sound."""
    names = {field.name for field in fields(Row)}
    problems = [f"{name} is missing" for name in sorted(names - set(data))]
    problems += [f"{name} is not a field" for name in sorted(set(data) - names)]
    if problems:
        return problems
    for name in ("case", "implementation", "metric", "unit", "commit", "time"):
        if not isinstance(data[name], str) or (not data[name] and name != "commit"):
            problems.append(f"{name} is text (got {name}={data[name]!r})")
    for name in ("config", "machine", "versions"):
        if not isinstance(data[name], Mapping):
            problems.append(f"{name} is a mapping (got {type(data[name]).__name__})")
    if not isinstance(data["seed"], int) or isinstance(data["seed"], bool):
        problems.append(f"seed is an integer (got seed={data['seed']!r})")
    return problems or _metric_problems(data) + _number_problems(data) + _time_problems(data["time"])


def unit_of(metric: str) -> str:
    """The unit of a metric: seconds of a phase, 1 of a score."""
    return METRICS.get(metric) or ("s" if PHASE_METRIC.fullmatch(metric) else "1")


def _metric_problems(data: Mapping[str, Any]) -> list[str]:
    metric, unit = data["metric"], data["unit"]
    if metric not in METRICS and not PHASE_METRIC.fullmatch(metric) and not SCORE_METRIC.fullmatch(metric):
        known = f"{', '.join(METRICS)}, phase_<name>_s, legacy_<score> or strict_<score>"
        return [f"metric is one of {known} (got metric={metric!r})"]
    wanted = unit_of(metric)
    return [] if unit == wanted else [f"unit of {metric} is {wanted!r} (got unit={unit!r})"]


def _number_problems(data: Mapping[str, Any]) -> list[str]:
    problems = []
    for name in ("value", "p20", "p80"):
        number = data[name]
        if not isinstance(number, (int, float)) or isinstance(number, bool) or not math.isfinite(number) or number < 0:
            problems.append(f"{name} is a finite number of at least 0 (got {name}={number!r})")
    if not problems and not data["p20"] <= data["value"] <= data["p80"]:
        problems.append(f"p20 <= value <= p80 (got {data['p20']!r}, {data['value']!r}, {data['p80']!r})")
    baseline, ratio = data["baseline"], data["ratio"]
    if (baseline is None) != (ratio is None):
        problems.append(f"baseline and ratio go together (got baseline={baseline!r}, ratio={ratio!r})")
    elif baseline is not None:
        if not isinstance(baseline, str) or baseline == data["implementation"]:
            problems.append(f"baseline names another implementation (got baseline={baseline!r})")
        if not isinstance(ratio, (int, float)) or isinstance(ratio, bool) or not (math.isfinite(ratio) and ratio > 0):
            problems.append(f"ratio is a finite number above 0 (got ratio={ratio!r})")
    return problems


def _time_problems(text: str) -> list[str]:
    try:
        stamp = datetime.fromisoformat(text)
    except ValueError:
        return [f"time is ISO 8601 (got time={text!r})"]
    return [] if stamp.utcoffset() == timedelta(0) else [f"time is in UTC (got time={text!r})"]


def set_problems(rows: Sequence[Row]) -> list[str]:
    """Rules over rows that are written together: a ratio is there with its baseline row, and is their ratio."""
    values = {(row.key(), row.implementation): row.value for row in rows}
    problems = []
    if len(values) != len(rows):
        problems.append(
            f"a run has one row per case, implementation and metric (got {len(rows) - len(values)} doubles)"
        )
    for row in rows:
        if row.baseline is None or row.ratio is None:
            continue
        name = f"{row.case}/{row.implementation}/{row.metric}"
        base = values.get((row.key(), row.baseline))
        if base is None:
            problems.append(f"{name}: a ratio needs its baseline's row of the same run (got no {row.baseline!r} row)")
        elif base == 0 or abs(row.ratio * base - row.value) > RATIO_TOLERANCE * row.value:
            problems.append(f"{name}: ratio is value / baseline value (got {row.ratio!r}, {row.value!r} / {base!r})")
    return problems


def from_plain(data: Mapping[str, Any]) -> Row:
    """A row from plain values.

    Raises:
        RowError: every rule it breaks.
    """
    problems = row_problems(data)
    if problems:
        raise RowError(f"row: {'; '.join(problems)}")
    return Row(**data)


def check(rows: Iterable[Row]) -> list[Row]:
    """The rows, when every one of them and the set is sound.

    Raises:
        RowError: every broken rule, with the row's number.
    """
    listed = list(rows)
    problems = [f"row {i}: {problem}" for i, row in enumerate(listed) for problem in row_problems(asdict(row))]
    problems = problems or set_problems(listed)
    if problems:
        raise RowError("rows: " + "; ".join(problems))
    return listed


def with_ratio(row: Row, baseline: Row) -> Row:
    """The row with its ratio to the row of a baseline."""
    return replace(row, baseline=baseline.implementation, ratio=row.value / baseline.value)


def stored(machine: Mapping[str, Any]) -> Path:
    """Return the file that rows of a machine are stored in."""
    return RESULTS / f"{device_name(machine)}.jsonl.gz"


def packed(text: str, path: Path) -> bytes:
    """What a file holds that is to hold the text: compressed if its name ends in ``.gz``, the same text alike."""
    return gzip.compress(text.encode(), mtime=0) if path.suffix == ".gz" else text.encode()


def unpacked(path: Path) -> str:
    """Return the text that a file holds, see ``packed``.

    Raises:
        FileNotFoundError: no such file.
        RowError: a broken archive.
    """
    try:
        return (gzip.decompress if path.suffix == ".gz" else bytes)(path.read_bytes()).decode()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise RowError(f"{path.name}: a whole gzip archive ({error})") from None


def append(rows: Iterable[Row], path: Path | None = None) -> Path:
    """Append rows to ``results/<device>.jsonl.gz`` (or another file), all of them or none. Returns the file.

    A name that ends in ``.gz`` is compressed, each call a gzip member of its own behind those that are there.

    Raises:
        RowError: a row is unsound, or has a ratio without its baseline row.
        ValueError: no rows.
    """
    listed = check(rows)
    if not listed:
        raise ValueError("record: at least one row (got rows=[])")
    path = path or stored(listed[0].machine)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = packed("".join(json.dumps(asdict(row), sort_keys=False) + "\n" for row in listed), path)
    # One write to a file opened for appending: a killed run leaves whole lines or nothing
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return path


def write_json(rows: Iterable[Row], path: Path) -> Path:
    """Write rows as one JSON list, atomically.

    Raises:
        RowError: as ``append``.
    """
    listed = check(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps([asdict(row) for row in listed], indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def read(path: Path) -> list[Row]:
    """Rows of a ``.jsonl`` file or of a JSON list, compressed if its name ends in ``.gz``.

    Raises:
        FileNotFoundError: no such file.
        RowError: every unsound row, with its line (or its place in the list); a broken archive.
    """
    text = unpacked(path)
    found: list[tuple[int, Any]] = []
    problems: list[str] = []
    if text.lstrip().startswith("["):
        found = list(enumerate(json.loads(text)))
    else:
        for number, line in enumerate(text.splitlines(), start=1):
            if not line.strip():
                continue
            try:
                found.append((number, json.loads(line)))
            except json.JSONDecodeError as error:
                problems.append(f"line {number}: not JSON ({error.msg})")
    rows = []
    for number, data in found:
        broken = row_problems(data) if isinstance(data, Mapping) else [f"a row is a mapping (got {data!r:.40})"]
        problems += [f"row {number}: {problem}" for problem in broken]
        if not broken:
            rows.append(Row(**data))
    problems = problems or set_problems(rows)
    if problems:
        raise RowError(f"{path.name}: " + "; ".join(problems))
    return rows


def latest(rows: Sequence[Row]) -> list[Row]:
    """Of every case, implementation and metric, the row measured last."""
    newest: dict[tuple[str, str, str], Row] = {}
    for row in sorted(rows, key=lambda row: row.time):
        newest[row.case, row.implementation, row.metric] = row
    return list(newest.values())


def machine(device: str = "cpu") -> dict[str, Any]:
    """The machine that rows were measured on; a GPU, its driver and CUDA stand in it only where they were used."""
    from fastedit.engine import provenance

    found = {name: value for name, value in provenance.machine().items() if name != "gpu"}
    if not device.startswith("cuda"):
        return found
    import torch

    properties = torch.cuda.get_device_properties(device)
    return {
        **found,
        "gpu": properties.name,
        "gpu_memory_mib": properties.total_memory >> 20,
        "capability": f"{properties.major}.{properties.minor}",
        "driver": driver_version(),
        "cuda": torch.version.cuda,
    }


def driver_version() -> str:
    """Version of the NVIDIA driver; "" where none tells."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return told.strip().partition("\n")[0]


def device_name(machine: Mapping[str, Any]) -> str:
    """A file name for the device that rows were measured on: the GPU, or the processor with its threads."""
    named = str(
        machine.get("gpu") or f"{machine.get('cpu', 'cpu')}-{machine.get('threads', machine.get('cores', 1))}-threads"
    )
    return re.sub(r"[^a-z0-9]+", "-", named.lower()).strip("-") or "unknown"


def commit_with_changes(commit: str, root: Path | None = None) -> str:
    """The commit, marked ``+changes`` when tracked files differ from it: such a row cannot be repeated exactly.

    Of a tree without a repository, a copy say, FASTEDIT_COMMIT tells it.
    """
    if not commit:
        return os.environ.get("FASTEDIT_COMMIT", "")
    root = root or Path(__file__).resolve().parents[1]
    # Stored rows themselves are no change to what was measured.
    command = ["git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)benchmarks/results"]
    try:
        changed = subprocess.run(
            command, cwd=root, capture_output=True, text=True, timeout=30, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return commit
    return f"{commit}+changes" if changed else commit


def origin(seed: int, device: str = "cpu") -> tuple[dict[str, Any], dict[str, str], str, int, str]:
    """The last fields of every row that is made now: machine, versions, commit, seed, time."""
    from fastedit.engine import provenance

    commit = commit_with_changes(provenance.commit())
    return machine(device), provenance.versions(), commit, seed, provenance.utc_now()
