"""Results as files: a page for people, CSV for tables, and the JSON that all else is made of. Each is written whole
or not at all.
"""

import csv
import io
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from pydantic import BaseModel, ValidationError

from loadtest import plots
from loadtest.compare import NOTHING, accuracy_change
from loadtest.results import SCHEMA_VERSION, ArmResult, Comparison, Interval, Latency, Percentiles, Results, StageResult

PARETO_PLOTS = 4  # at most: a sweep has many loads


@dataclass(frozen=True)
class Row:
    """Of a table."""

    cells: Sequence[str]
    invalid: bool = False


@dataclass(frozen=True)
class Section:
    """A table, plots, or both; left out of the page where it has neither."""

    id: str
    title: str
    note: str = ""
    heading: Sequence[str] = ()
    rows: Sequence[Row] = ()
    plots: Sequence[Markup] = field(default=())


def write_html(results: Results, path: Path) -> None:
    """Write one page that needs nothing beside it.

    Raises:
        OSError: It cannot be written; what was at `path` is as it was.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(resources.files("loadtest").joinpath("report.html.jinja").read_text("utf-8"))
    page = template.render(
        results=results,
        alarms=list(_alarms(results)),
        headlines=headlines(results),
        sections=list(_sections(results)),
        scenario=_yaml(results),
    )
    _write(path, page)


def write_csv(results: Results, path: Path) -> None:
    """Write a row per stage: its fields in the schema's order, nested ones joined by `_`, lists and mappings as JSON.

    Raises:
        OSError: As `write_html`.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, _columns(StageResult), lineterminator="\n")
    writer.writeheader()
    writer.writerows(_flat(stage) for stage in results.stages)
    _write(path, text.getvalue())


def write_json(results: Results, path: Path) -> None:
    """Write what `read_json` reads. What is not a number is a string: JSON has no NaN.

    Raises:
        OSError: As `write_html`.
    """
    content = _strict(results.model_dump(mode="json"))
    _write(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Results:
    """The results in a file.

    Raises:
        ValueError: There are none that this version can read; names the file and why.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON, or not all of it: {error}") from None
    if not isinstance(content, dict) or "schema_version" not in content:
        raise ValueError(f"{path}: not the results of a load test: there is no schema_version")
    if content["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"{path}: schema_version {content['schema_version']!r}; this reads {SCHEMA_VERSION}")
    try:
        return Results.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def headlines(results: Results) -> list[tuple[str, list[str]]]:
    """What was found, in words: for each vote, the arms that are no less accurate and how much faster they are.

    A vote is compared under the load at which it answers most per second. Without votes, it is the reference.
    """
    votes = [name for name in plots.arm_names(results) if name in _votes(results)]
    reference = next((one.reference for one in results.comparisons), next(iter(plots.arm_names(results)), None))
    names = votes or ([reference] if reference else [])
    best = [max(_of(results, name), key=lambda arm: arm.answers_per_second.value) for name in names]
    return [_headline(results, arm, votes) for arm in best]


def _headline(results: Results, reference: ArmResult, votes: Sequence[str]) -> tuple[str, list[str]]:
    others = [arm for arm in results.arms if arm.load == reference.load and arm.arm not in (reference.arm, *votes)]
    others.sort(key=lambda arm: arm.answers_per_second.value, reverse=True)
    if reference.accuracy is None:
        title = f"Beside {reference.arm}, under {reference.load}; accuracy was not measured"
        return title, [_times(arm, reference) for arm in others]
    title = f"At no lower accuracy than {reference.arm} ({number(reference.accuracy.value)}), under {reference.load}"
    equal = [arm for arm in others if arm.accuracy and arm.accuracy.value >= reference.accuracy.value]
    return title, [_with_accuracy(results, arm, reference) for arm in equal] or ["None of the other arms."]


def _times(arm: ArmResult, reference: ArmResult) -> str:
    new, old = arm.answers_per_second.value, reference.answers_per_second.value
    ratio = number(new / old) if old else NOTHING
    return f"{arm.arm}: {ratio} times the answers per second ({number(new)} against {number(old)})"


def _with_accuracy(results: Results, arm: ArmResult, reference: ArmResult) -> str:
    text = f"{_times(arm, reference)}, accuracy {number(arm.accuracy.value if arm.accuracy else None)}"
    found = accuracy_change(results, reference.arm, arm.arm, arm.load)
    if found is None:
        return text
    change, how = found
    text += f"; the difference, {how}, is {_signed(change)}"
    return text + ("" if change.low >= 0 else ", so that a fall is not excluded")


def _votes(results: Results) -> set[str]:
    """The names of the arms that are self-consistency, by the server or by the client."""
    arms = results.scenario.get("arms")
    if isinstance(arms, Mapping):  # as a scenario file may write them
        arms = [{"name": name, **(arm or {})} for name, arm in arms.items()]
    return {arm["name"] for arm in arms or () if arm.get("vote") or _strategy(arm) == "self_consistency"}


def _strategy(arm: Mapping[str, Any]) -> object:
    strategy = (arm.get("body") or {}).get("strategy")
    return strategy.get("type") if isinstance(strategy, Mapping) else strategy


def _of(results: Results, name: str) -> list[ArmResult]:
    return [arm for arm in results.arms if arm.arm == name]


def _alarms(results: Results) -> Iterator[str]:
    """All that says not to believe the figures; what several stages say, once."""
    yield from (f"The run failed: {reason}" for reason in results.failed)
    said: dict[str, list[str]] = {}
    for stage in results.stages:
        for kind, texts in (("Invalid", stage.invalid), ("Warning", stage.warnings)):
            for text in texts:
                said.setdefault(f"{kind}: {text}", []).append(_stage_name(stage))
    for text, stages in said.items():
        more = f" and {len(stages) - 3} more" if len(stages) > 3 else ""
        yield f"{text} ({'; '.join(stages[:3])}{more})"


def _stage_name(stage: StageResult) -> str:
    return f"{stage.arm}, {stage.load}, repetition {stage.repetition + 1}"


# ---- The page's tables


def _sections(results: Results) -> Iterator[Section]:
    numbers = {name: place for place, name in enumerate(plots.arm_names(results), 1)}
    rows = [
        Row([f"{numbers[arm.arm]}  {arm.arm}", *(show(arm) for show in ARM_COLUMNS.values())]) for arm in results.arms
    ]
    note = "Rates: median of the valid repetitions and their range. Accuracy: 95 % interval, bootstrap over questions."
    yield Section("arms", "Arms", note, ["arm", *ARM_COLUMNS], rows)
    rows = [Row([one.arm, *(show(one) for show in COMPARISON_COLUMNS.values())]) for one in results.comparisons]
    note = "Speed: median and range of the repetitions. Accuracy: paired by question, 95 % interval."
    yield Section("comparisons", "Comparisons", note, ["arm", *COMPARISON_COLUMNS], rows)
    yield Section("plots", "Plots", "Numbers are those of the table of arms.", plots=_plots(results))
    rows = [
        Row([stage.arm, *(show(stage) for show in STAGE_COLUMNS.values())], bool(stage.invalid))
        for stage in results.stages
    ]
    yield Section("stages", "Stages", "Red: invalid, left out of the arms.", ["arm", *STAGE_COLUMNS], rows)
    yield Section("errors", "Errors", "Calls, by kind.", ["error", "arm", "load", "calls"], list(_errors(results)))
    yield Section("calibration", "Calibration", "", ["arm", "what", "value"], list(_calibration(results)))
    yield Section("run", "Run", "", ["what", "value"], list(_run(results)))


def _errors(results: Results) -> Iterator[Row]:
    counts: Counter[tuple[str, str, str]] = Counter()
    for stage in results.stages:
        counts.update({(kind, stage.arm, stage.load): count for kind, count in stage.errors.items()})
    for names, count in counts.most_common():
        yield Row([*names, f"{count:,}"])


def _calibration(results: Results) -> Iterator[Row]:
    for arm, values in results.calibration.items():
        for name, value in values.items():
            yield Row([arm, name.replace("_", " "), number(value)])


def _run(results: Results) -> Iterator[Row]:
    run = results.run
    yield Row(["started", run.started])
    yield Row(["took", seconds(run.seconds)])
    yield Row(["server", run.base_url])
    yield Row(["model", run.model])
    yield Row(["commit", run.git_commit or NOTHING])
    for title, values in (("machine", run.machine), ("version", run.versions), ("server", run.server)):
        for name, value in values.items():
            yield Row([f"{title}: {name}", value if isinstance(value, str) else json.dumps(value, default=str)])


def _plots(results: Results) -> list[Markup]:
    """Those there is something to draw for; where one load will do, the one that most arms have."""
    counts = Counter(arm.load for arm in results.arms)
    if not counts:
        return []
    loads = sorted(counts, key=lambda load: counts[load], reverse=True)
    most = [load for load in counts if counts[load] == counts[loads[0]]][-1]  # the last: the heaviest of a sweep
    drawn = [plots.pareto(results, load) for load in loads[:PARETO_PLOTS] if counts[load] > 1 or load == most]
    drawn.append(plots.latency_against_throughput(results))
    drawn += [draw(results, most) for draw in (plots.accuracy_by_arm, plots.tokens, plots.entropy_histograms)]
    return [Markup(svg) for svg in drawn if svg]  # our own plots': their text is escaped already


# ---- Numbers as text


def number(value: float | None) -> str:
    """In three digits, or all of those before the point."""
    if value is None or not math.isfinite(value):
        return NOTHING
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def seconds(value: float | None) -> str:
    """With its unit."""
    if value is None or not math.isfinite(value):
        return NOTHING
    return f"{number(value * 1000)} ms" if abs(value) < 1 else f"{number(value)} s"


def _share(value: float | None) -> str:
    return NOTHING if value is None or not math.isfinite(value) else f"{value:.1%}"


def _interval(interval: Interval | None) -> str:
    return (
        NOTHING if interval is None else f"{number(interval.value)} ({number(interval.low)} to {number(interval.high)})"
    )


def _signed(interval: Interval | None) -> str:
    if interval is None or not math.isfinite(interval.value):
        return NOTHING
    return f"{interval.value:+.3f} ({interval.low:+.3f} to {interval.high:+.3f})"


def _latency(latency: Latency, name: str, quantile: str) -> str:
    found: Percentiles | None = getattr(latency, name)
    return seconds(getattr(found, quantile) if found else None)


ARM_COLUMNS: dict[str, Callable[[ArmResult], str]] = {
    "load": lambda arm: arm.load,
    "accuracy": lambda arm: _interval(arm.accuracy),
    "answers/s": lambda arm: _interval(arm.answers_per_second),
    "output tokens/s": lambda arm: _interval(arm.output_tokens_per_second),
    "tokens per correct": lambda arm: number(arm.tokens_per_correct),
    "time per correct": lambda arm: seconds(arm.seconds_per_correct),
    "TTFT p50": lambda arm: seconds(arm.ttft_p50),
    "TTFT p99": lambda arm: seconds(arm.ttft_p99),
    "TPOT p50": lambda arm: seconds(arm.tpot_p50),
    "E2E p50": lambda arm: seconds(arm.e2e_p50),
    "E2E p99": lambda arm: seconds(arm.e2e_p99),
    "goodput/s": lambda arm: _interval(arm.goodput),
    "entropy before, nats": lambda arm: number(arm.entropy_before),
    "entropy after, nats": lambda arm: number(arm.entropy_after),
    "tokens optimised": lambda arm: _share(arm.optimized_share),
    "cost per million tokens": lambda arm: number(arm.cost_per_million_tokens),
    "cost per correct": lambda arm: number(arm.cost_per_correct),
    "repetitions": lambda arm: str(arm.repetitions),
}
COMPARISON_COLUMNS: dict[str, Callable[[Comparison], str]] = {
    "against": lambda one: one.reference,
    "load": lambda one: one.load,
    "answers/s, times": lambda one: _interval(one.answers_per_second_ratio),
    "tokens per question, times": lambda one: number(one.tokens_ratio),
    "accuracy, difference": lambda one: _signed(one.accuracy_difference),
}
STAGE_COLUMNS: dict[str, Callable[[StageResult], str]] = {
    "load": lambda stage: stage.load,
    "repetition": lambda stage: str(stage.repetition + 1),
    "took": lambda stage: seconds(stage.seconds),
    "questions": lambda stage: f"{stage.items:,}",
    "ok": lambda stage: f"{stage.ok:,}",
    "incomplete": lambda stage: f"{stage.incomplete:,}",
    "failed": lambda stage: f"{stage.failed:,}",
    "accuracy": lambda stage: number(stage.accuracy),
    "answers/s": lambda stage: number(stage.answers_per_second),
    "output tokens/s": lambda stage: number(stage.output_tokens_per_second),
    "TTFT p50": lambda stage: _latency(stage.latency, "ttft", "p50"),
    "E2E p50": lambda stage: _latency(stage.latency, "e2e", "p50"),
    "E2E p99": lambda stage: _latency(stage.latency, "e2e", "p99"),
    "generator late, p99": lambda stage: seconds(stage.lag_p99),
    "invalid because": lambda stage: "; ".join(stage.invalid) or NOTHING,
    "warnings": lambda stage: "; ".join(stage.warnings) or NOTHING,
}


# ---- Files


def _columns(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Of a CSV: those of the schema, whether a value is there or not."""
    if model is Latency:
        return [f"{prefix}{name}_{part}" for name in Latency.model_fields for part in Percentiles.model_fields]
    return [
        column
        for name, one in model.model_fields.items()
        for column in (_columns(Latency, f"{name}_") if one.annotation is Latency else [prefix + name])
    ]


def _flat(stage: StageResult) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name, value in stage.model_dump().items():
        if name == "latency":
            for kind, parts in value.items():
                row.update({f"latency_{kind}_{part}": one for part, one in (parts or {}).items()})
        else:
            row[name] = json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value
    return row


def _strict(value: Any) -> Any:
    """With the names of what JSON has no numbers for."""
    if isinstance(value, dict):
        return {name: _strict(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_strict(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _yaml(results: Results) -> str:
    content = results.model_dump(mode="json", include={"scenario"})["scenario"]
    return str(yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100))


def _write(path: Path, text: str) -> None:
    """Beside its place, then moved there: a full disk leaves what was at `path`."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
