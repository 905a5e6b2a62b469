"""Numbers in, estimates out: percentiles, ranges, and bootstrap intervals that resample questions.

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

Outcomes = Mapping[int, Sequence[bool]]  # by the question's index: right or not, each time that it was asked
Rows = NDArray[np.int64]  # one per question
Estimate = Callable[[Rows], NDArray[np.float64]]  # of sums over questions, one row per resample


def percentiles(values: Iterable[float]) -> Percentiles | None:
    """Percentiles by linear interpolation: the q-quantile of n sorted values has rank q (n - 1), counted from 0.

    Returns:
        In the unit of `values`; None where there are none.
    """
    ordered = np.sort(np.fromiter(values, dtype=np.float64))
    if not len(ordered):
        return None
    ranks = np.array([0.50, 0.90, 0.95, 0.99]) * (len(ordered) - 1)
    p50, p90, p95, p99 = np.interp(ranks, np.arange(len(ordered)), ordered).tolist()
    return Percentiles(count=len(ordered), mean=float(ordered.mean()), p50=p50, p90=p90, p95=p95, p99=p99)


def spread(values: Sequence[float]) -> Interval:
    """Median, with the lowest and the highest: for the few repetitions of a stage, too few for an interval.

    Raises:
        StatisticsError: there are no values.
    """
    return Interval(value=statistics.median(values), low=min(values), high=max(values))


def accuracy_interval(outcomes: Outcomes) -> Interval | None:
    """The share that was right, with its 95 % percentile bootstrap interval.

    What is resampled are questions, each with all its repetitions: those are alike, and say little about others.
    Where all are right, or all wrong, the interval has no width, as any bootstrap's.

    Returns:
        Shares from 0 to 1; None where nothing was asked.
    """
    return _interval([(sum(times), len(times)) for times in outcomes.values() if times], _share)


def paired_difference(a: Outcomes, b: Outcomes) -> Interval | None:
    """The accuracy of `a` less that of `b`, with its 95 % percentile bootstrap interval.

    Over the questions that both were asked. Each resample has the same questions for both: hard ones are hard for
    both, and what they have in common cancels.

    Returns:
        From -1 to 1; None where they have no question in common.
    """
    common = [index for index in a if a[index] and b.get(index)]
    rows = [(sum(a[index]), len(a[index]), sum(b[index]), len(b[index])) for index in common]
    return _interval(rows, lambda sums: _share(sums[:, :2]) - _share(sums[:, 2:]))


def _share(sums: Rows) -> NDArray[np.float64]:
    right, asked = sums.T
    return np.asarray(right / asked, dtype=np.float64)


def _interval(questions: Sequence[tuple[int, ...]], estimate: Estimate) -> Interval | None:
    if not questions:
        return None
    rows = np.array(questions, dtype=np.int64)
    low, high = np.quantile(estimate(_resampled(rows)), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value=float(estimate(rows.sum(0, keepdims=True))[0]), low=float(low), high=float(high))


def _resampled(rows: Rows) -> Rows:
    """The sums over as many rows, drawn with replacement, RESAMPLES times.

    Equal rows are interchangeable, and there are few kinds of them, so what is drawn is how many there are of each
    kind. That is the multinomial distribution: the same as of rows drawn one by one, at a small part of the cost.
    """
    kinds, counts = np.unique(rows, axis=0, return_counts=True)
    rng = np.random.default_rng(0)
    shares = counts / len(rows)
    sums = [rng.multinomial(len(rows), shares, size=CHUNK) @ kinds for _ in range(RESAMPLES // CHUNK)]
    return np.concatenate(sums)
