"""benchmarks/kernels.py: cases of every op agree with their baselines in small, timing is in turns, rows are sound."""

import pytest
import torch

from benchmarks import kernels, record
from benchmarks.kernel_cases import adam_step, key_value, low_rank, topk_agreement

SMALL = {
    "low_rank": lambda: low_rank.make_case("low_rank", (3, 5), 12, 2, 9),
    "key_value": lambda: key_value.make_case("key_value", (3, 5), 12, 4, 9, gated=False),
    "key_value gated": lambda: key_value.make_case("key_value_gated", (3, 5), 12, 4, 9, gated=True),
    "topk_agreement": lambda: topk_agreement.make_case("topk_agreement", 5, 300, 10, torch.float32),
    "adam_step": lambda: adam_step.make_case("adam_step", 3, 50),
}


@pytest.mark.parametrize("name", SMALL)
def test_small_cases_run(name):
    case = SMALL[name]()
    case["check"]()
    for run in case["baselines"].values():
        run()


@pytest.mark.parametrize("stem", ["low_rank", "key_value"])
def test_padded_products_are_the_op(stem):
    case = SMALL[stem]()
    for one, other in zip(case["run"](), case["baselines"]["bmm_padded"](), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_a_wrong_result_fails_the_check(monkeypatch):
    from fastedit import ops

    case = SMALL["low_rank"]()
    own = ops.low_rank
    monkeypatch.setattr(ops, "low_rank", lambda *arguments: own(*arguments) * 1.01)
    with pytest.raises(AssertionError, match="exceeds"):
        case["check"]()


def test_times_become_sound_rows():
    calls = []
    case = {
        "name": "low_rank",
        "shapes": {"tokens": 1},
        "dtype": "float32",
        "run": lambda: calls.append("own"),
        "baselines": {"loop": lambda: calls.append("loop")},
    }
    taken = kernels.time_case(case, 0.0, 3)
    # a warm-up of each, then turns
    assert calls == ["own", "loop"] * 4
    assert {name: len(times) for name, times in taken.items()} == {"fastedit": 3, "loop": 3}
    rows = kernels.rows_of(case, "low_rank", taken, {"fastedit": 1.5})
    assert [(row.implementation, row.metric) for row in rows] == [
        ("fastedit", "run_s"),
        ("loop", "run_s"),
        ("fastedit", "working_memory_mib"),
    ]
    assert rows[1].ratio == rows[1].value / rows[0].value
    assert record.check(rows) == rows


def test_unknown_ops_are_named():
    with pytest.raises(ValueError, match=r"kernels: ops with cases are .*low_rank.* \(got softmax\)"):
        kernels.cases_of("softmax")
