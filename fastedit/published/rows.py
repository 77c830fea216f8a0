"""The stored rows: what every line of ``docs/results.md`` measured, shipped with the package."""

from __future__ import annotations

import functools
import gzip
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastedit.evaluation import Score
from fastedit.published.case import Case, case_of

#: One line a row; written by ``python benchmarks/quality.py --record``.
STORED = Path(__file__).parent / "rows.jsonl.gz"
#: What a stored row keeps of what was recorded: enough to run it anew and compare.
PROTOCOLS = ("strict", "legacy")


@dataclass(frozen=True, slots=True)
class PublishedRow:
    """One line of the tables.

    Args:
        case: what was run.
        scores: protocol -> score -> mean and 95 % interval over the case's edits.
        weights: SHA-256 of the weights it was measured on, as `fastedit.backbone.weights_hash` tells them.
        commit: of the code that measured it.
        versions: of the packages that did.
    """

    case: Case
    scores: Mapping[str, Mapping[str, Score]]
    weights: str
    commit: str
    versions: Mapping[str, str]


@functools.cache
def published_rows(path: Path = STORED) -> dict[str, PublishedRow]:
    """Return every published row by the name of its case, in the order of the tables."""
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").splitlines()
    rows = [_read(json.loads(line)) for line in lines]
    return {row.case.name: row for row in rows}


def _read(stored: Mapping[str, Any]) -> PublishedRow:
    scores = {
        protocol: {name: Score(*interval) for name, interval in stored["scores"][protocol].items()}
        for protocol in PROTOCOLS
    }
    return PublishedRow(case_of(stored["case"]), scores, stored["weights"], stored["commit"], stored["versions"])


def shortened(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """What is shipped of a row that was recorded under ``benchmarks/results/quality``.

    Scores that no edit has are left out.
    """
    scores = {
        protocol: {
            name: interval for name, interval in recorded["scores"].get(protocol, {}).items() if interval[0] is not None
        }
        for protocol in PROTOCOLS
    }
    provenance = recorded["provenance"]
    return {
        "case": recorded["case"],
        "scores": scores,
        "weights": recorded["weights"],
        "commit": str(provenance["commit"])[:12],
        "versions": provenance["versions"],
    }


def packed(recorded: Iterable[Mapping[str, Any]]) -> bytes:
    """The file of shipped rows, the same bytes for the same rows."""
    lines = "".join(json.dumps(shortened(row)) + "\n" for row in recorded)
    return gzip.compress(lines.encode("utf-8"), mtime=0)
