"""Means with bootstrap intervals over edits, and differences between two runs on the same edits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2_000
LEVEL = 0.95
#: Values drawn at a time: bounds the memory to 32 MiB whatever the number of edits.
_CHUNK = 2**22


@dataclass(frozen=True, slots=True)
class Score:
    """Mean over edits with its percentile bootstrap interval.

    Args:
        mean: over the edits that have the score; NaN without any.
        low, high: bounds of the 95 % interval (or of the level that was asked for).
        n: number of edits that have the score.
    """

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        if not self.n:
            return "absent"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}] (n={self.n})"


def bootstrap(
    values: Sequence[float | None] | NDArray[np.floating],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Score:
    """Return the mean of one value an edit, with its interval (Efron's percentile bootstrap, edits resampled).

    Args:
        values: one an edit; None or NaN where the edit has no such score, which then does not count. Infinite values
            are kept: the mean is infinite, and the interval says how much of it hangs on few edits.
        seed: of the resampling; equal arguments give equal intervals on every machine.
        resamples: number of resampled means.
        level: coverage of the interval, between 0 and 1.
    Raises:
        ValueError: resamples below 1, or a level outside of 0 to 1. Message: "bootstrap: rule (got name=...)".
    """
    if resamples < 1:
        raise ValueError(f"bootstrap: resamples must be positive (got resamples={resamples})")
    if not 0.0 < level < 1.0:
        raise ValueError(f"bootstrap: level must lie between 0 and 1 (got level={level})")
    present = np.asarray([math.nan if value is None else float(value) for value in values], dtype=np.float64)
    present = present[~np.isnan(present)]
    n = len(present)
    if n == 0:
        return Score(math.nan, math.nan, math.nan, 0)
    if (present == present[0]).all():
        # Also keeps rounding from putting the interval beside the mean.
        return Score(float(present[0]), float(present[0]), float(present[0]), n)
    means = np.sort(_resampled_means(present, seed, resamples))
    # The outer neighbours, not interpolated: conservative, and defined for infinite means.
    tail = (1.0 - level) / 2.0 * (resamples - 1)
    low, high = means[math.floor(tail)], means[resamples - 1 - math.floor(tail)]
    return Score(float(present.mean()), float(low), float(high), n)


def _resampled_means(values: NDArray[np.float64], seed: int, resamples: int) -> NDArray[np.float64]:
    """Return (resamples,) means of as many values drawn with replacement."""
    generator = np.random.default_rng(seed)
    rows = max(1, _CHUNK // len(values))
    means = np.empty(resamples)
    for start in range(0, resamples, rows):
        stop = min(start + rows, resamples)
        drawn = generator.integers(len(values), size=(stop - start, len(values)))
        means[start:stop] = values[drawn].mean(axis=1)
    return means


def bootstrap_difference(
    first: Sequence[float | None],
    second: Sequence[float | None],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Score:
    """Return the mean of first minus second over the edits that have both, with its interval (paired bootstrap).

    The two runs must have scored the same edits in the same order. An interval without 0 is a difference that the
    choice of edits does not explain.

    Args:
        first, second: one value an edit, as in `bootstrap`.
        seed, resamples, level: as in `bootstrap`.
    Raises:
        ValueError: the runs have different lengths, or as in `bootstrap`.
    """
    if len(first) != len(second):
        raise ValueError(
            f"bootstrap_difference: runs must score the same edits (got lengths {len(first)} and {len(second)})"
        )
    # inf - inf is NaN, and so absent: two runs that both diverged on an edit do not differ there.
    pairs = [None if a is None or b is None else float(a) - float(b) for a, b in zip(first, second, strict=True)]
    return bootstrap(pairs, seed=seed, resamples=resamples, level=level)


def bootstrap_over_groups(
    groups: Sequence[Sequence[float | None]], *, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL
) -> Score:
    """Return the mean over groups of the mean within each, with its interval: edits are resampled within their group.

    For what holds over several models and sets at once, each of which counts the same.

    Args:
        groups: one value an edit by group; None or NaN where the edit has none. A group without values does not count.
        seed, resamples, level: as in `bootstrap`.
    """
    scores = [bootstrap(group, seed=seed, resamples=resamples, level=level) for group in groups]
    kept = [(group, score) for group, score in zip(groups, scores, strict=True) if score.n]
    if not kept:
        return Score(math.nan, math.nan, math.nan, 0)
    drawn = np.zeros(resamples)
    for number, (group, _) in enumerate(kept):
        values = np.asarray([math.nan if value is None else float(value) for value in group], dtype=np.float64)
        # Groups are drawn apart, or their errors would add up instead of averaging out
        drawn += _resampled_means(values[~np.isnan(values)], seed + number, resamples) / len(kept)
    drawn.sort()
    tail = math.floor((1.0 - level) / 2.0 * (resamples - 1))
    mean = sum(score.mean for _, score in kept) / len(kept)
    return Score(mean, float(drawn[tail]), float(drawn[resamples - 1 - tail]), sum(score.n for _, score in kept))
