from __future__ import annotations

from benchmarks.quality_wordings import ASKED, of_card, table
from fastedit.pocket.factory.mixture import REWORDED


def test_seen_and_unseen_stand_side_by_side_with_their_means() -> None:
    full = dict.fromkeys(ASKED, 1.0) | {REWORDED + kind: 0.5 for kind in ASKED}
    full["reworded:colour"] = 0.6
    lines = table({"a": full, "b": {"colour": 0.25}}).splitlines()
    assert lines[0] == "| kind | a | b |"
    assert "| colour | 100.0 / 60.0 | 25.0 / - |" in lines
    assert lines[-1] == f"| mean | 100.0 / {50 + 10 / len(ASKED):.1f} | 25.0 / - |"


def test_a_card_has_every_kind() -> None:
    assert set(of_card("pocket-qwen2vl")) >= set(ASKED)
