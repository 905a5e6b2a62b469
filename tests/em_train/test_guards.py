"""The guards, by numbers alone."""

import pytest

from em_train.guards import Evaluation, Limits, repetition, violated_guard

LIMITS = Limits(entropy_floor=0.01, shortest=0.5, longest=2.0, repetition_rise=0.2, score_drop=0.05)
FIRST = Evaluation(entropy=0.3, length=100, repetition=0.1, score=0.6, score_error=0.01)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, None),
        ({"entropy": 0.01, "length": 50, "repetition": 0.3, "score": 0.55}, None),
        ({"length": 200}, None),
        ({"entropy": 0.009}, "entropy 0.009 nats is below the floor of 0.01"),
        ({"length": 49.9}, "outputs have shrunk from 100 tokens to 49.9"),
        ({"length": 200.1}, "outputs have grown from 100 tokens to 200.1"),
        ({"repetition": 0.31}, "has risen from 0.100 to 0.310"),
        ({"score": 0.54}, "the held-out score has fallen from 0.600 to 0.540"),
        ({"score": 0.54, "score_error": 0.04}, None),  # two standard errors are larger
    ],
)
def test_each_guard_at_its_limit(changed: dict[str, float], expected: str | None):
    reason = violated_guard([FIRST, Evaluation(**vars(FIRST) | changed)], LIMITS)
    assert reason is None if expected is None else (reason is not None and expected in reason)


def test_the_score_is_compared_with_the_best_so_far_the_rest_with_the_first():
    better, worse = (
        Evaluation(**vars(FIRST) | {"score": score, "length": length}) for score, length in ((0.8, 60), (0.7, 52))
    )
    assert violated_guard([FIRST, better], LIMITS) is None
    assert "fallen from 0.800 to 0.700" in str(violated_guard([FIRST, better, worse], LIMITS))


def test_without_a_score_no_guard_looks_at_it():
    unscored = Evaluation(0.3, 100, 0.1)
    assert violated_guard([unscored, unscored], LIMITS) is None


def test_repetition_is_the_share_of_8_grams_that_occurred_before():
    assert repetition([1, 2, 3]) == 0.0
    assert repetition(list(range(20))) == 0.0
    assert repetition([7] * 18) == pytest.approx(10 / 11)  # 11 grams, all the same
    assert repetition(list(range(8)) * 2) == pytest.approx(1 / 9)
