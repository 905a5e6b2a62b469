"""Intervals of known ratios and values: they include what they should about as often as they should."""

import numpy as np
import pytest

from benchmarks.intervals import median_and_range, paired_ratios, ratio_interval, t_interval


def rounds(ratio, count=30, noise=0.05):
    """Return rates of two configs in rounds that differ by much more than the configs do."""
    rng = np.random.default_rng(1)
    base = 1000 * np.exp(rng.normal(0, 0.5, count))
    return base * ratio * np.exp(rng.normal(0, noise, count)), base


def test_interval_of_equal_configs_includes_1():
    low, high = ratio_interval(paired_ratios(*rounds(1.0)))
    assert low < 1 < high and high - low < 0.06


def test_interval_of_a_slower_config_excludes_1_and_includes_its_ratio():
    low, high = ratio_interval(paired_ratios(*rounds(0.9)))
    assert low < 0.9 < high < 0.95


def test_interval_without_noise_is_the_ratio():
    assert ratio_interval([0.9] * 5) == pytest.approx((0.9, 0.9))


def test_interval_covers_the_ratio_about_as_often_as_its_level_promises():
    rng = np.random.default_rng(2)
    intervals = [ratio_interval(np.exp(rng.normal(0, 0.1, 20))) for _ in range(200)]
    assert 0.88 <= np.mean([low <= 1 <= high for low, high in intervals]) <= 0.99


def test_interval_is_wider_if_starts_differ():
    """If rounds agree within each of four starts but the starts do not agree, there is little evidence."""
    rng = np.random.default_rng(3)
    ratios = np.exp(np.repeat([0.05, -0.04, 0.06, -0.05], 12) + rng.normal(0, 0.01, 48))
    low, high = ratio_interval(ratios, starts=4)
    assert low < 0.98 and high > 1.02
    assert np.subtract(*ratio_interval(ratios)[::-1]) < 0.6 * (high - low)


def test_median_and_range_shows_median_lowest_and_highest():
    assert median_and_range([3.0, 1.0, 2.04], 1) == "2.0 (1.0 to 3.0)"


def test_t_interval_uses_the_published_quantile_for_three_values():
    mean, half_width = t_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half_width == pytest.approx(4.303 / 3**0.5, rel=1e-4)
    assert t_interval([0.5] * 3) == (0.5, 0.0)
