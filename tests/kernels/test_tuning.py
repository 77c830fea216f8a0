"""Which settings kernels are launched with."""

import pytest

triton = pytest.importorskip("triton")

from fastedit.kernels import _tuning  # noqa: E402


def _configs(*blocks):
    return [triton.Config({"BLOCK": block}, num_warps=4, num_stages=3) for block in blocks]


def _shared(BLOCK, WIDTH, num_stages):
    return BLOCK * WIDTH * num_stages


def test_configs_fit_shared_memory():
    configs = _configs(64, 256, 1024)
    kept = _tuning.small_enough(configs, {"WIDTH": 128}, _shared)
    assert kept == configs[:2]
    # where none fits, the smallest is tried: Triton says what is missing
    assert _tuning.small_enough(configs, {"WIDTH": 10**6}, _shared) == configs[:1]


def test_like_shapes_are_one_kind_of_work():
    assert _tuning.work_of(33, 4096) == _tuning.work_of(64, 4095) == 6 * 32 + 12
    assert _tuning.work_of(64, 4096) != _tuning.work_of(65, 4096)
    assert _tuning.work_of(64, 16) != _tuning.work_of(16, 64)
    assert _tuning.work_of(0) == _tuning.work_of(1) == 0


def test_one_setting_where_nothing_is_tried(monkeypatch):
    """Under the interpreter and where FASTEDIT_TUNE=0 the first config that fits; else Triton's tuner, kept on disk."""

    @triton.jit
    def kernel(out, work, BLOCK: triton.language.constexpr):
        pass

    configs = _configs(64, 256)
    for interpret, switch in ((True, "1"), (False, "0")):
        monkeypatch.setattr(triton.knobs.runtime, "interpret", interpret)
        monkeypatch.setenv(_tuning.SWITCH, switch)
        fixed = _tuning.tuned(configs, _shared)(kernel)
        assert isinstance(fixed, _tuning.Fixed)
        assert fixed.chosen({"WIDTH": 128}) is configs[0]
    large_first = _tuning.Fixed(kernel, configs[::-1], _shared, double=configs[0])
    assert large_first.chosen({"WIDTH": 1024}) is configs[0]
    assert large_first.chosen({"WIDTH": 16}) is configs[1]
    assert large_first.chosen({"WIDTH": 16, "ACC": triton.language.float64}) is configs[0]
    monkeypatch.setenv(_tuning.SWITCH, "1")
    tuner = _tuning.tuned(configs, _shared)(kernel)
    assert tuner.configs == configs
    assert tuner.keys == ["work"]
    assert tuner.cache_results
