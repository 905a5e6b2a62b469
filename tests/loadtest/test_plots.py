"""Plots: what they show, and when there is nothing to draw."""

import math

import pytest

from loadtest import plots
from tests.loadtest.example import config, interval, results


def test_the_pareto_front_leaves_out_points_that_another_beats():
    points = [(1.0, 0.6), (2.0, 0.5), (2.0, 0.55), (1.5, 0.5), (3.0, 0.4)]
    assert plots.pareto_front(points) == [(3.0, 0.4), (2.0, 0.55), (1.0, 0.6)]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [0.0, 1e-30, 5e-324, -1.0, 1e29, math.inf, math.nan])
def test_values_that_have_no_place_are_left_out_without_a_warning(value):
    odd = {"answers_per_second": interval(value), "e2e_p50": value, "e2e_p99": value, "entropies": [value]}
    of = results(*(config("a \u4e2d", 5.0, 0.5, load, **odd) for load in ("closed 1", "closed 8")), comparisons=[])
    assert plots.pareto(of, "closed 8") is None
    assert plots.latency_against_throughput(of) is None
    assert plots.accuracy_by_config(of, "closed 8") is not None
    assert plots.tokens(of, "closed 8") is None
    assert (plots.entropy_histograms(of, "closed 8") is None) is (value not in (0.0, -1.0))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rate", [1e-9, 1.0, 7.0, 1e9])
def test_a_run_of_one_value_is_drawn_without_a_warning(rate):
    one = [config("a", rate, 1.0, load) for load in ("closed 1", "closed 8")]
    of = results(*one, comparisons=[])
    assert plots.pareto(of, "closed 8")
    assert plots.latency_against_throughput(of)


def test_plots_without_data_are_none():
    of = results(config("a", 5.0, None, output_tokens_per_second=interval(math.nan)))
    assert plots.pareto(of, "closed 8") is None
    assert plots.accuracy_by_config(of, "closed 8") is None
    assert plots.entropy_histograms(of, "closed 8") is None
    assert plots.tokens(of, "closed 8") is None
    assert plots.latency_against_throughput(of) is None, "one load"
