"""The half page before the tables: which pair it shows, and that it recommends what was measured best."""

from __future__ import annotations

from benchmarks.quality_summary import EIGHT, shown_pair, summary
from tests.benchmarks.test_quality import Outcome, outcome


def of_method(method: str, right: float, stays: float, *, seconds: float = 1.0, **case: object) -> Outcome:
    made = outcome(method, [right] * 4, near=stays, **case)
    for name in ("text_locality", "image_locality", "same"):
        made["scores"]["strict"][name] = {"mean": stays, "low": stays, "high": stays, "n": 4}
    made["timing"] |= {"seconds_per_edit": seconds, "train_s": None}
    return made


def test_what_is_recommended_was_measured_best() -> None:
    made = [
        of_method("lora", 0.99, 0.7, seconds=0.1),
        of_method("kl+lora", 0.95, 0.9),
        of_method("grace", 0.94, 1.0),
        of_method("ldke", 0.97, 0.99),
        of_method("serac", 0.5, 1.0, seconds=0.01),
    ]
    text = "\n".join(summary(made, {"trade-off, pocket-vqa on pocket-llava": "p.png"}))
    assert "merged or exported:** `kl+lora`" in text
    assert "touch nothing else:** `ldke` (must change 0.970, must stay 0.990)" in text
    assert "nothing trained before:** `lora`" in text, "serac is faster, and does not do it"
    assert "![trade-off, pocket-vqa on pocket-llava](p.png)" in text
    assert "in sequence" not in text
    assert "unseen" not in text, "nobody asked in unseen words"
    assert summary([], {}) == []


def test_sequences_and_unseen_words_have_columns_where_they_were_measured() -> None:
    made = [of_method(name, 0.9, 0.9) for name in EIGHT]
    made[0]["scores"]["strict"]["text_generality_unseen"] = {"mean": 0.25, "low": 0.2, "high": 0.3, "n": 4}
    long = of_method("ldke", 0.8, 0.9, table="sequential")
    long["checkpoints"] = {"1": long["scores"], "2": long["scores"]}
    text = "\n".join(summary([*made, long], {}))
    header = next(line for line in text.splitlines() if line.startswith("| method"))
    assert "other words, unseen" in header
    assert "holds after 4 in sequence" in header
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == list(EIGHT)
    assert " 0.250 " in rows[0]
    assert rows[-1].endswith("| 0.800 | 1.000 |")


def test_the_pair_with_all_eight_is_shown() -> None:
    few = [of_method("lora", 0.9, 0.9), *(of_method(name, 0.9, 0.9, data="other") for name in ("lora", "ft"))]
    assert {o["case"]["data"] for o in shown_pair(few)} == {"other"}
    whole = [of_method(name, 0.9, 0.9, model="smol-llava", data="icon-vqa") for name in EIGHT]
    assert {o["case"]["model"] for o in shown_pair([*few, *whole])} == {"smol-llava"}
