"""Estimates from samples: percentiles, ranges, and bootstrap intervals that resample questions.

Knows nothing of stages or servers. Every draw is seeded: the same input gives the same output.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from loadtest.results import Interval, Percentiles

RESAMPLES = 10_000
CHUNK = 500  # resamples at a time: bounds the memory to CHUNK x questions, 20 MB for 5,000
LEVEL = 0.95

Outcomes = Mapping[int, Sequence[bool]]  # by the question's index: correct or not, each time that it was asked
Rows = NDArray[np.int64]  # [questions, sums]
Estimate = Callable[[Rows], NDArray[np.float64]]  # from sums over questions [resamples, sums] to [resamples]


def percentiles(values: Iterable[float]) -> Percentiles | None:
    """Compute percentiles by linear interpolation: the q-quantile of n sorted values has rank q (n - 1), from 0.

    Returns:
        Percentiles in the unit of `values`; None without values.
    """
    ordered = np.sort(np.fromiter(values, dtype=np.float64))
    if not len(ordered):
        return None
    ranks = np.array([0.50, 0.90, 0.95, 0.99]) * (len(ordered) - 1)
    p50, p90, p95, p99 = np.interp(ranks, np.arange(len(ordered)), ordered).tolist()
    return Percentiles(count=len(ordered), mean=float(ordered.mean()), p50=p50, p90=p90, p95=p95, p99=p99)


def median_and_range(values: Sequence[float]) -> Interval:
    """Return the median, lowest and highest value: a stage has too few repetitions for a confidence interval.

    Raises:
        StatisticsError: if there are no values.
    """
    return Interval(value=statistics.median(values), low=min(values), high=max(values))


def accuracy_interval(outcomes: Outcomes) -> Interval | None:
    """Return the share of correct outcomes, with its 95 % percentile bootstrap interval.

    Questions are resampled, each with all its repetitions: repetitions of one question are alike and say little about
    other questions. If all outcomes are equal the interval has no width, as for any bootstrap. (`scipy.stats.bootstrap`
    would do, but scipy would be a new dependency of the load generator.)

    Returns:
        Shares from 0 to 1; None if nothing was asked.
    """
    return _bootstrap([(sum(times), len(times)) for times in outcomes.values() if times], _share)


def paired_difference(a: Outcomes, b: Outcomes) -> Interval | None:
    """Return the accuracy of `a` minus that of `b`, with its 95 % percentile bootstrap interval.

    Only questions that both were asked count. Each resample has the same questions for both: a hard question is hard
    for both, so that this common part cancels.

    Returns:
        Differences from -1 to 1; None without a common question.
    """
    common = [index for index in a if a[index] and b.get(index)]
    rows = [(sum(a[index]), len(a[index]), sum(b[index]), len(b[index])) for index in common]
    return _bootstrap(rows, lambda sums: _share(sums[:, :2]) - _share(sums[:, 2:]))


def _share(sums: Rows) -> NDArray[np.float64]:
    correct, asked = sums.T
    return np.asarray(correct / asked, dtype=np.float64)


def _bootstrap(questions: Sequence[tuple[int, ...]], estimate: Estimate) -> Interval | None:
    if not questions:
        return None
    rows = np.array(questions, dtype=np.int64)
    low, high = np.quantile(estimate(_resampled_sums(rows)), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value=float(estimate(rows.sum(0, keepdims=True))[0]), low=float(low), high=float(high))


def _resampled_sums(rows: Rows) -> Rows:  # [RESAMPLES, sums]
    """Draw `len(rows)` rows with replacement and sum them, RESAMPLES times.

    Few rows differ, and equal rows are interchangeable. So the multinomial distribution draws how often each distinct
    row occurs: the same distribution as drawing rows one by one, at a small part of the cost.
    """
    distinct, counts = np.unique(rows, axis=0, return_counts=True)
    rng = np.random.default_rng(0)
    shares = counts / len(rows)
    sums = [rng.multinomial(len(rows), shares, size=CHUNK) @ distinct for _ in range(RESAMPLES // CHUNK)]
    return np.concatenate(sums)
