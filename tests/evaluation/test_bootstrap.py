import dataclasses
import importlib
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastedit.evaluation.bootstrap import Score, bootstrap, bootstrap_difference, bootstrap_over_groups


def test_the_mean_and_the_count_are_exact() -> None:
    score = bootstrap([1.0, 0.0, None, 1.0, math.nan, 1.0])
    assert (score.mean, score.n) == (0.75, 4)
    assert 0.0 <= score.low < 0.75 < score.high <= 1.0


@pytest.mark.parametrize("values", [[], [None], [None, math.nan]])
def test_without_values_everything_is_nan(values: list) -> None:
    score = bootstrap(values)
    assert score.n == 0
    assert all(math.isnan(number) for number in (score.mean, score.low, score.high))
    assert str(score) == "absent"


@pytest.mark.parametrize("values", [[0.1], [0.1] * 7, [1.0] * 300, [math.inf, math.inf]])
def test_equal_values_have_no_spread(values: list[float]) -> None:
    assert bootstrap(values) == Score(values[0], values[0], values[0], len(values))


def test_a_seed_fixes_the_interval() -> None:
    values = np.random.default_rng(0).random(50).tolist()
    assert bootstrap(values, seed=3) == bootstrap(np.array(values), seed=3)
    assert bootstrap(values, seed=3) != bootstrap(values, seed=4)


def test_the_interval_is_that_of_the_normal_approximation() -> None:
    values = np.random.default_rng(0).normal(2.0, 1.0, 1000)
    score = bootstrap(values.tolist())
    half = 1.96 * values.std() / math.sqrt(1000)
    assert score.low == pytest.approx(values.mean() - half, abs=0.006)
    assert score.high == pytest.approx(values.mean() + half, abs=0.006)
    narrow = bootstrap(values.tolist(), level=0.5)
    assert narrow.high - narrow.low == pytest.approx(0.6745 / 1.96 * 2 * half, rel=0.1)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for seed in range(200):
        score = bootstrap(generator.random(60) < 0.7, seed=seed, resamples=500)
        covered += score.low <= 0.7 <= score.high
    assert 180 <= covered <= 200


def test_infinite_values_are_kept() -> None:
    score = bootstrap([1.0] * 9 + [math.inf])
    assert score.mean == score.high == math.inf
    assert score.low == 1.0


@given(st.lists(st.none() | st.floats(-1e6, 1e6), max_size=40), st.integers(0, 10))
def test_the_interval_holds_the_mean_inside_the_range(values: list, seed: int) -> None:
    score = bootstrap(values, seed=seed, resamples=200)
    present = [value for value in values if value is not None]
    assert score.n == len(present)
    if present:
        slack = 1e-9 * max(1.0, *map(abs, present))
        assert min(present) - slack <= score.low <= score.high <= max(present) + slack
        assert score.mean == pytest.approx(sum(present) / len(present), abs=slack)


def test_memory_is_bounded_and_does_not_change_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [float(i) for i in range(40)]
    whole = bootstrap(values, resamples=300)
    # By import_module: the package exports a function of the same name.
    monkeypatch.setattr(importlib.import_module("fastedit.evaluation.bootstrap"), "_CHUNK", 100)
    assert bootstrap(values, resamples=300) == whole


def test_a_difference_is_paired() -> None:
    generator = np.random.default_rng(0)
    hard = generator.random(200)
    first, second = (hard + 0.02).tolist(), hard.tolist()
    paired = bootstrap_difference(first, second)
    assert paired.mean == pytest.approx(0.02)
    assert paired.low > 0.019
    # Unpaired, the same difference drowns in the spread of the edits.
    assert bootstrap(first).low < bootstrap(second).high


def test_a_difference_needs_both_values() -> None:
    score = bootstrap_difference([1.0, None, 3.0, 1.0], [0.0, 5.0, None, 0.0])
    assert score == Score(1.0, 1.0, 1.0, 2)
    assert bootstrap_difference([math.inf, 1.0], [math.inf, 0.0]).n == 1
    assert bootstrap_difference([], []).n == 0
    with pytest.raises(ValueError, match=r"same edits \(got lengths 1 and 2"):
        bootstrap_difference([1.0], [1.0, 2.0])


def test_a_difference_turns_around() -> None:
    a, b = [1.0, 0.0, 1.0, 1.0, 0.5], [0.0, 0.5, 1.0, 0.0, 0.25]
    forth, back = bootstrap_difference(a, b), bootstrap_difference(b, a)
    assert (forth.mean, forth.low, forth.high) == pytest.approx((-back.mean, -back.high, -back.low))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"resamples": 0}, r"resamples must be positive \(got resamples=0"),
        ({"level": 1.0}, "level must lie between 0 and 1"),
        ({"level": 0.0}, "level must lie between 0 and 1"),
    ],
)
def test_arguments_are_checked(arguments: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        bootstrap([1.0], **arguments)


def test_a_score_reads_well_and_is_frozen() -> None:
    score = Score(0.91234, 0.87, 0.95, 200)
    assert str(score) == "0.912 [0.870, 0.950] (n=200)"
    with pytest.raises(dataclasses.FrozenInstanceError):
        score.mean = 1.0  # type: ignore[misc]


def test_groups_count_alike_whatever_their_size() -> None:
    generator = np.random.default_rng(0)
    small, large = generator.normal(1.0, 1.0, 40).tolist(), generator.normal(0.0, 1.0, 4000).tolist()
    found = bootstrap_over_groups([[*small, None], large, []])
    assert found.mean == pytest.approx((np.mean(small) + np.mean(large)) / 2)
    assert found.n == 4040
    # The error of a mean of two is half that of each, added in squares
    expected = 1.96 * np.sqrt(np.var(small) / 40 + np.var(large) / 4000) / 2
    assert (found.high - found.low) / 2 == pytest.approx(expected, rel=0.1)
    alone = bootstrap_over_groups([small])
    assert alone == bootstrap(small)
    assert bootstrap_over_groups([[], [None]]).n == 0
    constant = bootstrap_over_groups([[1.0, 1.0], [0.0]])
    assert (constant.mean, constant.low, constant.high) == (0.5, 0.5, 0.5)
