"""Estimates against known answers: percentiles against NumPy's, intervals by how often they contain the truth."""

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.intervals import accuracy_interval, median_and_range, paired_difference, percentiles
from loadtest.results import Interval


def asked(chances: np.ndarray, repetitions: int, rng: np.random.Generator) -> dict[int, list[bool]]:
    """Draw outcomes of questions that are answered correctly with these probabilities."""
    correct = rng.random((len(chances), repetitions)) < chances[:, None]
    return dict(enumerate(correct.tolist()))


def width(interval: Interval | None) -> float:
    assert interval is not None
    return interval.high - interval.low


# ---- Percentiles and ranges


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60))
def test_percentiles_equal_numpys(values):
    found = percentiles(values)
    assert found is not None and found.count == len(values)
    expected = np.percentile(values, [50, 90, 95, 99], method="linear")
    assert [found.p50, found.p90, found.p95, found.p99] == pytest.approx(expected.tolist(), rel=1e-9, abs=1e-6)
    assert found.mean == pytest.approx(math.fsum(values) / len(values), rel=1e-9, abs=1e-6)


def test_percentiles_interpolate_between_values():
    found = percentiles(iter([4.0, 1.0, 3.0, 2.0]))
    assert found is not None
    assert (found.p50, found.p90, found.p99) == pytest.approx((2.5, 3.7, 3.97))


def test_no_values_have_no_percentiles():
    assert percentiles([]) is None


def test_median_and_range():
    assert median_and_range([5.0, 1.0, 2.0]) == Interval(value=2.0, low=1.0, high=5.0)
    assert median_and_range([4.0, 1.0]) == Interval(value=2.5, low=1.0, high=4.0)


# ---- Intervals of accuracy


def coverage(repetitions: int, as_questions: bool = False, datasets: int = 400) -> float:
    """Return how often the interval contains the true accuracy of 0.6, for questions from hopeless to certain.

    Args:
        repetitions: for each of 80 questions.
        as_questions: pass repetitions as separate questions, which is wrong.
        datasets: how many to draw.
    """
    rng, covered = np.random.default_rng(5), 0
    for _ in range(datasets):
        outcomes = asked(rng.beta(0.6, 0.4, size=80), repetitions, rng)
        if as_questions:
            outcomes = dict(enumerate([correct] for times in outcomes.values() for correct in times))
        interval = accuracy_interval(outcomes)
        assert interval is not None
        covered += interval.low <= 0.6 <= interval.high
    return covered / datasets


@pytest.mark.parametrize("repetitions", [1, 4])
def test_intervals_contain_the_truth_95_times_in_100(repetitions):
    assert 0.92 <= coverage(repetitions) <= 0.98  # with 400 datasets, 0.95 +- 0.022 is within chance


def test_coverage_detects_a_wrong_interval():
    """The interval is too narrow if repetitions are resampled as if they were questions."""
    assert coverage(4, as_questions=True) < 0.85


def test_repeating_equal_outcomes_does_not_narrow_an_interval():
    once = asked(np.full(60, 0.5), 1, np.random.default_rng(0))
    eightfold = {index: times * 8 for index, times in once.items()}
    assert accuracy_interval(eightfold) == accuracy_interval(once)


def test_independent_repetitions_narrow_an_interval():
    rng = np.random.default_rng(0)
    once, often = (accuracy_interval(asked(np.full(200, 0.5), repetitions, rng)) for repetitions in (1, 16))
    assert width(often) == pytest.approx(width(once) / 4, rel=0.15)


def test_an_interval_equals_that_of_questions_drawn_one_by_one():
    """Against a plain bootstrap, with some questions asked more often than others."""
    rng = np.random.default_rng(2)
    outcomes = {index: (rng.random(1 + index % 3) < 0.7).tolist() for index in range(40)}
    correct = np.array([sum(times) for times in outcomes.values()])
    count = np.array([len(times) for times in outcomes.values()])
    drawn = rng.integers(40, size=(20_000, 40))
    low, high = np.quantile(correct[drawn].sum(1) / count[drawn].sum(1), [0.025, 0.975])
    interval = accuracy_interval(outcomes)
    assert interval is not None
    assert interval.value == correct.sum() / count.sum()
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.01)


def test_all_correct_and_none_asked():
    assert accuracy_interval({0: [True], 1: [True]}) == Interval(value=1.0, low=1.0, high=1.0)
    assert accuracy_interval({}) is None
    assert accuracy_interval({0: []}) is None


# ---- Differences


def test_questions_hard_for_both_configs_cancel():
    rng = np.random.default_rng(3)
    chances = rng.choice([0.02, 0.98], size=300)
    a, b = asked(chances, 2, rng), asked(chances, 2, rng)
    unpaired = math.hypot(width(accuracy_interval(a)), width(accuracy_interval(b)))
    assert width(paired_difference(a, b)) < unpaired / 2


def test_nothing_cancels_between_independent_configs():
    rng = np.random.default_rng(4)
    a, b = (asked(rng.choice([0.02, 0.98], size=1000), 2, rng) for _ in range(2))
    unpaired = math.hypot(width(accuracy_interval(a)), width(accuracy_interval(b)))
    assert width(paired_difference(a, b)) == pytest.approx(unpaired, rel=0.12)


def test_differences_contain_the_truth_95_times_in_100():
    rng, covered = np.random.default_rng(6), 0
    for _ in range(400):
        chances = rng.uniform(0, 0.8, size=80)
        interval = paired_difference(asked(chances + 0.2, 2, rng), asked(chances, 2, rng))
        assert interval is not None
        covered += interval.low <= 0.2 <= interval.high
    assert 0.92 <= covered / 400 <= 0.98


def test_only_questions_asked_of_both_count_matched_by_index():
    a = {0: [True], 1: [False], 2: [True], 7: [False]}
    b = {9: [True], 2: [False], 1: [False], 0: [True], 7: []}
    found = paired_difference(a, b)
    assert found is not None and found.value == pytest.approx(1 / 3)
    assert found == paired_difference(
        {index: a[index] for index in (0, 1, 2)}, {index: b[index] for index in (0, 1, 2)}
    )
    assert paired_difference(a, {9: [True]}) is None


def test_a_config_does_not_differ_from_itself():
    outcomes = asked(np.full(50, 0.5), 3, np.random.default_rng(7))
    assert paired_difference(outcomes, outcomes) == Interval(value=0.0, low=0.0, high=0.0)


def test_the_same_input_gives_the_same_interval():
    outcomes = asked(np.full(50, 0.5), 2, np.random.default_rng(8))
    assert accuracy_interval(outcomes) == accuracy_interval(dict(outcomes))


def test_many_questions_take_little_memory():
    """Even if no two questions are alike, which is the most there can be to draw."""
    outcomes = {index: [True] * index + [False] for index in range(2_000)}
    tracemalloc.start()
    try:
        accuracy_interval(outcomes)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 60e6  # all resamples at once take 160 MB
