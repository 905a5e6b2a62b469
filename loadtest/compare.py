"""Compares two runs of the same scenario, before and after a change, and finds regressions.

A figure has regressed if it is worse by more than the tolerance and its range does not overlap the earlier range.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from loadtest.formats import NOT_MEASURED
from loadtest.results import ConfigResult, Interval, Percentiles, Results, StageResult

Verdict = Literal["", "?", "!"]  # no worse, or within the tolerance; worse but within the ranges; regressed
Key = tuple[str, str]  # a config's name and a load's label


@dataclass(frozen=True)
class Quantity:
    """A figure to compare: a column of the table."""

    name: str
    find: Callable[[Results, ConfigResult], Interval | None]
    lower_is_better: bool = False
    difference: bool = False  # compared by difference, not ratio: no tolerance, the 95 % intervals decide


@dataclass(frozen=True)
class Change:
    """One quantity of one config under one load; None if it was not measured."""

    key: Key
    quantity: Quantity
    before: Interval | None
    after: Interval | None

    def verdict(self, tolerance: float) -> Verdict:
        """Return whether it is worse by more than `tolerance` (a share of the earlier value), and beyond the ranges."""
        if self.before is None or self.after is None:
            return ""
        old, new = (self.before, self.after) if not self.quantity.lower_is_better else (self.after, self.before)
        allowed = 0.0 if self.quantity.difference else tolerance * abs(self.before.value)
        if old.value - new.value <= allowed:
            return ""
        return "!" if new.high < old.low else "?"

    def cell(self, tolerance: float) -> str:
        """Format the change as after / before, or as after - before."""
        if self.before is None or self.after is None:
            return NOT_MEASURED
        if self.quantity.difference:
            text = f"{self.after.value - self.before.value:+.3f}"
        else:
            text = f"{self.after.value / self.before.value:.3f}" if self.before.value else NOT_MEASURED
        return text + self.verdict(tolerance)


def compare(before: Results, after: Results, tolerance: float = 0.05) -> tuple[list[str], bool]:
    """Find regressions.

    Rates and latencies regress if they are worse by more than `tolerance` and the ranges over repetitions do not
    overlap. The range of a latency is that of the valid repetitions; with one repetition it is a point, and the
    tolerance alone decides. Accuracy regresses if its 95 % interval lies entirely below the earlier one. A missing
    config has regressed; so has a missing load, unless a sweep chose the loads. A figure that was not measured in
    both runs has not.

    Args:
        before: the earlier run.
        after: the later run.
        tolerance: share of the earlier value.

    Returns:
        Lines of text (warnings, a table of ratios after / before, the regressions), and whether there are regressions.

    Raises:
        ValueError: if the tolerance is negative or not a number.
    """
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"tolerance: got {tolerance}; must be 0 or more")
    changes = _changes(before, after)
    missing = list(_missing(before, after))
    worse = [
        _sentence(change) for changed in changes.values() for change in changed if change.verdict(tolerance) == "!"
    ]
    lines = [*_warnings(before, after), *_table(changes, tolerance)]
    lines += [f"REGRESSED: {line}" for line in missing + worse] or ["No regression."]
    return lines, bool(missing or worse)


def accuracy_change(results: Results, old: str, new: str, load: str) -> tuple[Interval, str] | None:
    """Return the accuracy of config `new` minus that of `old` under a load, with its 95 % interval, and the method.

    Paired by question if the results compare the two; else from both configs' intervals as if their questions were
    independent, which is wider. None if an accuracy was not measured.
    """
    for one in results.comparisons:
        paired = one.accuracy_difference
        if one.load == load and paired and (one.config, one.reference) == (new, old):
            return paired, "paired by question"
        if one.load == load and paired and (one.config, one.reference) == (old, new):
            return Interval(value=-paired.value, low=-paired.high, high=-paired.low), "paired by question"
    found = {config.config: _finite(config.accuracy) for config in results.configs if config.load == load}
    before, after = found.get(old), found.get(new)
    if before is None or after is None:
        return None
    value = after.value - before.value
    low = value - math.hypot(after.value - after.low, before.high - before.value)
    high = value + math.hypot(after.high - after.value, before.value - before.low)
    return Interval(value=value, low=low, high=high), "from both intervals, not paired"


def _finite(interval: Interval | None) -> Interval | None:
    """Return the interval, or None if a bound is not a finite number: it was not measured."""
    if interval is None or not all(map(math.isfinite, (interval.value, interval.low, interval.high))):
        return None
    return interval


def _latency(field: Literal["e2e", "ttft"], percentile: Literal["p50", "p99"]) -> Quantity:
    def of_stage(stage: StageResult) -> float | None:
        found: Percentiles | None = getattr(stage.latency, field)
        return None if found is None else getattr(found, percentile)

    def find(results: Results, config: ConfigResult) -> Interval | None:
        value: float | None = getattr(config, f"{field}_{percentile}")
        key = (config.config, config.load)
        stages = [one for one in results.stages if (one.config, one.load) == key and not one.invalid]
        values = [*filter(lambda found: found is not None and math.isfinite(found), map(of_stage, stages)), value]
        known = [one for one in values if one is not None]
        return None if value is None else _finite(Interval(value=value, low=min(known), high=max(known)))

    return Quantity(f"{field.upper()} {percentile}", find, lower_is_better=True)


QUANTITIES = (
    Quantity("answers/s", lambda _, config: _finite(config.answers_per_second)),
    Quantity("tokens/s", lambda _, config: _finite(config.output_tokens_per_second)),
    _latency("e2e", "p50"),
    _latency("e2e", "p99"),
    _latency("ttft", "p50"),
    _latency("ttft", "p99"),
    Quantity("accuracy", lambda _, config: _finite(config.accuracy), difference=True),
)


def _changes(before: Results, after: Results) -> dict[Key, list[Change]]:
    """Compare every config and load that both runs have."""
    later = {(config.config, config.load): config for config in after.configs}
    return {
        key: [
            Change(key, quantity, quantity.find(before, config), quantity.find(after, later[key]))
            for quantity in QUANTITIES
        ]
        for config in before.configs
        if (key := (config.config, config.load)) in later
    }


def _missing(before: Results, after: Results) -> Iterator[str]:
    """Yield the configs and loads that the later run lacks."""
    keys = {(config.config, config.load) for config in after.configs}
    names = {name for name, _ in keys}
    for name in dict.fromkeys(config.config for config in before.configs if config.config not in names):
        yield f"{name}: missing in the later run, or without a valid repetition"
    if not _has_sweep(before):
        for config in before.configs:
            if config.config in names and (config.config, config.load) not in keys:
                yield f"{config.config}, {config.load}: missing in the later run, or without a valid repetition"


def _has_sweep(results: Results) -> bool:
    loads: Any = results.scenario.get("loads")
    return isinstance(loads, list) and any(isinstance(load, dict) and load.get("type") == "sweep" for load in loads)


def _warnings(before: Results, after: Results) -> Iterator[str]:
    what = {
        "model": (before.run.model, after.run.model),
        "task": (before.scenario.get("task"), after.scenario.get("task")),
        "machine": (before.run.machine, after.run.machine),
    }
    for name, (old, new) in what.items():
        if old != new:
            yield f"WARNING: different {name}: {old} before, {new} after"
    for when, results in (("before", before), ("after", after)):
        for reason in results.failed:
            yield f"WARNING: the run {when} failed: {reason}"


def _sentence(change: Change) -> str:
    assert change.before and change.after, "a verdict has both"
    old, new = (f"{one.value:.4g} ({one.low:.4g} to {one.high:.4g})" for one in (change.before, change.after))
    return f"{change.key[0]}, {change.key[1]}: {change.quantity.name} {old} before, {new} after"


def _table(changes: dict[Key, list[Change]], tolerance: float) -> list[str]:
    """Format the changes in columns, with a legend for the marks."""
    if not changes:
        return ["The runs have no config and load in common."]
    heading = ["config", "load", *(quantity.name for quantity in QUANTITIES)]
    rows = [heading, *([*key, *(change.cell(tolerance) for change in changed)] for key, changed in changes.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heading))]
    legend = f"After / before; accuracy: after - before. ! regressed; ? worse by more than {tolerance:.0%}"
    return [*(_row(row, widths) for row in rows), f"{legend} (accuracy: by any amount), but the ranges overlap."]


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Align names to the left and numbers to the right."""
    placed = (
        cell.ljust(width) if column < 2 else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join(placed).rstrip()
