"""The figures of a complete run: its stages grouped by config and load, and compared with the references.

Pure: no clock, no network, no files.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from loadtest.intervals import Outcomes, accuracy_interval, median_and_range, paired_difference
from loadtest.measurements import MeasuredRequest, Stage
from loadtest.results import Comparison, ConfigResult, Interval, Latency, Percentiles, StageResult
from loadtest.scenario import Limits, Scenario
from loadtest.stage_summary import (
    cut_off,
    error_rate,
    has_answers,
    is_correct,
    mean_entropy,
    optimized_share,
    requests_of,
    stats_summaries,
    summarize_stage,
)

MAX_ENTROPIES = 2_000  # per config, for a histogram


@dataclass(frozen=True)
class _Repetition:
    stage: Stage
    result: StageResult


Repetitions = list[_Repetition]  # of one config under one load, the valid ones


def summarize(
    stages: list[Stage], scenario: Scenario
) -> tuple[list[StageResult], list[ConfigResult], list[Comparison], list[str]]:
    """Compute all figures of a run.

    A config's figures and comparisons are over its valid repetitions; a config without any is left out, and the run
    has failed.

    Returns:
        Stages in the order in which they ran; configs in the scenario's order; comparisons with
        `scenario.compared_with`; and why the run has failed, empty if it has not.
    """
    repetitions = [_Repetition(stage, summarize_stage(stage, scenario)) for stage in stages]
    groups = _valid_by_config(repetitions, scenario)
    failed = [line for one in repetitions for line in _too_many_errors(one, scenario.limits)]
    failed += [f"{config} under {load}: no valid repetition" for (config, load), valid in groups.items() if not valid]
    configs = [_config_result(valid, scenario.price_per_hour) for valid in groups.values() if valid]
    comparisons = [
        _comparison(*pairs)
        for reference in scenario.compared_with
        for (config, load), valid in groups.items()
        if config != reference and (pairs := _paired(valid, groups.get((reference, load), [])))[0]
    ]
    return [one.result for one in repetitions], configs, comparisons, failed


def _valid_by_config(repetitions: Repetitions, scenario: Scenario) -> dict[tuple[str, str], Repetitions]:
    """Group the valid repetitions by config and load, configs in the scenario's order (they ran in a random one)."""
    groups: dict[tuple[str, str], Repetitions] = {}
    for one in repetitions:
        valid = groups.setdefault((one.stage.config, one.stage.load), [])
        if not one.result.invalid:
            valid.append(one)
    position = {config.name: number for number, config in enumerate(scenario.configs)}
    return dict(sorted(groups.items(), key=lambda group: position.get(group[0][0], len(position))))


def _too_many_errors(one: _Repetition, limits: Limits) -> Iterator[str]:
    rate = error_rate(one.stage)
    if rate > limits.error_rate:
        stage = f"{one.stage.config} under {one.stage.load}, repetition {one.stage.repetition}"
        kinds = ", ".join(f"{kind}: {count}" for kind, count in one.result.errors.items())
        yield (
            f"{stage}: {rate:.1%} of {len(one.stage.questions)} questions were not answered; "
            f"at most {limits.error_rate:.1%} is allowed" + (f" ({kinds})" if kinds else "")
        )


# ---- One config


def _config_result(repetitions: Repetitions, price_per_hour: float | None) -> ConfigResult:
    results = [one.result for one in repetitions]
    requests = [request for one in repetitions for request in requests_of(one.stage)]
    outcomes = _outcomes(repetitions)
    correct = sum(sum(times) for times in outcomes.values())
    tokens = sum(result.output_tokens for result in results)
    seconds = sum(result.seconds for result in results)
    price = None if price_per_hour is None else price_per_hour / 3600  # per second
    return ConfigResult(
        config=results[0].config,
        load=results[0].load,
        target_load=results[0].target_load,
        repetitions=len(repetitions),
        answers_per_second=median_and_range([result.answers_per_second for result in results]),
        correct_per_second=_range_of_known([result.correct_per_second for result in results]),
        requests_per_second=median_and_range([result.requests_per_second for result in results]),
        output_tokens_per_second=median_and_range([result.output_tokens_per_second for result in results]),
        delivered_tokens_per_second=median_and_range([result.delivered_tokens_per_second for result in results]),
        goodput=_range_of_known([result.goodput for result in results]),
        accuracy=accuracy_interval(outcomes),
        tokens_per_question=_tokens_per_question(repetitions) or None,
        cut_off=cut_off(requests),
        tokens_per_correct=tokens / correct if tokens and correct else None,
        seconds_per_correct=seconds / correct if correct else None,
        cost_per_million_tokens=price * seconds / tokens * 1e6 if price and tokens else None,
        cost_per_correct=price * seconds / correct if price and correct else None,
        ttft_p50=_median_latency(results, lambda of: of.ttft, "p50"),
        ttft_p99=_median_latency(results, lambda of: of.ttft, "p99"),
        tpot_p50=_median_latency(results, lambda of: of.tpot, "p50"),
        e2e_p50=_median_latency(results, lambda of: of.e2e, "p50"),
        e2e_p99=_median_latency(results, lambda of: of.e2e, "p99"),
        entropy_before=mean_entropy(requests, "entropy_before"),
        entropy_after=mean_entropy(requests, "entropy_after"),
        optimized_share=optimized_share(requests),
        entropies=_reply_entropies(requests),
    )


def _median_latency(
    results: Sequence[StageResult], quantity: Callable[[Latency], Percentiles | None], percentile: str
) -> float | None:
    """Return the median over repetitions of one percentile, in seconds."""
    known = [found for result in results if (found := quantity(result.latency))]
    return median_and_range([getattr(found, percentile) for found in known]).value if known else None


def _range_of_known(values: Sequence[float | None]) -> Interval | None:
    known = [value for value in values if value is not None]
    return median_and_range(known) if known else None


def _outcomes(repetitions: Repetitions) -> Outcomes:
    """Return, by question, whether it was correct in each repetition; empty if the task has no answers."""
    outcomes: dict[int, list[bool]] = {}
    for one in repetitions:
        for question in one.stage.questions if has_answers(one.stage) else ():
            outcomes.setdefault(question.index, []).append(is_correct(question))
    return outcomes


def _reply_entropies(requests: Sequence[MeasuredRequest]) -> list[float]:
    """Return each reply's mean entropy before, ascending; evenly spaced ones of them if there are too many."""
    means = [summary.get("entropy_before") for summary in stats_summaries(requests)]
    ordered = sorted(mean for mean in means if mean is not None)
    if len(ordered) <= MAX_ENTROPIES:
        return ordered
    return [ordered[i] for i in np.linspace(0, len(ordered) - 1, MAX_ENTROPIES).round().astype(int)]


# ---- One config against a reference


def _paired(repetitions: Repetitions, reference: Repetitions) -> tuple[Repetitions, Repetitions]:
    """Return the repetitions that both have, in the same order."""
    others = {one.stage.repetition: one for one in reference}
    shared = [one for one in repetitions if one.stage.repetition in others]
    return shared, [others[one.stage.repetition] for one in shared]


def _comparison(repetitions: Repetitions, reference: Repetitions) -> Comparison:
    pairs = [(one.result, other.result) for one, other in zip(repetitions, reference, strict=True)]
    tokens = _tokens_per_question(reference)
    return Comparison(
        config=repetitions[0].result.config,
        reference=reference[0].result.config,
        load=repetitions[0].result.load,
        answers_per_second_ratio=median_and_range([a.answers_per_second / b.answers_per_second for a, b in pairs]),
        tokens_ratio=_tokens_per_question(repetitions) / tokens if tokens else None,
        accuracy_difference=paired_difference(_outcomes(repetitions), _outcomes(reference)),
    )


def _tokens_per_question(repetitions: Repetitions) -> float:
    return sum(one.result.output_tokens for one in repetitions) / sum(one.result.questions for one in repetitions)
