"""What the comparison with compiled blocks stores; compiling itself takes a minute and is not tested here."""

from __future__ import annotations

import pytest

from benchmarks import compiled_tail
from benchmarks.cases import CASES
from benchmarks.outcome import Fitted
from fastedit.backbone import packed_forward


def test_rows_have_ratios_to_the_engine() -> None:
    seconds = {mode: [float(number + 1)] * 2 for number, mode in enumerate(compiled_tail.MODES)}
    results = {
        mode: [Fitted((), (), {"tail_forward": each[0], "backward": 2 * each[0]})] * 2 for mode, each in seconds.items()
    }
    rows = compiled_tail.rows_of(CASES["lora-last2"], seconds, results, 40.0)
    ratios = {(row.implementation, row.metric): row.ratio for row in rows if row.ratio is not None}
    assert ratios["engine/torch/compiled", "edits_per_s"] == pytest.approx(1 / 3)
    assert ratios["engine/torch", "phase_backward_s"] == pytest.approx(2)
    assert (rows[-1].metric, rows[-1].value) == ("phase_compile_s", 40.0)


def test_blocks_are_there_inside_and_gone_behind() -> None:
    before = packed_forward._fed
    with compiled_tail.blocks({"_fed": max}):
        assert packed_forward._fed is max
    assert packed_forward._fed is before
