"""What happened in, results out: `Stage`s become the figures of results.json, with what makes them doubtful.

Pure: no clock, no network, no files. Times are seconds; bounds of a scenario are milliseconds.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loadtest.records import Call, Item, Stage
from loadtest.results import ArmResult, Comparison, Interval, Latency, Percentiles, StageResult
from loadtest.scenario import Limits, Scenario, Slo
from loadtest.statistics import Outcomes, accuracy_interval, paired_difference, percentiles, spread

MS = 1000.0
MOST_ENTROPIES = 2_000  # of an arm, for a histogram
COUNTER_TOLERANCE = 0.001  # of the counter: usage may differ by so much, or by one token


# ---- One stage


def summarize_stage(stage: Stage, scenario: Scenario) -> StageResult:
    """The figures of one arm under one load, one repetition.

    Rates are 0 where the stage took no time; it is invalid then.
    """
    calls = _calls(stage)
    states = Counter(item.status for item in stage.items)
    lags = percentiles(stage.lags)
    lag_p99 = lags.p99 if lags else 0.0
    right = sum(map(_right, stage.items)) if _has_answers(stage) else None
    output = sum(call.output_tokens or 0 for call in calls)
    slo = scenario.slo if _is_set(scenario.slo) else None

    def rate(amount: float) -> float:
        return amount / stage.seconds if stage.seconds > 0 else 0.0

    return StageResult(
        arm=stage.arm,
        load=stage.load,
        offered=stage.offered,
        open_loop=stage.open_loop,
        repetition=stage.repetition,
        seconds=stage.seconds,
        items=len(stage.items),
        ok=states["ok"],
        incomplete=states["incomplete"],
        failed=states["failed"],
        errors=dict(Counter(call.error.split(": ")[0] for call in calls if call.error)),
        requests_per_second=rate(len(_whole(calls))),
        output_tokens_per_second=rate(output),
        delivered_tokens_per_second=rate(sum(map(_delivered, stage.items))),
        answers_per_second=rate(states["ok"]),
        correct_per_second=None if right is None else rate(right),
        goodput=None if slo is None else rate(sum(_keeps(item, stage.open_loop, slo) for item in stage.items)),
        prompt_tokens=sum(call.prompt_tokens or 0 for call in calls),
        output_tokens=output,
        counted_output_tokens=stage.counted_output_tokens,
        latency=_latency(stage),
        lag_p99=lag_p99,
        accuracy=None if right is None else right / len(stage.items),
        entropy_before=_entropy(calls, "entropy_before"),
        entropy_after=_entropy(calls, "entropy_after"),
        optimized_share=_optimized_share(calls),
        invalid=list(_invalid(stage, lag_p99, scenario.limits)),
        warnings=list(_warnings(stage, scenario.slo)),
    )


def _calls(stage: Stage) -> list[Call]:
    return [call for item in stage.items for call in item.calls]


def _whole(calls: Sequence[Call]) -> list[Call]:
    return [call for call in calls if call.status == "ok"]


def _right(item: Item) -> bool:
    """A reply that broke off is not an answer, whatever can be read in it: else more were right than were answered."""
    return item.status == "ok" and item.correct is True


def _has_answers(stage: Stage) -> bool:
    """Whether the task does, as far as can be seen: questions that failed were not marked."""
    return any(item.correct is not None for item in stage.items)


def _delivered(item: Item) -> int:
    """Tokens of the reply that the user has: what other voters wrote reached nobody."""
    return (item.reply.delivered_tokens or 0) if item.reply else 0


def _error_rate(stage: Stage) -> float:
    """The share of questions that were not answered."""
    return sum(item.status != "ok" for item in stage.items) / len(stage.items) if stage.items else 0.0


# ---- Latency and goodput


def _start(item: Item, open_loop: bool) -> float:
    """When a question's time begins to count.

    In an open loop: when it should have been asked. A user is not later because the server keeps the generator from
    asking; to count from the sending would leave out just the waits of an overload (coordinated omission).
    """
    return item.scheduled if open_loop else item.sent


def _e2e(item: Item, open_loop: bool) -> float:
    return item.ended - _start(item, open_loop)


def _ttft(call: Call, item: Item, open_loop: bool) -> float | None:
    """Of several calls for one question each has its own; when each should have been sent is not on record."""
    if call.first is None:
        return None
    return call.first - (_start(item, open_loop) if len(item.calls) == 1 else call.sent)


def _tpot(call: Call) -> float | None:
    """(E2E - TTFT) / (n - 1); None for a reply of one token, which has no time between tokens."""
    if call.first is None or (call.delivered_tokens or 0) < 2:
        return None
    return (call.last - call.first) / ((call.delivered_tokens or 0) - 1)


def _latency(stage: Stage) -> Latency:
    answered = [item for item in stage.items if item.status == "ok"]
    calls = [(call, item) for item in answered for call in _whole(item.calls)]
    ttft = [_ttft(call, item, stage.open_loop) for call, item in calls]
    tpot = [_tpot(call) for call, _ in calls]
    return Latency(
        ttft=percentiles(value for value in ttft if value is not None),
        tpot=percentiles(value for value in tpot if value is not None),
        itl=percentiles(gap for call, _ in calls for gap in call.gaps),
        e2e=percentiles(_e2e(item, stage.open_loop) for item in answered),
    )


def _is_set(slo: Slo) -> bool:
    return any(bound is not None for bound in (slo.ttft_ms, slo.tpot_ms, slo.e2e_ms))


def _bounded(item: Item, open_loop: bool, slo: Slo) -> Iterator[tuple[float, float | None]]:
    """Each bound that is set, with what an answered question has there, both in ms; None where that is not known."""
    if slo.e2e_ms is not None:
        yield slo.e2e_ms, _e2e(item, open_loop) * MS
    for call in _whole(item.calls):
        if slo.ttft_ms is not None:
            ttft = _ttft(call, item, open_loop)
            yield slo.ttft_ms, None if ttft is None else ttft * MS
        if slo.tpot_ms is not None and call.delivered_tokens not in (0, 1):
            tpot = _tpot(call)
            yield slo.tpot_ms, None if tpot is None else tpot * MS


def _keeps(item: Item, open_loop: bool, slo: Slo) -> bool:
    """Whether a question was answered, and each of its whole calls within every bound; not known counts as not."""
    if item.status != "ok":
        return False
    return all(value is not None and value <= bound for bound, value in _bounded(item, open_loop, slo))


# ---- Entropy


def _blocks(calls: Sequence[Call]) -> list[dict[str, Any]]:
    return [call.em_inf for call in calls if call.em_inf]


def _known(block: dict[str, Any]) -> int:
    """Tokens that its means are of."""
    return (block.get("tokens") or 0) - (block.get("missing") or 0)


def _entropy(calls: Sequence[Call], field: str) -> float | None:
    """The mean over tokens, in nats: each reply's own mean counts as often as it has known tokens."""
    means = [(block[field], _known(block)) for block in _blocks(calls) if block.get(field) is not None]
    tokens = sum(known for _, known in means)
    return sum(mean * known for mean, known in means) / tokens if tokens else None


def _optimized_share(calls: Sequence[Call]) -> float | None:
    blocks = _blocks(calls)
    tokens = sum(map(_known, blocks))
    return sum(block.get("optimized_tokens") or 0 for block in blocks) / tokens if tokens else None


def _entropies(calls: Sequence[Call]) -> list[float]:
    """Each reply's mean entropy before, in order; of more than the most, as many evenly spaced ones of that order."""
    means = [block.get("entropy_before") for block in _blocks(calls)]
    ordered = sorted(mean for mean in means if mean is not None)
    if len(ordered) <= MOST_ENTROPIES:
        return ordered
    return [ordered[i] for i in np.linspace(0, len(ordered) - 1, MOST_ENTROPIES).round().astype(int)]


# ---- Doubts


def _invalid(stage: Stage, lag_p99: float, limits: Limits) -> Iterator[str]:
    if stage.seconds <= 0:
        yield f"it took {stage.seconds:g} seconds"
    if not any(item.status == "ok" for item in stage.items):
        yield f"no question was answered, of {len(stage.items)}"
    if lag_p99 * MS > limits.lag_ms:
        yield f"the generator's p99 delay was {lag_p99 * MS:.1f} ms; at most {limits.lag_ms:g} ms is allowed"


def _warnings(stage: Stage, slo: Slo) -> Iterator[str]:
    calls = _calls(stage)
    yield from _miscounted("output", [call.output_tokens for call in calls], stage.counted_output_tokens, calls)
    yield from _miscounted("prompt", [call.prompt_tokens for call in calls], stage.counted_prompt_tokens, calls)
    if without := sum(call.output_tokens is None for call in _whole(calls)):
        yield f"whole calls without usage: {without}; their tokens are not in output_tokens"
    if lying := sum(call.output_tokens is not None and call.chunks > call.output_tokens for call in calls):
        yield f"calls of which usage says fewer tokens than chunks that came: {lying}"
    if rate := _error_rate(stage):
        yield f"{rate:.1%} of {len(stage.items)} questions were not answered"
    if missing := sum(block.get("missing") or 0 for block in _blocks(calls)):
        yield f"tokens without statistics: {missing}; entropies are of the others"
    answered = [item for item in stage.items if item.status == "ok"]
    unknown = sum(any(value is None for _, value in _bounded(item, stage.open_loop, slo)) for item in answered)
    if unknown:
        yield f"questions counted as outside the SLO because TTFT or TPOT could not be measured: {unknown}"


def _miscounted(what: str, usage: Sequence[int | None], counter: int | None, calls: Sequence[Call]) -> Iterator[str]:
    """A warning where usage is not what the server's own counter says.

    A call that broke off has no usage, though what it generated is counted: then less than the counter proves nothing.
    """
    if counter is None:
        return
    said = sum(tokens or 0 for tokens in usage)
    lost = any(call.status != "ok" and tokens is None for call, tokens in zip(calls, usage, strict=True))
    excess = said - counter if lost else abs(said - counter)
    if excess > max(1.0, COUNTER_TOLERANCE * counter):
        yield f"usage says {said} {what} tokens, the server's counter {counter}"


# ---- The whole run


@dataclass(frozen=True)
class _Repetition:
    stage: Stage
    result: StageResult


Runs = list[_Repetition]  # of one arm under one load, the valid ones


def summarize(
    stages: list[Stage], scenario: Scenario
) -> tuple[list[StageResult], list[ArmResult], list[Comparison], list[str]]:
    """All figures of a run, in the order of its stages.

    An arm's figures and comparisons are of its valid repetitions; without any, it is left out, and the run has failed.

    Returns:
        Stages, arms, comparisons with `scenario.compared_with`, and why the run has failed: empty where it has not.
    """
    runs = [_Repetition(stage, summarize_stage(stage, scenario)) for stage in stages]
    groups: dict[tuple[str, str], Runs] = {}
    for run in runs:
        valid = groups.setdefault((run.stage.arm, run.stage.load), [])
        if not run.result.invalid:
            valid.append(run)
    place = {arm.name: number for number, arm in enumerate(scenario.arms)}  # they ran in another order
    groups = dict(sorted(groups.items(), key=lambda group: place.get(group[0][0], len(place))))
    failed = [line for run in runs for line in _too_many_errors(run, scenario.limits)]
    failed += [f"{arm} under {load}: no valid repetition" for (arm, load), valid in groups.items() if not valid]
    arms = [_arm(valid, scenario.price_per_hour) for valid in groups.values() if valid]
    comparisons = [
        _comparison(*pairs)
        for reference in scenario.compared_with
        for (arm, load), valid in groups.items()
        if arm != reference and (pairs := _paired(valid, groups.get((reference, load), [])))[0]
    ]
    return [run.result for run in runs], arms, comparisons, failed


def _too_many_errors(run: _Repetition, limits: Limits) -> Iterator[str]:
    rate = _error_rate(run.stage)
    if rate > limits.error_rate:
        where = f"{run.stage.arm} under {run.stage.load}, repetition {run.stage.repetition}"
        kinds = ", ".join(f"{kind}: {count}" for kind, count in run.result.errors.items())
        yield (
            f"{where}: {rate:.1%} of {len(run.stage.items)} questions were not answered; "
            f"at most {limits.error_rate:.1%} is allowed" + (f" ({kinds})" if kinds else "")
        )


def _arm(runs: Runs, price_per_hour: float | None) -> ArmResult:
    first = runs[0].result
    calls = [call for run in runs for call in _calls(run.stage)]
    outcomes = _outcomes(runs)
    right = sum(sum(times) for times in outcomes.values())
    tokens = sum(run.result.output_tokens for run in runs)
    seconds = sum(run.result.seconds for run in runs)
    price = None if price_per_hour is None else price_per_hour / 3600  # per second

    def latency(quantity: Callable[[Latency], Percentiles | None], field: str) -> float | None:
        """The median over repetitions of one percentile of theirs."""
        known = [found for run in runs if (found := quantity(run.result.latency))]
        return spread([getattr(found, field) for found in known]).value if known else None

    return ArmResult(
        arm=first.arm,
        load=first.load,
        offered=first.offered,
        repetitions=len(runs),
        answers_per_second=spread([run.result.answers_per_second for run in runs]),
        correct_per_second=_spread_of_known([run.result.correct_per_second for run in runs]),
        requests_per_second=spread([run.result.requests_per_second for run in runs]),
        output_tokens_per_second=spread([run.result.output_tokens_per_second for run in runs]),
        delivered_tokens_per_second=spread([run.result.delivered_tokens_per_second for run in runs]),
        goodput=_spread_of_known([run.result.goodput for run in runs]),
        accuracy=accuracy_interval(outcomes),
        tokens_per_correct=tokens / right if tokens and right else None,
        seconds_per_correct=seconds / right if right else None,
        cost_per_million_tokens=price * seconds / tokens * 1e6 if price and tokens else None,
        cost_per_correct=price * seconds / right if price and right else None,
        ttft_p50=latency(lambda of: of.ttft, "p50"),
        ttft_p99=latency(lambda of: of.ttft, "p99"),
        tpot_p50=latency(lambda of: of.tpot, "p50"),
        e2e_p50=latency(lambda of: of.e2e, "p50"),
        e2e_p99=latency(lambda of: of.e2e, "p99"),
        entropy_before=_entropy(calls, "entropy_before"),
        entropy_after=_entropy(calls, "entropy_after"),
        optimized_share=_optimized_share(calls),
        entropies=_entropies(calls),
    )


def _spread_of_known(values: Sequence[float | None]) -> Interval | None:
    known = [value for value in values if value is not None]
    return spread(known) if known else None


def _outcomes(runs: Runs) -> Outcomes:
    """By question: right or not in each repetition; empty where the task has no answers."""
    outcomes: dict[int, list[bool]] = {}
    for run in runs:
        for item in run.stage.items if _has_answers(run.stage) else ():
            outcomes.setdefault(item.index, []).append(_right(item))
    return outcomes


def _paired(runs: Runs, base: Runs) -> tuple[Runs, Runs]:
    """The repetitions that both have, in the same order."""
    others = {run.stage.repetition: run for run in base}
    shared = [run for run in runs if run.stage.repetition in others]
    return shared, [others[run.stage.repetition] for run in shared]


def _comparison(runs: Runs, base: Runs) -> Comparison:
    pairs = [(run.result, other.result) for run, other in zip(runs, base, strict=True)]
    tokens = _tokens_per_question(base)
    return Comparison(
        arm=runs[0].result.arm,
        reference=base[0].result.arm,
        load=runs[0].result.load,
        answers_per_second_ratio=spread([a.answers_per_second / b.answers_per_second for a, b in pairs]),
        tokens_ratio=_tokens_per_question(runs) / tokens if tokens else None,
        accuracy_difference=paired_difference(_outcomes(runs), _outcomes(base)),
    )


def _tokens_per_question(runs: Runs) -> float:
    return sum(run.result.output_tokens for run in runs) / sum(run.result.items for run in runs)
