"""Plots: what they show, and when there is nothing to draw."""

import math

from loadtest import plots
from tests.loadtest.example import config, interval, results


def test_the_pareto_front_leaves_out_points_that_another_beats():
    points = [(1.0, 0.6), (2.0, 0.5), (2.0, 0.55), (1.5, 0.5), (3.0, 0.4)]
    assert plots.pareto_front(points) == [(3.0, 0.4), (2.0, 0.55), (1.0, 0.6)]


def test_plots_without_data_are_none():
    of = results(config("a", 5.0, None, output_tokens_per_second=interval(math.nan)))
    assert plots.pareto(of, "closed 8") is None
    assert plots.accuracy_by_config(of, "closed 8") is None
    assert plots.entropy_histograms(of, "closed 8") is None
    assert plots.tokens(of, "closed 8") is None
    assert plots.latency_against_throughput(of) is None, "one load"
