"""The measured peak is positive and counts what it says."""

from __future__ import annotations

import time

import pytest
import torch

from fastedit.engine.profiling import utilisation


def test_peak_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utilisation, "SIDES", {"cpu": (128, 256)})
    monkeypatch.setattr(utilisation, "COPY_MIB", {"cpu": 4})
    for dtype in ("float32", "bfloat16"):
        peak = utilisation.measure_peak(dtype, seconds=0.02)
        assert peak.dtype == dtype
        assert peak.matmul_gflop_per_s > 0.1
        assert peak.copy_gib_per_s > 0.05


def test_fastest_is_the_least_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    now = [0.0]

    def work() -> None:
        calls.append(1)
        now[0] += 0.02 if len(calls) == 3 else 0.05

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    assert utilisation.fastest(work, torch.device("cpu"), 0.1) == pytest.approx(0.02)
    # One call to warm up, then at least three
    assert len(calls) == 4
