"""The report of the serving benchmark."""

from benchmarks.serving.configs import ON, PLAIN
from benchmarks.serving.report import Measurement, rates_of


def test_rates_leave_the_warm_up_out():
    measurements = [
        Measurement(4, -1, ON, 1.0),
        Measurement(4, 0, ON, 2.0),
        Measurement(4, 0, PLAIN, 3.0),
        Measurement(1, 0, ON, 4.0),
    ]
    assert rates_of(measurements, 4, ON) == [2.0]
