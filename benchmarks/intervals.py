"""Ratios of two configs that were measured in the same rounds, and intervals of measured values."""

import statistics
from collections.abc import Sequence

import numpy as np
from scipy import stats

RESAMPLES = 10_000
LEVEL = 0.95


def median_and_range(values: Sequence[float], digits: int) -> str:
    """Format as "median (lowest to highest)"."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def paired_ratios(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """Return the ratio of each round."""
    return [value / other for value, other in zip(values, base, strict=True)]


def ratio_interval(ratios: Sequence[float], starts: int = 1) -> tuple[float, float]:
    """Return the 95 % bootstrap interval, by percentiles, of the geometric mean over rounds.

    Two processes of the same program differ by some percent for as long as they live. Therefore each resample draws
    starts first and then rounds of each start, which scipy.stats.bootstrap cannot: it draws on one level.

    Args:
        ratios: the rounds of the first start, then those of the next one; the same number of rounds for each start.
        starts: how often the servers were started.
    """
    logs, rng = np.log(ratios).reshape(starts, -1), np.random.default_rng(0)  # [starts, rounds]
    rounds = rng.integers(logs.shape[1], size=(RESAMPLES, *logs.shape))
    resamples = logs[rng.integers(starts, size=(RESAMPLES, starts, 1)), rounds]  # [RESAMPLES, starts, rounds]
    low, high = np.quantile(resamples.mean((1, 2)), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(np.exp(low)), float(np.exp(high))


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and half width of the 95 % interval by Student's t; the half width of equal values is 0."""
    standard_error = statistics.stdev(values) / len(values) ** 0.5
    return statistics.fmean(values), float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * standard_error)
