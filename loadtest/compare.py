"""Two runs of the same comparison, before and after a change: what has become worse, by more than chance.

A figure has regressed if it is worse by more than the tolerance and its range shares nothing with the earlier range.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from loadtest.results import ArmResult, Interval, Percentiles, Results, StageResult

NOTHING = "\u2013"  # stands for what was not measured
Verdict = Literal["", "?", "!"]  # no worse, or within the tolerance; worse but within the ranges; regressed
Key = tuple[str, str]  # an arm's name and a load's label


@dataclass(frozen=True)
class Quantity:
    """A column of the table."""

    name: str
    find: Callable[[Results, ArmResult], Interval | None]
    lower_is_better: bool = False
    difference: bool = False  # rather than a ratio; its tolerance is 0, its 95 % interval decides


@dataclass(frozen=True)
class Change:
    """One quantity of one arm under one load; ranges are None where it was not measured."""

    key: Key
    quantity: Quantity
    before: Interval | None
    after: Interval | None

    def verdict(self, tolerance: float) -> Verdict:
        """Whether it is worse by more than `tolerance`, a share of the earlier value, and beyond the ranges."""
        if self.before is None or self.after is None:
            return ""
        old, new = (self.before, self.after) if not self.quantity.lower_is_better else (self.after, self.before)
        allowed = 0.0 if self.quantity.difference else tolerance * abs(self.before.value)
        if old.value - new.value <= allowed:
            return ""
        return "!" if new.high < old.low else "?"

    def cell(self, tolerance: float) -> str:
        """After by before, or after less before."""
        if self.before is None or self.after is None:
            return NOTHING
        if self.quantity.difference:
            text = f"{self.after.value - self.before.value:+.3f}"
        else:
            text = f"{self.after.value / self.before.value:.3f}" if self.before.value else NOTHING
        return text + self.verdict(tolerance)


def compare(before: Results, after: Results, tolerance: float = 0.05) -> tuple[list[str], bool]:
    """What has become worse.

    Rates, and latencies: worse by more than `tolerance`, and no overlap of the ranges over repetitions. An arm's
    latencies have no interval: their range is that of its valid repetitions; with one repetition a range is a point,
    and the tolerance alone decides. Accuracy: the 95 % interval lies wholly below the earlier one. An arm that is gone
    has regressed; so has a load, unless a sweep chose the loads. What was not measured in both has not.

    Args:
        before: The earlier run.
        after: The later one.
        tolerance: A share of the earlier value.

    Returns:
        Lines of text: warnings, a table of ratios (after by before), what regressed; and whether anything did.

    Raises:
        ValueError: The tolerance is negative, or not a number.
    """
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"tolerance: got {tolerance}; must be 0 or more")
    changes = _changes(before, after)
    gone = list(_gone(before, after))
    worse = [
        _sentence(change) for changed in changes.values() for change in changed if change.verdict(tolerance) == "!"
    ]
    lines = [*_warnings(before, after), *_table(changes, tolerance)]
    lines += [f"REGRESSED: {line}" for line in gone + worse] or ["No regression."]
    return lines, bool(gone or worse)


def accuracy_change(results: Results, frm: str, to: str, load: str) -> tuple[Interval, str] | None:
    """The accuracy of arm `to` less that of `frm` under a load, with its 95 % interval, and how that was found.

    Paired by question where the results compare the two; else from both arms' intervals as if the questions were
    others, which is wider. None where an accuracy is missing.
    """
    for one in results.comparisons:
        paired = one.accuracy_difference
        if one.load == load and paired and (one.arm, one.reference) == (to, frm):
            return paired, "paired by question"
        if one.load == load and paired and (one.arm, one.reference) == (frm, to):
            return Interval(value=-paired.value, low=-paired.high, high=-paired.low), "paired by question"
    found = {arm.arm: _finite(arm.accuracy) for arm in results.arms if arm.load == load}
    old, new = found.get(frm), found.get(to)
    if old is None or new is None:
        return None
    value = new.value - old.value
    low = value - math.hypot(new.value - new.low, old.high - old.value)
    high = value + math.hypot(new.high - new.value, old.value - old.low)
    return Interval(value=value, low=low, high=high), "from both intervals, not paired"


def _finite(interval: Interval | None) -> Interval | None:
    """None where any of it is not a number: it was not measured."""
    if interval is None or not all(map(math.isfinite, (interval.value, interval.low, interval.high))):
        return None
    return interval


def _latency(field: Literal["e2e", "ttft"], quantile: Literal["p50", "p99"]) -> Quantity:
    def of_stage(stage: StageResult) -> float | None:
        found: Percentiles | None = getattr(stage.latency, field)
        return None if found is None else getattr(found, quantile)

    def find(results: Results, arm: ArmResult) -> Interval | None:
        value: float | None = getattr(arm, f"{field}_{quantile}")
        stages = [one for one in results.stages if (one.arm, one.load) == (arm.arm, arm.load) and not one.invalid]
        values = [*filter(lambda found: found is not None and math.isfinite(found), map(of_stage, stages)), value]
        known = [one for one in values if one is not None]
        return None if value is None else _finite(Interval(value=value, low=min(known), high=max(known)))

    return Quantity(f"{field.upper()} {quantile}", find, lower_is_better=True)


QUANTITIES = (
    Quantity("answers/s", lambda _, arm: _finite(arm.answers_per_second)),
    Quantity("tokens/s", lambda _, arm: _finite(arm.output_tokens_per_second)),
    _latency("e2e", "p50"),
    _latency("e2e", "p99"),
    _latency("ttft", "p50"),
    _latency("ttft", "p99"),
    Quantity("accuracy", lambda _, arm: _finite(arm.accuracy), difference=True),
)


def _changes(before: Results, after: Results) -> dict[Key, list[Change]]:
    """Of the arms and loads that both have."""
    later = {(arm.arm, arm.load): arm for arm in after.arms}
    return {
        key: [
            Change(key, quantity, quantity.find(before, arm), quantity.find(after, later[key]))
            for quantity in QUANTITIES
        ]
        for arm in before.arms
        if (key := (arm.arm, arm.load)) in later
    }


def _gone(before: Results, after: Results) -> Iterator[str]:
    """What was measured and is no more, and has to be."""
    names, keys = {arm.arm for arm in after.arms}, {(arm.arm, arm.load) for arm in after.arms}
    for name in dict.fromkeys(arm.arm for arm in before.arms if arm.arm not in names):
        yield f"{name}: there is no such arm any more, or none of its repetitions is valid"
    if not _sweeps(before):
        for arm in before.arms:
            if arm.arm in names and (arm.arm, arm.load) not in keys:
                yield f"{arm.arm}, {arm.load}: not measured any more, or no repetition of it is valid"


def _sweeps(results: Results) -> bool:
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
            yield f"WARNING: another {name}: {old} before, {new} after"
    for when, results in (("before", before), ("after", after)):
        for reason in results.failed:
            yield f"WARNING: the run {when} had failed: {reason}"


def _sentence(change: Change) -> str:
    assert change.before and change.after, "a verdict has both"
    old, new = (f"{one.value:.4g} ({one.low:.4g} to {one.high:.4g})" for one in (change.before, change.after))
    return f"{change.key[0]}, {change.key[1]}: {change.quantity.name} {old} before, {new} after"


def _table(changes: dict[Key, list[Change]], tolerance: float) -> list[str]:
    """In columns, with what the marks mean."""
    if not changes:
        return ["No arm and load is in both."]
    heading = ["arm", "load", *(quantity.name for quantity in QUANTITIES)]
    rows = [heading, *([*key, *(change.cell(tolerance) for change in changed)] for key, changed in changes.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heading))]
    legend = f"After by before; accuracy: the difference. ! regressed; ? worse by more than {tolerance:.0%}"
    return [*(_row(row, widths) for row in rows), f"{legend} (accuracy: at all), within the ranges."]


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Names to the left, numbers to the right."""
    placed = (
        cell.ljust(width) if column < 2 else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join(placed).rstrip()
