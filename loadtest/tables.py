"""The tables of the report: which figure stands in which column, and how it is written."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from loadtest.formats import NOT_MEASURED, difference, interval, number, percent, seconds
from loadtest.plots import config_names
from loadtest.results import Comparison, ConfigResult, Latency, Percentiles, Results, StageResult

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """A row of a table; an invalid one is shown in red."""

    cells: Sequence[str]
    invalid: bool = False


def _latency(latency: Latency, name: str, percentile: str) -> str:
    found: Percentiles | None = getattr(latency, name)
    return seconds(getattr(found, percentile) if found else None)


CONFIG_COLUMNS: dict[str, Callable[[ConfigResult], str]] = {
    "load": lambda config: config.load,
    "accuracy": lambda config: interval(config.accuracy),
    "answers/s": lambda config: interval(config.answers_per_second),
    "output tokens/s": lambda config: interval(config.output_tokens_per_second),
    "tokens per question": lambda config: number(config.tokens_per_question),
    "cut off": lambda config: percent(config.cut_off),
    "tokens per correct": lambda config: number(config.tokens_per_correct),
    "time per correct": lambda config: seconds(config.seconds_per_correct),
    "TTFT p50": lambda config: seconds(config.ttft_p50),
    "TTFT p99": lambda config: seconds(config.ttft_p99),
    "TPOT p50": lambda config: seconds(config.tpot_p50),
    "E2E p50": lambda config: seconds(config.e2e_p50),
    "E2E p99": lambda config: seconds(config.e2e_p99),
    "goodput/s": lambda config: interval(config.goodput),
    "entropy before, nats": lambda config: number(config.entropy_before),
    "entropy after, nats": lambda config: number(config.entropy_after),
    "tokens optimised": lambda config: percent(config.optimized_share),
    "cost per million tokens": lambda config: number(config.cost_per_million_tokens),
    "cost per correct": lambda config: number(config.cost_per_correct),
    "repetitions": lambda config: str(config.repetitions),
}
COMPARISON_COLUMNS: dict[str, Callable[[Comparison], str]] = {
    "reference": lambda one: one.reference,
    "load": lambda one: one.load,
    "answers/s, ratio": lambda one: interval(one.answers_per_second_ratio),
    "tokens per question, ratio": lambda one: number(one.tokens_ratio),
    "accuracy, difference": lambda one: difference(one.accuracy_difference),
}
STAGE_COLUMNS: dict[str, Callable[[StageResult], str]] = {
    "load": lambda stage: stage.load,
    "repetition": lambda stage: str(stage.repetition + 1),
    "duration": lambda stage: seconds(stage.seconds),
    "questions": lambda stage: f"{stage.questions:,}",
    "ok": lambda stage: f"{stage.ok:,}",
    "incomplete": lambda stage: f"{stage.incomplete:,}",
    "failed": lambda stage: f"{stage.failed:,}",
    "accuracy": lambda stage: number(stage.accuracy),
    "tokens per question": lambda stage: number(stage.tokens_per_question),
    "cut off": lambda stage: percent(stage.cut_off),
    "answers/s": lambda stage: number(stage.answers_per_second),
    "output tokens/s": lambda stage: number(stage.output_tokens_per_second),
    "TTFT p50": lambda stage: _latency(stage.latency, "ttft", "p50"),
    "E2E p50": lambda stage: _latency(stage.latency, "e2e", "p50"),
    "E2E p99": lambda stage: _latency(stage.latency, "e2e", "p99"),
    "scheduling delay p99": lambda stage: seconds(stage.scheduling_delay_p99),
    "invalid because": lambda stage: "; ".join(stage.invalid) or NOT_MEASURED,
    "warnings": lambda stage: "; ".join(stage.warnings) or NOT_MEASURED,
}


def config_rows(results: Results) -> list[Row]:
    """Return a row per config and load, with the config's number in the plots."""
    numbers = {name: place for place, name in enumerate(config_names(results), 1)}
    return [
        Row([f"{numbers[config.config]}  {config.config}", *_cells(CONFIG_COLUMNS, config)])
        for config in results.configs
    ]


def comparison_rows(results: Results) -> list[Row]:
    """Return a row per config, reference and load."""
    return [Row([one.config, *_cells(COMPARISON_COLUMNS, one)]) for one in results.comparisons]


def stage_rows(results: Results) -> list[Row]:
    """Return a row per stage, in the order in which they ran."""
    return [Row([stage.config, *_cells(STAGE_COLUMNS, stage)], bool(stage.invalid)) for stage in results.stages]


def error_rows(results: Results) -> list[Row]:
    """Return a row per kind of error, config and load, the most frequent first."""
    return _counted(results, lambda stage: stage.errors)


def problem_rows(results: Results) -> list[Row]:
    """Return a row per reason why replies are not correct, config and load, the most frequent first."""
    return _counted(results, lambda stage: stage.problems)


def _counted(results: Results, kinds: Callable[[StageResult], Mapping[str, int]]) -> list[Row]:
    counts: Counter[tuple[str, str, str]] = Counter()
    for stage in results.stages:
        counts.update({(kind, stage.config, stage.load): count for kind, count in kinds(stage).items()})
    return [Row([*names, f"{count:,}"]) for names, count in counts.most_common()]


def calibration_rows(results: Results) -> list[Row]:
    """Return a row per figure of each matched temperature."""
    return [
        Row([config, name.replace("_", " "), ("yes" if value else "no") if isinstance(value, bool) else number(value)])
        for config, values in results.calibration.items()
        for name, value in values.items()
    ]


def run_rows(results: Results) -> Iterator[Row]:
    """Yield when, where and with which software the run was made."""
    run = results.run
    yield Row(["started", run.started])
    yield Row(["duration", seconds(run.seconds)])
    yield Row(["server", run.base_url])
    yield Row(["model", run.model])
    yield Row(["commit", run.git_commit or NOT_MEASURED])
    for title, values in (("machine", run.machine), ("version", run.versions), ("server", run.server)):
        for name, value in values.items():
            yield Row([f"{title}: {name}", value if isinstance(value, str) else json.dumps(value, default=str)])


def _cells(columns: Mapping[str, Callable[[T], str]], of: T) -> list[str]:
    return [cell(of) for cell in columns.values()]
