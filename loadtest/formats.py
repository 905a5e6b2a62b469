"""Numbers as text for people: three significant digits, units, ranges; a dash for what was not measured."""

import math

from loadtest.results import Interval

NOT_MEASURED = "\u2013"  # an en dash


def number(value: float | None) -> str:
    """Format a number with three significant digits, or with all digits before the point."""
    if value is None or not math.isfinite(value):
        return NOT_MEASURED
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def seconds(value: float | None) -> str:
    """Format a duration in ms or s."""
    if value is None or not math.isfinite(value):
        return NOT_MEASURED
    return f"{number(value * 1000)} ms" if abs(value) < 1 else f"{number(value)} s"


def percent(value: float | None) -> str:
    """Format a share from 0 to 1 as a percentage."""
    return NOT_MEASURED if value is None or not math.isfinite(value) else f"{value:.1%}"


def interval(value: Interval | None) -> str:
    """Format an estimate with its range."""
    if value is None:
        return NOT_MEASURED
    return f"{number(value.value)} ({number(value.low)} to {number(value.high)})"


def difference(value: Interval | None) -> str:
    """Format a difference with its range, all with signs."""
    if value is None or not math.isfinite(value.value):
        return NOT_MEASURED
    return f"{value.value:+.3f} ({value.low:+.3f} to {value.high:+.3f})"


def duration(value: float) -> str:
    """Format a time to wait, as exact as an estimate can be: seconds, minutes, or hours and minutes."""
    minutes = round(value / 60)
    if value < 90:
        return f"{value:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
