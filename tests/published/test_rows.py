"""The rows that are shipped: those of the tables, readable, and the newest."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from benchmarks import quality, record
from fastedit.published.rows import STORED, packed, published_rows

STORE = Path(quality.__file__).parent / "results" / "quality"


def recorded(name: str, mean: float, *, weights: str, time: str) -> dict[str, Any]:
    case = {"table": "single", "model": "m", "data": "d", "method": name, "label": "", "settings": {"layers": [1, 2]},
            "training": {}, "edits": 4, "score_at": [1], "name": f"single/m/d/{name}"}  # fmt: skip
    provenance = {"commit": "c" * 40, "versions": {"torch": "2"}, "time": time}
    scores = {"reliability": [mean, mean, mean, 4], "portability": [None, None, None, 0]}
    return {"case": case, "weights": weights, "scores": {"strict": scores, "legacy": {}}, "provenance": provenance}


def test_what_is_shipped_is_what_was_recorded(tmp_path: Path) -> None:
    assert quality.ship(STORE, tmp_path / "rows.jsonl.gz").read_bytes() == STORED.read_bytes()
    rows = published_rows()
    stored = [json.loads(line) for path in STORE.iterdir() for line in record.unpacked(path).splitlines()]
    assert set(rows) <= {row["case"]["name"] for row in stored}
    assert all(row.case.name == name and "reliability" in row.scores["strict"] for name, row in rows.items())


def test_a_row_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(packed([recorded("lora", 0.5, weights="w", time="1")]))
    (row,) = published_rows(path).values()
    assert row.case.settings == {"layers": (1, 2)}
    assert row.case.score_at == (1,)
    assert row.scores["strict"]["reliability"].mean == 0.5
    assert "portability" not in row.scores["strict"], "no edit has it"
    assert (row.weights, row.commit) == ("w", "c" * 12)


def test_of_a_case_the_newest_is_shipped_and_none_of_older_weights(tmp_path: Path) -> None:
    store, target = tmp_path / "store", tmp_path / "rows.jsonl.gz"
    store.mkdir()
    files = {
        "a.jsonl": [recorded("lora", 0.1, weights="old", time="1"), recorded("ft", 0.2, weights="old", time="1")],
        "b.jsonl.gz": [recorded("lora", 0.3, weights="new", time="3"), recorded("mend", 0.4, weights="new", time="2")],
    }
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        (store / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    shipped = published_rows(quality.ship(store, target))
    means = {name: row.scores["strict"]["reliability"].mean for name, row in shipped.items()}
    assert means == {"single/m/d/lora": 0.3, "single/m/d/mend": 0.4}
