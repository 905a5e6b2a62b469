"""What moving a workload from one config to another saves, in machine-hours and money, and how accuracy changes.

A machine is the one that served the load test, under the same load.
"""

import math
from collections.abc import Iterator

from loadtest.compare import accuracy_change
from loadtest.formats import NOT_MEASURED
from loadtest.results import ConfigResult, Interval, Results

MILLION = 1_000_000
DAYS_PER_MONTH = 30


def savings(
    results: Results, old: str, new: str, load: str | None, price_per_hour: float, answers_per_day: float | None
) -> list[str]:
    """Report what is saved by answering with config `new` instead of `old`.

    Args:
        results: results that contain both configs.
        old: name of the config in use.
        new: name of the config to use instead.
        load: a load's label; None for the load, among those that both have, at which `old` answers most per second.
        price_per_hour: price of the machine, in any currency.
        answers_per_day: the workload; None leaves out the savings per day and month (of 30 days).

    Returns:
        Lines of text.

    Raises:
        ValueError: if the results lack a config or the load, the price or the workload is not above 0, or a config
            answered nothing; names what is allowed.
    """
    for name, value in (("price_per_hour", price_per_hour), ("answers_per_day", answers_per_day)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}: got {value}; must be above 0")
    before, after = _pair(results, old, new, load)
    lines = [
        f"From {old} to {new}, under {before.load}, a machine at {price_per_hour:g} per hour:",
        *_table(before, after, price_per_hour),
        _saving_per_answer(before, after),
    ]
    if answers_per_day is not None:
        lines += _by_day(before, after, price_per_hour, answers_per_day)
    return [*lines, *_accuracy(results, before, after)]


def machine_hours(answers: float, per_second: Interval | None) -> float | None:
    """Return the machine-hours for a number of answers; None if the rate is unknown or 0."""
    rate = per_second.value if per_second else 0.0
    return answers / rate / 3600 if math.isfinite(rate) and rate > 0 else None


def _pair(results: Results, old: str, new: str, load: str | None) -> tuple[ConfigResult, ConfigResult]:
    """Return both configs under one load."""
    names = list(dict.fromkeys(config.config for config in results.configs))
    for name in (old, new):
        if name not in names:
            raise ValueError(f"config: got {name!r}; configs are {', '.join(names)}")
    before, after = (
        {config.load: config for config in results.configs if config.config == name} for name in (old, new)
    )
    shared = [label for label in before if label in after]
    if load not in shared and (load is not None or not shared):
        raise ValueError(f"load: got {load!r}; loads of both configs are {', '.join(shared) or 'none'}")
    chosen = load if load is not None else max(shared, key=lambda label: before[label].answers_per_second.value)
    for config in (before[chosen], after[chosen]):
        if machine_hours(1, config.answers_per_second) is None:
            raise ValueError(f"{config.config} answered nothing under {chosen}")
    return before[chosen], after[chosen]


def _table(old: ConfigResult, new: ConfigResult, price: float) -> Iterator[str]:
    """Yield the costs per million answers, and per million correct ones."""
    width = max(len(old.config), len(new.config), 12)
    yield f"{'':40}{old.config:>{width}}  {new.config:>{width}}   saving"
    for name, field in (("answers", "answers_per_second"), ("correct answers", "correct_per_second")):
        hours = [machine_hours(MILLION, getattr(config, field)) for config in (old, new)]
        for unit, factor in (("machine-hours", 1.0), ("cost", price)):
            cells = [f"{NOT_MEASURED if one is None else f'{one * factor:,.2f}':>{width}}" for one in hours]
            label = f"{unit} per million {name}"
            yield f"{label:40}{cells[0]}  {cells[1]}  {_share(*hours):>7}"


def _share(old: float | None, new: float | None) -> str:
    return NOT_MEASURED if old is None or new is None else f"{1 - new / old:.1%}"


def _saving_per_answer(old: ConfigResult, new: ConfigResult) -> str:
    """Return the saving, with the range that the ranges of both rates allow."""
    before, after = old.answers_per_second, new.answers_per_second
    value = 1 - before.value / after.value
    if not all(math.isfinite(one) and one > 0 for one in (before.low, before.high, after.low, after.high)):
        return f"Saving per answer: {value:.1%}"
    low, high = 1 - before.high / after.low, 1 - before.low / after.high
    return f"Saving per answer: {value:.1%}; by the ranges over repetitions {low:.1%} to {high:.1%}"


def _by_day(old: ConfigResult, new: ConfigResult, price: float, answers: float) -> Iterator[str]:
    """Yield the costs of a workload, if machines are busy in proportion to it."""
    hours = [machine_hours(answers, config.answers_per_second) or 0.0 for config in (old, new)]
    for unit, days in (("day", 1), ("month", DAYS_PER_MONTH)):
        before, after = (one * days for one in hours)
        yield (
            f"Per {unit}, {answers * days:,.0f} answers: {before:,.2f} to {after:,.2f} machine-hours, "
            f"{before * price:,.2f} to {after * price:,.2f}; saves {(before - after) * price:,.2f}"
        )


def _accuracy(results: Results, old: ConfigResult, new: ConfigResult) -> Iterator[str]:
    """Yield the change in accuracy, and a warning unless the interval excludes a loss."""
    found = accuracy_change(results, old.config, new.config, old.load)
    if found is None or not math.isfinite(found[0].value):
        yield "WARNING: accuracy was not measured for both: what the saving costs in accuracy is unknown."
        return
    change, method = found
    yield f"Accuracy: {change.value:+.3f}, 95 % interval {change.low:+.3f} to {change.high:+.3f} ({method})"
    if change.value < 0:
        yield "WARNING: accuracy is lower."
    elif not change.low >= 0:
        yield "WARNING: the interval includes a loss of accuracy."
