"""What moving a workload from one arm to another saves, in machine-hours and money, and what it does to accuracy.

A machine is what served the load test, kept as busy as it was then.
"""

import math
from collections.abc import Iterator

from loadtest.compare import NOTHING, accuracy_change
from loadtest.results import ArmResult, Interval, Results

MILLION = 1_000_000
DAYS = 30  # of a month


def roi(
    results: Results, frm: str, to: str, load: str | None, price_per_hour: float, answers_per_day: float | None
) -> list[str]:
    """What is saved by answering with arm `to` rather than with `frm`.

    Args:
        results: With both arms.
        frm: The arm in use.
        to: The arm to use instead.
        load: A load's label; None for the one, of those that both arms have, at which `frm` answers most per second.
        price_per_hour: Of the machine, in any currency.
        answers_per_day: The workload; None leaves out what is saved by day and month (of 30 days).

    Returns:
        Lines of text.

    Raises:
        ValueError: An arm or load that the results lack, a price or workload that is not above 0, or an arm that
            answered nothing; names what is allowed.
    """
    for name, value in (("price_per_hour", price_per_hour), ("answers_per_day", answers_per_day)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}: got {value}; must be above 0")
    old, new = _pair(results, frm, to, load)
    lines = [
        f"From {frm} to {to}, under {old.load}, a machine at {price_per_hour:g} per hour:",
        *_table(old, new, price_per_hour),
        _saving(old, new),
    ]
    if answers_per_day is not None:
        lines += _by_day(old, new, price_per_hour, answers_per_day)
    return [*lines, *_accuracy(results, old, new)]


def machine_hours(answers: float, per_second: Interval | None) -> float | None:
    """For so many answers; None where the rate is not known or 0."""
    rate = per_second.value if per_second else 0.0
    return answers / rate / 3600 if math.isfinite(rate) and rate > 0 else None


def _pair(results: Results, frm: str, to: str, load: str | None) -> tuple[ArmResult, ArmResult]:
    """Both arms under one load."""
    names = list(dict.fromkeys(arm.arm for arm in results.arms))
    for name in (frm, to):
        if name not in names:
            raise ValueError(f"arm: got {name!r}; arms are {', '.join(names)}")
    old, new = ({arm.load: arm for arm in results.arms if arm.arm == name} for name in (frm, to))
    shared = [name for name in old if name in new]
    if load not in shared and (load is not None or not shared):
        raise ValueError(f"load: got {load!r}; loads of both arms are {', '.join(shared) or 'none'}")
    chosen = load if load is not None else max(shared, key=lambda name: old[name].answers_per_second.value)
    for arm in (old[chosen], new[chosen]):
        if machine_hours(1, arm.answers_per_second) is None:
            raise ValueError(f"{arm.arm} answered nothing under {chosen}")
    return old[chosen], new[chosen]


def _table(old: ArmResult, new: ArmResult, price: float) -> Iterator[str]:
    """Per million answers, and per million that are right."""
    width = max(len(old.arm), len(new.arm), 12)
    yield f"{'':40}{old.arm:>{width}}  {new.arm:>{width}}   saving"
    for name, field in (("answers", "answers_per_second"), ("correct answers", "correct_per_second")):
        hours = [machine_hours(MILLION, getattr(arm, field)) for arm in (old, new)]
        for unit, factor in (("machine-hours", 1.0), ("cost", price)):
            cells = [f"{NOTHING if one is None else f'{one * factor:,.2f}':>{width}}" for one in hours]
            label = f"{unit} per million {name}"
            yield f"{label:40}{cells[0]}  {cells[1]}  {_share(*hours):>7}"


def _share(old: float | None, new: float | None) -> str:
    return NOTHING if old is None or new is None else f"{1 - new / old:.1%}"


def _saving(old: ArmResult, new: ArmResult) -> str:
    """Of a million answers, by the ends of both arms' ranges."""
    before, after = old.answers_per_second, new.answers_per_second
    value = 1 - before.value / after.value
    if not all(math.isfinite(one) and one > 0 for one in (before.low, before.high, after.low, after.high)):
        return f"Saving per answer: {value:.1%}"
    low, high = 1 - before.high / after.low, 1 - before.low / after.high
    return f"Saving per answer: {value:.1%}; by the ranges over repetitions {low:.1%} to {high:.1%}"


def _by_day(old: ArmResult, new: ArmResult, price: float, answers: float) -> Iterator[str]:
    """For a workload that keeps machines busy in proportion to it."""
    hours = [machine_hours(answers, arm.answers_per_second) or 0.0 for arm in (old, new)]
    for unit, days in (("day", 1), ("month", DAYS)):
        before, after = (one * days for one in hours)
        yield (
            f"Per {unit}, {answers * days:,.0f} answers: {before:,.2f} to {after:,.2f} machine-hours, "
            f"{before * price:,.2f} to {after * price:,.2f}; saves {(before - after) * price:,.2f}"
        )


def _accuracy(results: Results, old: ArmResult, new: ArmResult) -> Iterator[str]:
    """How it changes, and a warning unless a fall is excluded."""
    found = accuracy_change(results, old.arm, new.arm, old.load)
    if found is None or not math.isfinite(found[0].value):
        yield "WARNING: accuracy was not measured for both: what the saving costs in answers is not known."
        return
    change, how = found
    yield f"Accuracy: {change.value:+.3f}, 95 % interval {change.low:+.3f} to {change.high:+.3f} ({how})"
    if change.value < 0:
        yield "WARNING: accuracy falls."
    elif not change.low >= 0:
        yield "WARNING: the interval includes a fall in accuracy."
