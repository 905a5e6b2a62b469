"""Ratios of two arms that took turns within each round: their spread, and an interval for what they come to."""

import statistics
from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000


def spread(values: Sequence[float], digits: int) -> str:
    """median (lowest to highest)."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def paired(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """The ratio of each round."""
    return [value / other for value, other in zip(values, base, strict=True)]


def interval(ratios: Sequence[float], starts: int = 1, level: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval, by percentiles, of the geometric mean over rounds (the mean log-ratio, back as a ratio).

    Args:
        ratios: as many rounds of each start, one start after another. Two processes of the same program differ by some
            percent for as long as they live, so starts are drawn first, and then rounds of each.
    """
    logs, rng = np.log(ratios).reshape(starts, -1), np.random.default_rng(0)
    rounds = rng.integers(logs.shape[1], size=(RESAMPLES, *logs.shape))
    draws = logs[rng.integers(starts, size=(RESAMPLES, starts, 1)), rounds]
    low, high = np.quantile(draws.mean((1, 2)), [(1 - level) / 2, (1 + level) / 2])
    return float(np.exp(low)), float(np.exp(high))
