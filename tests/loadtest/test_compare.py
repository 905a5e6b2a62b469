"""Two runs compared: every way to regress, and changes that are no regression."""

import math

import pytest

from loadtest.compare import accuracy_change, compare
from loadtest.results import Interval
from tests.loadtest.example import comparison, config, interval, results, stage

BEFORE = config("a", 10.0, 0.6)


def regressions(after, before=BEFORE, tolerance=0.05):
    """Return the lines on regressions from a comparison of one config."""
    lines, regressed = compare(results(before), results(after), tolerance)
    found = [line for line in lines if line.startswith("REGRESSED")]
    assert regressed is bool(found)
    return found


def test_equal_runs_have_no_regression():
    lines, regressed = compare(results(BEFORE), results(BEFORE))
    assert not regressed
    assert lines[-1] == "No regression."
    assert "1.000" in lines[1] and "+0.000" in lines[1]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"answers_per_second": interval(9.0)}, "answers/s"),
        ({"output_tokens_per_second": interval(2700.0)}, "tokens/s"),
        ({"e2e_p50": 0.9}, "E2E p50"),
        ({"e2e_p99": 1.8}, "E2E p99"),
        ({"ttft_p50": 0.06}, "TTFT p50"),
        ({"ttft_p99": 0.12}, "TTFT p99"),
        ({"accuracy": Interval(value=0.53, low=0.50, high=0.56)}, "accuracy"),
    ],
)
def test_each_figure_can_regress_alone(change, name):
    # Without stages, as with one repetition, the range of a latency is a point.
    before, after = (results(one, stages=[]) for one in (BEFORE, BEFORE.model_copy(update=change)))
    lines, regressed = compare(before, after)
    assert regressed
    [line] = [line for line in lines if line.startswith("REGRESSED")]
    assert line.startswith(f"REGRESSED: a, closed 8: {name} ")
    assert compare(after, before)[1] is False, "in the other direction it is an improvement"


def test_worse_within_the_tolerance_is_no_regression():
    assert not regressions(config("a", 9.7, 0.6, answers_per_second=interval(9.7, 0.0)))
    assert regressions(BEFORE.model_copy(update={"answers_per_second": interval(9.7, 0.0)}), tolerance=0.01)


def test_worse_within_the_ranges_is_only_marked():
    wide = BEFORE.model_copy(update={"answers_per_second": Interval(value=8.0, low=7.0, high=9.9)})
    lines, regressed = compare(results(BEFORE), results(wide))
    assert not regressed
    assert "0.800?" in lines[1]


def test_latency_has_the_range_of_its_valid_repetitions():
    after = BEFORE.model_copy(update={"e2e_p50": 0.9})
    fast = stage(after, 1).model_copy(update={"latency": stage(BEFORE).latency})
    slow = [stage(after, 0), stage(after, 2)]
    before = results(BEFORE)
    assert not compare(before, results(after, stages=[*slow, fast]))[1], "one was as fast as before"
    assert compare(before, results(after, stages=[*slow, fast.model_copy(update={"invalid": ["late"]})]))[1]


def test_accuracy_within_the_intervals_is_no_regression():
    assert not regressions(config("a", 10.0, 0.545))
    assert regressions(config("a", 10.0, 0.53))


def test_accuracy_has_no_tolerance():
    sure, surely_less = (Interval(value=x, low=x - 0.001, high=x + 0.001) for x in (0.6, 0.59))
    before, after = (BEFORE.model_copy(update={"accuracy": one}) for one in (sure, surely_less))
    assert regressions(after, before, tolerance=0.5)


def test_a_missing_config_has_regressed():
    lines, regressed = compare(results(BEFORE, config("b", 5.0, 0.5)), results(BEFORE))
    assert regressed
    assert any(line.startswith("REGRESSED: b: missing in the later run") for line in lines)
    assert not compare(results(BEFORE), results(BEFORE, config("b", 5.0, 0.5)))[1], "a new config has not"


def test_a_missing_load_has_regressed_unless_a_sweep_chose_it():
    both, one = results(BEFORE, config("a", 12.0, 0.6, "closed 16")), results(BEFORE)
    lines, regressed = compare(both, one)
    assert regressed
    assert any(line.startswith("REGRESSED: a, closed 16: missing in the later run") for line in lines)
    swept = both.model_copy(update={"scenario": {**both.scenario, "loads": [{"type": "sweep"}]}})
    assert not compare(swept, one)[1]


@pytest.mark.parametrize("missing", [None, math.nan])
def test_a_figure_that_was_not_measured_has_not_regressed(missing):
    after = BEFORE.model_copy(update={"e2e_p50": missing, "accuracy": None})
    lines, regressed = compare(results(BEFORE), results(after, stages=[]))
    assert not regressed
    assert lines[1].count("\u2013") == 2


def test_differences_between_the_runs_are_warnings():
    other = results(BEFORE, failed=["too late"])
    other.run.model = "other"
    other.scenario["task"] = {"type": "gsm8k"}
    lines, _ = compare(results(BEFORE), other)
    assert lines[0] == "WARNING: different model: demo before, other after"
    assert lines[1].startswith("WARNING: different task: ")
    assert lines[2] == "WARNING: the run after failed: too late"


@pytest.mark.parametrize("tolerance", [-0.1, math.nan])
def test_a_tolerance_must_not_be_negative_or_nan(tolerance):
    with pytest.raises(ValueError, match="tolerance"):
        compare(results(BEFORE), results(BEFORE), tolerance)


def test_accuracy_change_is_paired_if_the_results_compare_both():
    one, other = config("a", 10.0, 0.6), config("b", 10.0, 0.5)
    of = results(one, other, comparisons=[comparison(other, one)])
    change, method = accuracy_change(of, "a", "b", "closed 8")
    assert (change.value, change.low, change.high) == pytest.approx((-0.1, -0.12, -0.08))
    assert method == "paired by question"
    change, _ = accuracy_change(of, "b", "a", "closed 8")
    assert (change.value, change.low, change.high) == pytest.approx((0.1, 0.08, 0.12))


def test_accuracy_change_from_two_intervals_is_wider():
    one, other = (
        config(name, 10.0, value).model_copy(
            update={"accuracy": Interval(value=value, low=value - 0.03, high=value + 0.04)}
        )
        for name, value in (("a", 0.6), ("b", 0.5))
    )
    change, _ = accuracy_change(results(one, other, comparisons=[]), "a", "b", "closed 8")
    # Down: 0.03 of b and 0.04 of a; up: 0.04 of b and 0.03 of a. By Pythagoras 0.05 both.
    assert (change.value, change.low, change.high) == pytest.approx((-0.1, -0.15, -0.05))
    assert accuracy_change(results(one, config("b", 1.0, None)), "a", "b", "closed 8") is None
