"""The figures of one stage, and what makes them doubtful: a `Stage` in, a `StageResult` out.

Pure: no clock, no network, no files. Times are seconds; bounds of a scenario are milliseconds.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from loadtest.intervals import percentiles
from loadtest.measurements import MeasuredQuestion, MeasuredRequest, Stage
from loadtest.results import Latency, StageResult
from loadtest.scenario import Limits, Scenario, Slo

MS = 1000.0
COUNTER_TOLERANCE = 0.001  # share of the server's counter by which usage may differ; one token is always allowed


def summarize_stage(stage: Stage, scenario: Scenario) -> StageResult:
    """Compute the figures of one config under one load, one repetition.

    Rates are 0 if the stage took no time; it is invalid then.
    """
    delays = percentiles(stage.scheduling_delays)
    delay_p99 = delays.p99 if delays else 0.0
    return StageResult(
        config=stage.config,
        load=stage.load,
        target_load=stage.target_load,
        open_loop=stage.open_loop,
        repetition=stage.repetition,
        parts=max(1, stage.parts),
        seconds=stage.seconds,
        counted_output_tokens=stage.counted_output_tokens,
        latency=_latency(stage),
        scheduling_delay_p99=delay_p99,
        invalid=list(_reasons_invalid(stage, delay_p99, scenario.limits)),
        warnings=list(_warnings(stage, scenario.slo)),
        **_counts(stage),
        **_rates(stage, scenario.slo),
        **_entropies(stage),
    )


def _counts(stage: Stage) -> dict[str, Any]:
    requests = requests_of(stage)
    states = Counter(question.status for question in stage.questions)
    correct = _correct(stage)
    return {
        "questions": len(stage.questions),
        "ok": states["ok"],
        "incomplete": states["incomplete"],
        "failed": states["failed"],
        "errors": dict(Counter(request.error.split(": ")[0] for request in requests if request.error)),
        "problems": dict(Counter(question.problem.split(": ")[0] for question in stage.questions if question.problem)),
        "prompt_tokens": sum(request.prompt_tokens or 0 for request in requests),
        "output_tokens": (tokens := _output_tokens(stage)),
        "tokens_per_question": tokens / len(stage.questions) if tokens else None,
        "cut_off": cut_off(requests),
        "accuracy": None if correct is None else correct / len(stage.questions),
    }


def _rates(stage: Stage, slo: Slo) -> dict[str, Any]:
    def per_second(amount: float) -> float:
        return amount / stage.seconds if stage.seconds > 0 else 0.0

    correct = _correct(stage)
    good = sum(_meets(question, stage.open_loop, slo) for question in stage.questions) if _is_set(slo) else None
    return {
        "requests_per_second": per_second(len(_complete(requests_of(stage)))),
        "output_tokens_per_second": per_second(_output_tokens(stage)),
        "delivered_tokens_per_second": per_second(sum(map(_delivered_tokens, stage.questions))),
        "answers_per_second": per_second(sum(question.status == "ok" for question in stage.questions)),
        "correct_per_second": None if correct is None else per_second(correct),
        "goodput": None if good is None else per_second(good),
    }


def _entropies(stage: Stage) -> dict[str, Any]:
    requests = requests_of(stage)
    return {
        "entropy_before": mean_entropy(requests, "entropy_before"),
        "entropy_after": mean_entropy(requests, "entropy_after"),
        "optimized_share": optimized_share(requests),
    }


# ---- Counting


def requests_of(stage: Stage) -> list[MeasuredRequest]:
    """Return the requests of all questions."""
    return [request for question in stage.questions for request in question.requests]


def has_answers(stage: Stage) -> bool:
    """Return whether the task has answers, as far as a stage shows: questions that failed were not checked."""
    return any(question.correct is not None for question in stage.questions)


def is_correct(question: MeasuredQuestion) -> bool:
    """Return whether a question is answered correctly; an incomplete reply never is, so that correct <= ok."""
    return question.status == "ok" and question.correct is True


def error_rate(stage: Stage) -> float:
    """Return the share of questions that were not answered."""
    return sum(question.status != "ok" for question in stage.questions) / len(stage.questions) if stage.questions else 0


def cut_off(requests: Sequence[MeasuredRequest]) -> float | None:
    """Return the share of complete replies that ended at `max_tokens` or the model's length; None if there are none."""
    complete = _complete(requests)
    return sum(request.finish_reason == "length" for request in complete) / len(complete) if complete else None


def _complete(requests: Sequence[MeasuredRequest]) -> list[MeasuredRequest]:
    return [request for request in requests if request.status == "ok"]


def _correct(stage: Stage) -> int | None:
    return sum(map(is_correct, stage.questions)) if has_answers(stage) else None


def _output_tokens(stage: Stage) -> int:
    return sum(request.output_tokens or 0 for request in requests_of(stage))


def _delivered_tokens(question: MeasuredQuestion) -> int:
    """Count the tokens of the reply that the user gets; those of other voters reach nobody."""
    return (question.reply.delivered_tokens or 0) if question.reply else 0


# ---- Latency and goodput


def _start(question: MeasuredQuestion, open_loop: bool) -> float:
    """Return when a question's time begins to count.

    In an open loop that is when it was due: a user does not arrive later because the server delays the generator.
    Counting from the sending would leave out exactly the waits of an overload (coordinated omission).
    """
    return question.scheduled if open_loop else question.sent


def _e2e(question: MeasuredQuestion, open_loop: bool) -> float:
    return question.ended - _start(question, open_loop)


def _ttft(request: MeasuredRequest, question: MeasuredQuestion, open_loop: bool) -> float | None:
    """Several requests of one question count from their own sending: only the question has a due time."""
    if request.first is None:
        return None
    return request.first - (_start(question, open_loop) if len(question.requests) == 1 else request.sent)


def _tpot(request: MeasuredRequest) -> float | None:
    """(E2E - TTFT) / (n - 1); None for a reply of one token, which has no time between tokens."""
    if request.first is None or (request.delivered_tokens or 0) < 2:
        return None
    return (request.last - request.first) / ((request.delivered_tokens or 0) - 1)


def _latency(stage: Stage) -> Latency:
    answered = [question for question in stage.questions if question.status == "ok"]
    pairs = [(request, question) for question in answered for request in _complete(question.requests)]
    ttft = [_ttft(request, question, stage.open_loop) for request, question in pairs]
    tpot = [_tpot(request) for request, _ in pairs]
    return Latency(
        ttft=percentiles(value for value in ttft if value is not None),
        tpot=percentiles(value for value in tpot if value is not None),
        itl=percentiles(gap for request, _ in pairs for gap in request.gaps),
        e2e=percentiles(_e2e(question, stage.open_loop) for question in answered),
    )


def _is_set(slo: Slo) -> bool:
    return any(bound is not None for bound in (slo.ttft_ms, slo.tpot_ms, slo.e2e_ms))


def _against_bounds(question: MeasuredQuestion, open_loop: bool, slo: Slo) -> Iterator[tuple[float, float | None]]:
    """Yield each bound that is set, with the value of an answered question, both in ms; None if not measured."""
    if slo.e2e_ms is not None:
        yield slo.e2e_ms, _e2e(question, open_loop) * MS
    for request in _complete(question.requests):
        if slo.ttft_ms is not None:
            ttft = _ttft(request, question, open_loop)
            yield slo.ttft_ms, None if ttft is None else ttft * MS
        if slo.tpot_ms is not None and request.delivered_tokens not in (0, 1):
            tpot = _tpot(request)
            yield slo.tpot_ms, None if tpot is None else tpot * MS


def _meets(question: MeasuredQuestion, open_loop: bool, slo: Slo) -> bool:
    """Return whether a question is answered and its complete requests meet every bound; not measured is not met."""
    if question.status != "ok":
        return False
    return all(value is not None and value <= bound for bound, value in _against_bounds(question, open_loop, slo))


# ---- Entropy


def stats_summaries(requests: Sequence[MeasuredRequest]) -> list[dict[str, Any]]:
    """Return the stats of the replies that have them (`em_inf` in the response)."""
    return [request.em_inf for request in requests if request.em_inf]


def mean_entropy(requests: Sequence[MeasuredRequest], field: str) -> float | None:
    """Return the mean over tokens, in nats: each reply's mean weighs as much as it has tokens with stats."""
    means = [
        (summary[field], _counted(summary)) for summary in stats_summaries(requests) if summary.get(field) is not None
    ]
    tokens = sum(counted for _, counted in means)
    return sum(mean * counted for mean, counted in means) / tokens if tokens else None


def optimized_share(requests: Sequence[MeasuredRequest]) -> float | None:
    """Return the share of tokens whose entropy was minimised, of those with stats."""
    summaries = stats_summaries(requests)
    tokens = sum(map(_counted, summaries))
    return sum(summary.get("optimized_tokens") or 0 for summary in summaries) / tokens if tokens else None


def _counted(summary: dict[str, Any]) -> int:
    """Count the tokens that a summary's means are over."""
    return (summary.get("tokens") or 0) - (summary.get("missing") or 0)


# ---- Doubts


def _reasons_invalid(stage: Stage, delay_p99: float, limits: Limits) -> Iterator[str]:
    if stage.seconds <= 0:
        yield f"it took {stage.seconds:g} seconds"
    if not any(question.status == "ok" for question in stage.questions):
        yield f"no question was answered, of {len(stage.questions)}"
    if delay_p99 * MS > limits.lag_ms:
        yield f"the generator's p99 delay was {delay_p99 * MS:.1f} ms; at most {limits.lag_ms:g} ms is allowed"


def _warnings(stage: Stage, slo: Slo) -> Iterator[str]:
    requests = requests_of(stage)
    outputs = [request.output_tokens for request in requests]
    prompts = [request.prompt_tokens for request in requests]
    if stage.parts > 1:
        yield f"measured in {stage.parts} parts: rates and latencies are of the parts, scheduling delays of the last"
    yield from _usage_mismatch("output", outputs, stage.counted_output_tokens, requests)
    yield from _usage_mismatch("prompt", prompts, stage.counted_prompt_tokens, requests)
    if without := sum(request.output_tokens is None for request in _complete(requests)):
        yield f"complete requests without usage: {without}; their tokens are not in output_tokens"
    if without := sum(request.without_done for request in _complete(requests)):
        yield f"complete streams without [DONE], which had a finish_reason: {without}"
    if too_few := sum(
        request.output_tokens is not None and request.chunks > request.output_tokens for request in requests
    ):
        yield f"requests with fewer tokens by usage than chunks received: {too_few}"
    if rate := error_rate(stage):
        yield f"{rate:.1%} of {len(stage.questions)} questions were not answered"
    if missing := sum(summary.get("missing") or 0 for summary in stats_summaries(requests)):
        yield f"tokens without stats: {missing}; entropies are means over the others"
    answered = [question for question in stage.questions if question.status == "ok"]
    if unknown := sum(_is_unmeasured(question, stage.open_loop, slo) for question in answered):
        yield f"questions counted as outside the SLO because TTFT or TPOT could not be measured: {unknown}"


def _is_unmeasured(question: MeasuredQuestion, open_loop: bool, slo: Slo) -> bool:
    return any(value is None for _, value in _against_bounds(question, open_loop, slo))


def _usage_mismatch(
    what: str, usage: Sequence[int | None], counter: int | None, requests: Sequence[MeasuredRequest]
) -> Iterator[str]:
    """Yield a warning if usage differs from the server's own counter.

    A request that broke off has no usage, but the server counts what it generated. If there is one, usage below the
    counter proves nothing.
    """
    if counter is None:
        return
    total = sum(tokens or 0 for tokens in usage)
    lost = any(request.status != "ok" and tokens is None for request, tokens in zip(requests, usage, strict=True))
    excess = total - counter if lost else abs(total - counter)
    if excess > max(1.0, COUNTER_TOLERANCE * counter):
        yield f"usage says {total} {what} tokens, the server's counter {counter}"
