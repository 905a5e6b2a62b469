"""What a switch saves, against numbers computed by hand."""

import math

import pytest

from loadtest.results import Interval
from loadtest.savings import machine_hours, savings
from tests.loadtest.example import config, results

# 1e6 answers at 2/s are 500,000 s = 138.89 h, at 10/s 27.78 h. Correct: 1/s is 277.78 h, 6/s is 46.30 h.
SLOW, FAST = config("slow", 2.0, 0.5), config("fast", 10.0, 0.6)


def cells(lines, label):
    """Return the cells of the table's row."""
    [line] = [line for line in lines if line.startswith(f"{label} ")]
    return line[len(label) :].split()


def test_all_figures_are_those_computed_by_hand():
    lines = savings(results(SLOW, FAST), "slow", "fast", "closed 8", 3.0, 864_000)
    assert cells(lines, "machine-hours per million answers") == ["138.89", "27.78", "80.0%"]
    assert cells(lines, "cost per million answers") == ["416.67", "83.33", "80.0%"]
    assert cells(lines, "machine-hours per million correct answers") == ["277.78", "46.30", "83.3%"]
    assert cells(lines, "cost per million correct answers") == ["833.33", "138.89", "83.3%"]
    # 1 - 2.04/9.8 and 1 - 1.96/10.2
    assert "Saving per answer: 80.0%; by the ranges over repetitions 79.2% to 80.8%" in lines
    # 864,000 answers: 120 h and 24 h.
    assert "Per day, 864,000 answers: 120.00 to 24.00 machine-hours, 360.00 to 72.00; saves 288.00" in lines
    assert any(line.startswith("Per month, 25,920,000 answers: 3,600.00 to 720.00 machine-hours") for line in lines)
    assert "Accuracy: +0.100, 95 % interval +0.080 to +0.120 (paired by question)" in lines
    assert not any("WARNING" in line for line in lines)


def test_without_a_workload_there_are_no_figures_per_day():
    assert not any(line.startswith("Per ") for line in savings(results(SLOW, FAST), "slow", "fast", None, 3.0, None))


def test_a_switch_may_cost_more_and_lower_the_accuracy():
    lines = savings(results(SLOW, FAST), "fast", "slow", None, 3.0, None)
    assert cells(lines, "cost per million answers") == ["83.33", "416.67", "-400.0%"]
    assert lines[-1] == "WARNING: accuracy is lower."


def test_a_loss_of_accuracy_that_is_not_excluded_is_a_warning():
    same = config("fast", 10.0, 0.51)
    lines = savings(results(SLOW, same), "slow", "fast", None, 3.0, None)
    assert lines[-1] == "WARNING: the interval includes a loss of accuracy."


def test_accuracy_that_was_not_measured_is_a_warning():
    lines = savings(results(SLOW, config("fast", 10.0, None)), "slow", "fast", None, 3.0, None)
    assert cells(lines, "cost per million correct answers") == ["833.33", "\u2013", "\u2013"]
    assert lines[-1].startswith("WARNING: accuracy was not measured for both")


def test_the_default_load_is_that_at_which_the_old_config_is_fastest():
    slower = [
        config("slow", 1.0, 0.5, "closed 1"),
        config("fast", 3.0, 0.6, "closed 1"),
        config("slow", 9.0, 0.5, "closed 64"),
    ]
    of = results(SLOW, FAST, *slower)
    assert "under closed 8," in savings(of, "slow", "fast", None, 3.0, None)[0]
    assert "under closed 1," in savings(of, "slow", "fast", "closed 1", 3.0, None)[0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"old": "x"}, "config: got 'x'; configs are slow, fast"),
        ({"new": "x"}, "config: got 'x'; configs are slow, fast"),
        ({"load": "closed 9"}, "load: got 'closed 9'; loads of both configs are closed 8"),
        ({"price_per_hour": 0.0}, "price_per_hour: got 0.0; must be above 0"),
        ({"price_per_hour": math.nan}, "price_per_hour: got nan; must be above 0"),
        ({"answers_per_day": -1.0}, "answers_per_day: got -1.0; must be above 0"),
    ],
)
def test_errors_name_what_is_allowed(change, says):
    asked = {"old": "slow", "new": "fast", "load": None, "price_per_hour": 3.0, "answers_per_day": None}
    with pytest.raises(ValueError, match=says):
        savings(results(SLOW, FAST), **asked | change)


def test_configs_without_a_load_in_common():
    with pytest.raises(ValueError, match="loads of both configs are none"):
        savings(results(SLOW, config("fast", 3.0, 0.6, "closed 1")), "slow", "fast", None, 3.0, None)


def test_a_config_that_answered_nothing():
    dead = config("fast", 10.0, 0.6, answers_per_second=Interval(value=0.0, low=0.0, high=0.0))
    with pytest.raises(ValueError, match="fast answered nothing under closed 8"):
        savings(results(SLOW, dead, comparisons=[]), "slow", "fast", None, 3.0, None)


def test_machine_hours():
    assert machine_hours(7200, Interval(value=2.0, low=1.0, high=3.0)) == 1.0
    assert machine_hours(7200, None) is None
