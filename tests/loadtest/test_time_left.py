"""The time that a run has left."""

import pytest

from loadtest.time_left import CALIBRATION, Part, TimeLeft
from tests.loadtest.example import scenario

CONFIGS = {"one": {"body": {"em_inf": {}}}, "vote": {"vote": {"n": 4}}}
ONE, VOTE = ("one", "closed 2"), ("vote", "closed 2")
LOADS = [{"type": "closed", "concurrency": 2}]


def two_configs(**changes: object) -> TimeLeft:
    """Return what is left of two configs with two repetitions of 100 questions."""
    return TimeLeft(scenario(**{"arms": CONFIGS, "loads": LOADS, "repetitions": 2} | changes), 100)


def test_it_is_unknown_before_anything_is_measured() -> None:
    left = two_configs()
    assert left.stages == 4
    assert left.seconds() is None
    assert left.seconds(Part(ONE, 100, 0, 0, 50.0)) is None


def test_each_config_goes_on_as_fast_as_it_was_and_others_as_the_average() -> None:
    left = two_configs()
    left.ended(Part(ONE, 100, 100, 100, 50.0))
    assert left.seconds() == pytest.approx(100 * 0.5 + 200 * 0.5)
    left.ended(Part(VOTE, 100, 100, 100, 400.0))
    assert left.seconds() == pytest.approx(100 * 0.5 + 100 * 4.0)


def test_a_running_stage_counts_as_far_as_it_is() -> None:
    left = two_configs()
    running = Part(ONE, 100, 25, 25, 50.0)
    assert left.seconds(running) == pytest.approx((75 + 100 + 200) * 2.0)
    assert left.seconds(running) == left.seconds(running), "asking changes nothing"
    left.ended(Part(ONE, 100, 100, 100, 100.0))
    too_few = Part(VOTE, 100, 5, 5, 300.0)
    assert left.seconds(too_few) == pytest.approx(100 * 1.0 + (95 + 100) * 1.0)


def test_what_an_earlier_sitting_did_is_not_left_and_says_nothing_of_the_speed() -> None:
    left = two_configs()
    left.ended(Part(ONE, 100, 100, 0, 0.0))
    assert left.seconds() is None
    assert left.seconds(Part(ONE, 100, 60, 20, 40.0)) == pytest.approx((40 + 200) * 2.0)


def test_a_calibration_counts_with_its_most_passes_until_it_has_ended() -> None:
    left = two_configs(arms=CONFIGS | {"matched": {"match_entropy_of": "one"}})
    kind = ("matched", CALIBRATION)
    left.ended(Part(kind, 64, 64, 64, 64.0))
    assert left.seconds() == pytest.approx(3 * 64 + 3 * 200)
    left.ended(Part(kind, 64, 64, 64, 64.0))
    assert left.seconds() == pytest.approx(2 * 64 + 3 * 200)
    left.calibrated("another")
    assert left.seconds() == pytest.approx(2 * 64 + 3 * 200)
    left.calibrated("matched")
    assert left.seconds() == pytest.approx(3 * 200)


def test_a_calibration_of_an_earlier_sitting_is_not_left() -> None:
    left = two_configs(arms=CONFIGS | {"matched": {"match_entropy_of": "one"}})
    left.calibrated()
    left.ended(Part(ONE, 100, 100, 100, 100.0))
    assert left.seconds() == pytest.approx(5 * 100)


def test_a_sweep_has_no_known_end() -> None:
    left = two_configs(loads=[*LOADS, {"type": "sweep"}])
    left.ended(Part(ONE, 100, 100, 100, 100.0))
    assert left.stages is None
    assert left.seconds() is None
