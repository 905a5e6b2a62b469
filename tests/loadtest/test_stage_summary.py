"""Stages whose figures are known by hand, late generators, and servers with false usage."""

import pytest

from loadtest.measurements import Stage
from loadtest.results import Percentiles
from loadtest.stage_summary import summarize_stage
from tests.loadtest.measured import GOOD, answered, broken, complete, question, scenario, stage


def single(value: float) -> Percentiles:
    """Return the percentiles of one value."""
    return Percentiles(count=1, mean=value, p50=value, p90=value, p95=value, p99=value)


# ---- One stage


def test_reasons_are_counted_by_kind():
    wrong = answered(correct=1, asked=5)
    problems = ["NameError in tests.py: line 3", "no code", "NameError in tests.py"]
    for one, problem in zip(wrong[1:4], problems, strict=True):
        one.problem = problem
    assert summarize_stage(stage(*wrong), GOOD).problems == {"NameError in tests.py": 2, "no code": 1}


def mixed() -> Stage:
    """Return a question of each kind: correct and fast, wrong and slow, stalled, refused twice, and a vote of three."""
    em_inf = {"tokens": 30, "optimized_tokens": 6, "missing": 0, "entropy_before": 1.0, "entropy_after": 0.5}
    partly = {"tokens": 14, "optimized_tokens": 1, "missing": 4, "entropy_before": 2.0, "entropy_after": 1.5}
    return stage(
        question(
            complete(tokens=31, last=2.0, sent=0.5, first=0.8, gaps=[0.1, 0.3], em_inf=em_inf), index=0, correct=True
        ),
        question(complete(tokens=11, last=4.2, sent=1.0, first=2.2, em_inf=partly), index=1, correct=False),
        question(
            broken("incomplete", "stalled: no byte for 60 s", first=0.1, chunks=3, gaps=[9.0]), index=2, correct=True
        ),
        question(broken("failed", "HTTP 500: no memory: none at all"), index=3, correct=False),
        question(broken("failed", "connection: ConnectError"), index=4, correct=False),
        question(
            complete(tokens=5, sent=3.0, first=3.1, last=3.5),
            complete(tokens=9, sent=3.0, first=3.1, last=3.7),
            broken("incomplete", "stalled: no byte for 60 s", sent=3.0, last=3.9, output_tokens=4),
            index=5,
            correct=True,
        ),
        scheduling_delays=[0.001, 0.003],
        counted_output_tokens=100,
        counted_prompt_tokens=40,
    )


def test_replies_that_were_cut_off_are_counted_over_all_complete_requests():
    """A client's vote counts with each of its requests, whichever wins; one that broke off does not."""
    voters = [complete(finish_reason=reason) for reason in ("stop", "length", "length")]
    lost = broken("incomplete", "stalled: 60 s", finish_reason="length")
    result = summarize_stage(stage(question(*voters, lost), question(complete(finish_reason="stop"), index=1)), GOOD)
    assert result.cut_off == pytest.approx(2 / 4)
    assert result.tokens_per_question == pytest.approx(4 * 11 / 2)
    nothing = summarize_stage(stage(question(broken("failed", "HTTP 500: no"))), GOOD)
    assert (nothing.cut_off, nothing.tokens_per_question) == (None, None)


def test_counts_and_rates_are_those_computed_by_hand():
    result = summarize_stage(mixed(), GOOD)
    assert (result.questions, result.ok, result.incomplete, result.failed) == (6, 3, 1, 2)
    assert result.errors == {"stalled": 2, "HTTP 500": 1, "connection": 1}
    assert result.requests_per_second == pytest.approx(0.4)
    assert (result.output_tokens, result.prompt_tokens) == (31 + 11 + 5 + 9 + 4, 20)
    assert result.output_tokens_per_second == pytest.approx(6.0)
    assert result.delivered_tokens_per_second == pytest.approx((31 + 11 + 5) / 10)
    assert result.answers_per_second == pytest.approx(0.3)
    assert result.correct_per_second == pytest.approx(0.2)  # question 2 broke off: it is not correct, whatever its text
    assert result.accuracy == pytest.approx(2 / 6)
    assert result.counted_output_tokens == 100
    assert result.invalid == []


def test_latencies_are_those_computed_by_hand():
    result = summarize_stage(mixed(), GOOD)
    ttft, tpot, itl, e2e = result.latency.ttft, result.latency.tpot, result.latency.itl, result.latency.e2e
    assert ttft is not None and tpot is not None and itl is not None and e2e is not None
    assert (ttft.count, tpot.count, itl.count, e2e.count) == (4, 4, 2, 3)
    assert ttft.mean == pytest.approx((0.3 + 1.2 + 0.1 + 0.1) / 4)
    assert tpot.mean == pytest.approx((1.2 / 30 + 2.0 / 10 + 0.4 / 4 + 0.6 / 8) / 4)
    assert itl.mean == pytest.approx(0.2)
    assert e2e.mean == pytest.approx((1.5 + 3.2 + 0.9) / 3)  # a vote ends with its last request
    assert e2e.p50 == pytest.approx(1.5)
    assert result.scheduling_delay_p99 == pytest.approx(0.00298)


def test_entropies_are_weighted_by_the_tokens_with_stats():
    result = summarize_stage(mixed(), GOOD)
    assert result.entropy_before == pytest.approx((30 * 1.0 + 10 * 2.0) / 40)
    assert result.entropy_after == pytest.approx((30 * 0.5 + 10 * 1.5) / 40)
    assert result.optimized_share == pytest.approx(7 / 40)
    assert "tokens without stats: 4; entropies are means over the others" in result.warnings


def test_without_stats_answers_stream_or_slo_their_figures_are_none():
    result = summarize_stage(stage(question(complete(first=None, chunks=0, last=2.0))), scenario(slo={}))  # type: ignore[arg-type]
    assert (result.latency.ttft, result.latency.tpot, result.latency.itl) == (None, None, None)
    assert result.latency.e2e == single(2.0)
    assert (result.entropy_before, result.entropy_after, result.optimized_share) == (None, None, None)
    assert (result.accuracy, result.correct_per_second, result.goodput) == (None, None, None)
    assert result.warnings == [] and result.invalid == [] and result.scheduling_delay_p99 == 0.0


def test_a_reply_of_one_token_has_no_tpot_but_meets_its_bound():
    result = summarize_stage(stage(question(complete(tokens=1))), GOOD)
    assert result.latency.tpot is None
    assert result.goodput == pytest.approx(0.1) and result.warnings == []


# ---- Goodput


@pytest.mark.parametrize(
    ("request_", "good"),
    [
        (complete(first=0.5, last=1.5), True),  # each bound met exactly
        (complete(first=0.51, last=1.0), False),
        (complete(first=0.2, last=1.21), False),  # 101 ms per token
        (complete(first=0.2, last=2.01, tokens=101), False),
        (broken("incomplete", "stalled: 60 s", first=0.1, last=0.2), False),
    ],
)
def test_goodput_counts_questions_that_meet_every_bound(request_, good):
    assert summarize_stage(stage(question(request_)), GOOD).goodput == pytest.approx(0.1 if good else 0.0)


def test_a_question_with_a_slow_voter_misses_the_slo():
    good, slow = complete(), complete(first=0.6)
    assert summarize_stage(stage(question(good, good)), GOOD).goodput == pytest.approx(0.1)
    assert summarize_stage(stage(question(good, slow)), GOOD).goodput == 0.0


def test_bounds_that_are_not_set_are_not_checked():
    slow = stage(question(complete(first=9.0, last=10.0)))
    assert summarize_stage(slow, scenario(slo={"tpot_ms": 100})).goodput == pytest.approx(0.1)
    assert summarize_stage(slow, scenario(slo={"ttft_ms": 100})).goodput == 0.0


def test_a_latency_that_cannot_be_measured_misses_the_slo_with_a_warning():
    result = summarize_stage(stage(question(complete(first=None))), GOOD)  # type: ignore[arg-type]
    assert result.goodput == 0.0
    assert result.warnings == ["questions counted as outside the SLO because TTFT or TPOT could not be measured: 1"]


# ---- Open loops


def test_in_an_open_loop_latency_counts_from_the_due_time():
    """A server was stuck for 3 s: users waited for the question although the generator asked it late."""
    late = question(complete(sent=4.0, first=4.2, last=5.0), scheduled=1.0)
    result = summarize_stage(stage(late, open_loop=True), GOOD)
    assert result.latency.ttft is not None and result.latency.tpot is not None and result.latency.e2e is not None
    assert result.latency.e2e.p50 == pytest.approx(4.0)
    assert result.latency.ttft.p50 == pytest.approx(3.2)
    assert result.latency.tpot.p50 == pytest.approx(0.08)
    assert result.goodput == 0.0


def test_in_a_closed_loop_latency_counts_from_the_sending():
    late = question(complete(sent=4.0, first=4.2, last=5.0), scheduled=1.0)
    result = summarize_stage(stage(late), GOOD)
    assert result.latency.e2e is not None and result.latency.e2e.p50 == pytest.approx(1.0)
    assert result.latency.ttft is not None and result.latency.ttft.p50 == pytest.approx(0.2)
    assert result.goodput == pytest.approx(0.1)


def test_voters_in_an_open_loop_have_a_ttft_each():
    late = question(complete(sent=4.0, first=4.2), complete(sent=4.5, first=4.7, last=5.0), scheduled=1.0)
    result = summarize_stage(stage(late, open_loop=True), GOOD)
    assert result.latency.ttft is not None and result.latency.ttft.mean == pytest.approx(0.2)
    assert result.latency.e2e is not None and result.latency.e2e.mean == pytest.approx(4.0)


# ---- Invalid stages


def test_a_late_generator_makes_a_stage_invalid():
    scheduling_delays = [0.0] * 50 + [0.08] * 50
    assert summarize_stage(stage(question(complete()), scheduling_delays=scheduling_delays), GOOD).invalid == [
        "the generator's p99 delay was 80.0 ms; at most 50 ms is allowed"
    ]
    assert (
        summarize_stage(
            stage(question(complete()), scheduling_delays=scheduling_delays), scenario(limits={"lag_ms": 80.1})
        ).invalid
        == []
    )


def test_a_stage_without_answers_or_without_time_is_invalid():
    failed = summarize_stage(stage(question(broken("failed", "HTTP 503: busy"))), GOOD)
    assert failed.invalid == ["no question was answered, of 1"]
    assert failed.latency.e2e is None
    empty = summarize_stage(stage(seconds=0.0), GOOD)
    assert empty.invalid == ["it took 0 seconds", "no question was answered, of 0"]
    assert empty.answers_per_second == 0.0 and empty.accuracy is None


# ---- Servers with false usage


@pytest.mark.parametrize(("counter", "warned"), [(99, True), (109, False), (110, False), (111, False), (112, True)])
def test_usage_is_compared_with_the_counter_to_a_token(counter, warned):
    result = summarize_stage(stage(*answered(0, 10), counted_output_tokens=counter), GOOD)
    expected = [f"usage says 110 output tokens, the server's counter {counter}"]
    assert result.warnings == (expected if warned else [])


@pytest.mark.parametrize(("counter", "warned"), [(100_101, True), (100_100, False), (99_901, False), (99_899, True)])
def test_usage_is_compared_with_the_counter_to_a_thousandth(counter, warned):
    result = summarize_stage(stage(question(complete(tokens=100_000)), counted_output_tokens=counter), GOOD)
    assert any("counter" in warning for warning in result.warnings) == warned


def test_prompt_tokens_are_compared_too():
    result = summarize_stage(stage(*answered(0, 10), counted_prompt_tokens=40), GOOD)
    assert result.warnings == ["usage says 50 prompt tokens, the server's counter 40"]


def test_a_broken_request_explains_a_higher_counter_but_not_a_lower_one():
    lost = question(broken("incomplete", "broke off: no [DONE]", chunks=20))

    def compared(counter: int) -> bool:
        result = summarize_stage(stage(*answered(0, 10), lost, counted_output_tokens=counter), GOOD)
        return any("counter" in warning for warning in result.warnings)

    assert not compared(140)
    assert compared(100)


def test_requests_without_usage_are_counted():
    no_usage = {"output_tokens": None, "prompt_tokens": None}
    result = summarize_stage(
        stage(question(complete()), question(complete(**no_usage)), question(complete(**no_usage))), GOOD
    )
    assert result.warnings == ["complete requests without usage: 2; their tokens are not in output_tokens"]
    assert result.output_tokens == 11


def test_more_chunks_than_tokens_is_a_warning():
    result = summarize_stage(
        stage(question(complete(chunks=11)), question(complete(chunks=12)), question(complete(chunks=3))), GOOD
    )
    assert result.warnings == ["requests with fewer tokens by usage than chunks received: 1"]
