"""Stages whose figures are known by hand, servers that are not honest, and runs that must not pass for good ones."""

from typing import Any

import numpy as np
import pytest

from loadtest.records import Call, Item, Stage
from loadtest.results import Interval, Percentiles
from loadtest.scenario import Scenario
from loadtest.statistics import paired_difference
from loadtest.summary import summarize, summarize_stage

GOOD = Scenario(
    name="test",
    task={"type": "demo"},
    arms={"plain": {}, "em": {}},
    loads=[{"type": "closed", "concurrency": 2}],
    slo={"ttft_ms": 500, "tpot_ms": 100, "e2e_ms": 2000},
    limits={"error_rate": 0.1, "lag_ms": 50},
    price_per_hour=7.2,
)


def scenario(**changes: Any) -> Scenario:
    """GOOD, with other fields."""
    return Scenario.model_validate(GOOD.model_dump() | changes)


def whole(sent: float = 0.0, first: float = 0.2, last: float = 1.0, tokens: int = 11, **fields: Any) -> Call:
    """A call that was answered: by default TTFT 0.2 s and TPOT 0.08 s."""
    usage = {"prompt_tokens": 5, "output_tokens": tokens, "delivered_tokens": tokens, "chunks": tokens}
    return Call(**{"seed": 0, "sent": sent, "first": first, "last": last, "status": "ok"} | usage | fields)


def broken(status: str, error: str, **fields: Any) -> Call:
    """A call that broke off before its usage came."""
    return Call(**{"seed": 0, "status": status, "error": error, "last": 0.5} | fields)


def item(*calls: Call, index: int = 0, scheduled: float = 0.0, correct: bool | None = None) -> Item:
    """A question; the user has the first whole reply."""
    reply = next((call for call in calls if call.status == "ok"), None)
    return Item(index, scheduled, list(calls), reply=reply, correct=correct)


def stage(*items: Item, arm: str = "plain", repetition: int = 0, **fields: Any) -> Stage:
    """Ten seconds of a closed loop."""
    fixed = {"arm": arm, "load": "closed 2", "offered": 2.0, "open_loop": False, "repetition": repetition}
    return Stage(**fixed | {"items": list(items), "seconds": 10.0} | fields)


def answered(right: int, asked: int, **fields: Any) -> list[Item]:
    """So many questions, the first of them answered rightly."""
    return [item(whole(**fields), index=index, correct=index < right) for index in range(asked)]


def single(value: float) -> Percentiles:
    """Of one value."""
    return Percentiles(count=1, mean=value, p50=value, p90=value, p95=value, p99=value)


# ---- One stage


def mixed() -> Stage:
    """One question of each kind: right and good, wrong and slow, broken off, stalled, refused, and a vote of three."""
    em_inf = {"tokens": 30, "optimized_tokens": 6, "missing": 0, "entropy_before": 1.0, "entropy_after": 0.5}
    partly = {"tokens": 14, "optimized_tokens": 1, "missing": 4, "entropy_before": 2.0, "entropy_after": 1.5}
    return stage(
        item(whole(tokens=31, last=2.0, sent=0.5, first=0.8, gaps=[0.1, 0.3], em_inf=em_inf), index=0, correct=True),
        item(whole(tokens=11, last=4.2, sent=1.0, first=2.2, em_inf=partly), index=1, correct=False),
        item(broken("incomplete", "stalled: no byte for 60 s", first=0.1, chunks=3, gaps=[9.0]), index=2, correct=True),
        item(broken("failed", "HTTP 500: no memory: none at all"), index=3, correct=False),
        item(broken("failed", "connection: ConnectError"), index=4, correct=False),
        item(
            whole(tokens=5, sent=3.0, first=3.1, last=3.5),
            whole(tokens=9, sent=3.0, first=3.1, last=3.7),
            broken("incomplete", "stalled: no byte for 60 s", sent=3.0, last=3.9, output_tokens=4),
            index=5,
            correct=True,
        ),
        lags=[0.001, 0.003],
        counted_output_tokens=100,
        counted_prompt_tokens=40,
    )


def test_counts_and_rates_are_as_by_hand():
    result = summarize_stage(mixed(), GOOD)
    assert (result.items, result.ok, result.incomplete, result.failed) == (6, 3, 1, 2)
    assert result.errors == {"stalled": 2, "HTTP 500": 1, "connection": 1}
    assert result.requests_per_second == pytest.approx(0.4)
    assert (result.output_tokens, result.prompt_tokens) == (31 + 11 + 5 + 9 + 4, 20)
    assert result.output_tokens_per_second == pytest.approx(6.0)
    assert result.delivered_tokens_per_second == pytest.approx((31 + 11 + 5) / 10)
    assert result.answers_per_second == pytest.approx(0.3)
    assert result.correct_per_second == pytest.approx(0.2)  # question 2 broke off, whatever is read in it
    assert result.accuracy == pytest.approx(2 / 6)
    assert result.counted_output_tokens == 100
    assert result.invalid == []


def test_latencies_are_as_by_hand():
    result = summarize_stage(mixed(), GOOD)
    ttft, tpot, itl, e2e = result.latency.ttft, result.latency.tpot, result.latency.itl, result.latency.e2e
    assert ttft is not None and tpot is not None and itl is not None and e2e is not None
    assert (ttft.count, tpot.count, itl.count, e2e.count) == (4, 4, 2, 3)
    assert ttft.mean == pytest.approx((0.3 + 1.2 + 0.1 + 0.1) / 4)
    assert tpot.mean == pytest.approx((1.2 / 30 + 2.0 / 10 + 0.4 / 4 + 0.6 / 8) / 4)
    assert itl.mean == pytest.approx(0.2)
    assert e2e.mean == pytest.approx((1.5 + 3.2 + 0.9) / 3)  # a vote ends with its last call
    assert e2e.p50 == pytest.approx(1.5)
    assert result.lag_p99 == pytest.approx(0.00298)


def test_entropies_are_weighted_by_the_tokens_that_are_known():
    result = summarize_stage(mixed(), GOOD)
    assert result.entropy_before == pytest.approx((30 * 1.0 + 10 * 2.0) / 40)
    assert result.entropy_after == pytest.approx((30 * 0.5 + 10 * 1.5) / 40)
    assert result.optimized_share == pytest.approx(7 / 40)
    assert "tokens without statistics: 4; entropies are of the others" in result.warnings


def test_without_statistics_answers_stream_or_slo_there_are_no_figures_of_them():
    result = summarize_stage(stage(item(whole(first=None, chunks=0, last=2.0))), scenario(slo={}))  # type: ignore[arg-type]
    assert (result.latency.ttft, result.latency.tpot, result.latency.itl) == (None, None, None)
    assert result.latency.e2e == single(2.0)
    assert (result.entropy_before, result.entropy_after, result.optimized_share) == (None, None, None)
    assert (result.accuracy, result.correct_per_second, result.goodput) == (None, None, None)
    assert result.warnings == [] and result.invalid == [] and result.lag_p99 == 0.0


def test_one_token_has_no_time_per_token_but_meets_a_bound_of_it():
    result = summarize_stage(stage(item(whole(tokens=1))), GOOD)
    assert result.latency.tpot is None
    assert result.goodput == pytest.approx(0.1) and result.warnings == []


# ---- Goodput


@pytest.mark.parametrize(
    ("call", "good"),
    [
        (whole(first=0.5, last=1.5), True),  # each bound met exactly
        (whole(first=0.51, last=1.0), False),
        (whole(first=0.2, last=1.21), False),  # 101 ms per token
        (whole(first=0.2, last=2.01, tokens=101), False),
        (broken("incomplete", "stalled: 60 s", first=0.1, last=0.2), False),
    ],
)
def test_goodput_counts_what_keeps_to_every_bound(call, good):
    assert summarize_stage(stage(item(call)), GOOD).goodput == pytest.approx(0.1 if good else 0.0)


def test_one_slow_voter_spoils_a_question():
    good, slow = whole(), whole(first=0.6)
    assert summarize_stage(stage(item(good, good)), GOOD).goodput == pytest.approx(0.1)
    assert summarize_stage(stage(item(good, slow)), GOOD).goodput == 0.0


def test_bounds_that_are_not_set_do_not_bind():
    slow = stage(item(whole(first=9.0, last=10.0)))
    assert summarize_stage(slow, scenario(slo={"tpot_ms": 100})).goodput == pytest.approx(0.1)
    assert summarize_stage(slow, scenario(slo={"ttft_ms": 100})).goodput == 0.0


def test_what_cannot_be_measured_is_not_good_and_said():
    result = summarize_stage(stage(item(whole(first=None))), GOOD)  # type: ignore[arg-type]
    assert result.goodput == 0.0
    assert result.warnings == ["questions counted as outside the SLO because TTFT or TPOT could not be measured: 1"]


# ---- Open loops


def test_in_an_open_loop_latency_counts_from_when_a_question_was_due():
    """A server that was stuck for 3 s: what was asked late was waited for all the same."""
    late = item(whole(sent=4.0, first=4.2, last=5.0), scheduled=1.0)
    result = summarize_stage(stage(late, open_loop=True), GOOD)
    assert result.latency.ttft is not None and result.latency.tpot is not None and result.latency.e2e is not None
    assert result.latency.e2e.p50 == pytest.approx(4.0)
    assert result.latency.ttft.p50 == pytest.approx(3.2)
    assert result.latency.tpot.p50 == pytest.approx(0.08)
    assert result.goodput == 0.0


def test_in_a_closed_loop_it_counts_from_when_it_was_sent():
    late = item(whole(sent=4.0, first=4.2, last=5.0), scheduled=1.0)
    result = summarize_stage(stage(late), GOOD)
    assert result.latency.e2e is not None and result.latency.e2e.p50 == pytest.approx(1.0)
    assert result.latency.ttft is not None and result.latency.ttft.p50 == pytest.approx(0.2)
    assert result.goodput == pytest.approx(0.1)


def test_voters_in_an_open_loop_have_a_ttft_of_their_own():
    late = item(whole(sent=4.0, first=4.2), whole(sent=4.5, first=4.7, last=5.0), scheduled=1.0)
    result = summarize_stage(stage(late, open_loop=True), GOOD)
    assert result.latency.ttft is not None and result.latency.ttft.mean == pytest.approx(0.2)
    assert result.latency.e2e is not None and result.latency.e2e.mean == pytest.approx(4.0)


# ---- Invalid stages


def test_a_generator_that_is_late_makes_a_stage_invalid():
    lags = [0.0] * 50 + [0.08] * 50
    assert summarize_stage(stage(item(whole()), lags=lags), GOOD).invalid == [
        "the generator's p99 delay was 80.0 ms; at most 50 ms is allowed"
    ]
    assert summarize_stage(stage(item(whole()), lags=lags), scenario(limits={"lag_ms": 80.1})).invalid == []


def test_a_stage_without_answers_or_without_time_is_invalid():
    failed = summarize_stage(stage(item(broken("failed", "HTTP 503: busy"))), GOOD)
    assert failed.invalid == ["no question was answered, of 1"]
    assert failed.latency.e2e is None
    empty = summarize_stage(stage(seconds=0.0), GOOD)
    assert empty.invalid == ["it took 0 seconds", "no question was answered, of 0"]
    assert empty.answers_per_second == 0.0 and empty.accuracy is None


# ---- Servers whose usage cannot be believed


@pytest.mark.parametrize(("counter", "warned"), [(99, True), (109, False), (110, False), (111, False), (112, True)])
def test_usage_is_compared_with_the_counter_to_a_token(counter, warned):
    result = summarize_stage(stage(*answered(0, 10), counted_output_tokens=counter), GOOD)
    expected = [f"usage says 110 output tokens, the server's counter {counter}"]
    assert result.warnings == (expected if warned else [])


@pytest.mark.parametrize(("counter", "warned"), [(100_101, True), (100_100, False), (99_901, False), (99_899, True)])
def test_usage_is_compared_with_the_counter_to_a_thousandth(counter, warned):
    result = summarize_stage(stage(item(whole(tokens=100_000)), counted_output_tokens=counter), GOOD)
    assert any("counter" in warning for warning in result.warnings) == warned


def test_prompt_tokens_are_compared_too():
    result = summarize_stage(stage(*answered(0, 10), counted_prompt_tokens=40), GOOD)
    assert result.warnings == ["usage says 50 prompt tokens, the server's counter 40"]


def test_what_broke_off_explains_a_higher_counter_but_not_a_lower_one():
    lost = item(broken("incomplete", "broke off: no [DONE]", chunks=20))

    def compared(counter: int) -> bool:
        result = summarize_stage(stage(*answered(0, 10), lost, counted_output_tokens=counter), GOOD)
        return any("counter" in warning for warning in result.warnings)

    assert not compared(140)
    assert compared(100)


def test_calls_without_usage_are_counted():
    silent = {"output_tokens": None, "prompt_tokens": None}
    result = summarize_stage(stage(item(whole()), item(whole(**silent)), item(whole(**silent))), GOOD)
    assert result.warnings == ["whole calls without usage: 2; their tokens are not in output_tokens"]
    assert result.output_tokens == 11


def test_more_chunks_than_tokens_are_a_lie():
    result = summarize_stage(stage(item(whole(chunks=11)), item(whole(chunks=12)), item(whole(chunks=3))), GOOD)
    assert result.warnings == ["calls of which usage says fewer tokens than chunks that came: 1"]


# ---- Whether the run has failed


def test_a_run_fails_where_too_many_questions_were_not_answered():
    lost = [item(broken("failed", "HTTP 500: no")), item(broken("incomplete", "stalled: 60 s"))]
    below, above = stage(*answered(9, 18), *lost), stage(*answered(9, 17), *lost, arm="em", repetition=2)
    results, _, _, failed = summarize([below, above], GOOD)
    assert results[0].warnings == ["10.0% of 20 questions were not answered"]
    assert failed == [
        "em under closed 2, repetition 2: 10.5% of 19 questions were not answered; "
        "at most 10.0% is allowed (HTTP 500: 1, stalled: 1)"
    ]


def test_an_invalid_repetition_is_reported_and_left_out_but_fails_no_run():
    stages = [
        stage(*answered(5, 10), repetition=0),
        stage(*answered(10, 10), repetition=1, seconds=1.0, lags=[0.2]),
    ]
    results, arms, _, failed = summarize(stages, GOOD)
    assert [bool(result.invalid) for result in results] == [False, True]
    assert failed == []
    assert (arms[0].repetitions, arms[0].answers_per_second) == (1, Interval(value=1.0, low=1.0, high=1.0))
    assert arms[0].accuracy is not None and arms[0].accuracy.value == 0.5


def test_an_arm_without_a_valid_repetition_fails_the_run():
    stages = [stage(*answered(5, 10)), stage(*answered(5, 10), arm="em", lags=[0.2])]
    results, arms, comparisons, failed = summarize(stages, GOOD)
    assert len(results) == 2
    assert [arm.arm for arm in arms] == ["plain"] and comparisons == []
    assert failed == ["em under closed 2: no valid repetition"]


# ---- Arms


def test_an_arm_is_the_median_of_its_repetitions_with_the_range():
    stages = [
        stage(*answered(5, 10, first=0.1), repetition=0, seconds=10.0),
        stage(*answered(6, 10, first=0.2), repetition=1, seconds=8.0),
        stage(*answered(4, 10, first=0.4), repetition=2, seconds=5.0),
    ]
    (arm,) = summarize(stages, GOOD)[1]
    assert (arm.arm, arm.load, arm.offered, arm.repetitions) == ("plain", "closed 2", 2.0, 3)
    assert arm.answers_per_second == Interval(value=1.25, low=1.0, high=2.0)
    assert arm.correct_per_second == Interval(value=0.75, low=0.5, high=0.8)
    assert arm.output_tokens_per_second == Interval(value=13.75, low=11.0, high=22.0)
    assert arm.goodput == Interval(value=1.25, low=1.0, high=2.0)
    assert arm.accuracy is not None and arm.accuracy.value == 0.5
    assert arm.ttft_p50 == pytest.approx(0.2) and arm.ttft_p99 == pytest.approx(0.2)
    assert arm.tpot_p50 == pytest.approx(0.08)
    assert arm.e2e_p50 == pytest.approx(1.0) and arm.e2e_p99 == pytest.approx(1.0)


def test_what_a_right_answer_costs():
    stages = [stage(*answered(5, 10), repetition=0, seconds=10.0), stage(*answered(6, 10), repetition=1, seconds=12.0)]
    (arm,) = summarize(stages, GOOD)[1]
    assert arm.tokens_per_correct == pytest.approx(220 / 11)
    assert arm.seconds_per_correct == pytest.approx(2.0)
    assert arm.cost_per_correct == pytest.approx(2.0 * 7.2 / 3600)
    assert arm.cost_per_million_tokens == pytest.approx(22 * 7.2 / 3600 / 220 * 1e6)
    (free,) = summarize(stages, scenario(price_per_hour=None))[1]
    assert (free.cost_per_correct, free.cost_per_million_tokens) == (None, None)


def test_where_nothing_is_right_or_counted_there_is_no_price_per_piece():
    (wrong,) = summarize([stage(*answered(0, 10))], GOOD)[1]
    assert (wrong.tokens_per_correct, wrong.seconds_per_correct, wrong.cost_per_correct) == (None, None, None)
    (silent,) = summarize([stage(*answered(5, 10, output_tokens=None))], GOOD)[1]
    assert (silent.tokens_per_correct, silent.cost_per_million_tokens) == (None, None)
    (unmarked,) = summarize([stage(item(whole()))], GOOD)[1]
    assert (unmarked.accuracy, unmarked.correct_per_second, unmarked.seconds_per_correct) == (None, None, None)


def test_an_arm_has_the_entropies_of_its_replies():
    def block(entropy: float | None, tokens: int) -> dict[str, Any]:
        return {"tokens": tokens, "optimized_tokens": 1, "missing": 0, "entropy_before": entropy, "entropy_after": 0.0}

    items = [item(whole(em_inf=block(0.9, 1))), item(whole(em_inf=block(0.1, 3))), item(whole(em_inf=block(None, 0)))]
    (arm,) = summarize([stage(*items)], GOOD)[1]
    assert arm.entropies == [0.1, 0.9]
    assert arm.entropy_before == pytest.approx(0.3) and arm.optimized_share == pytest.approx(3 / 4)
    many = [item(whole(em_inf=block(entropy / 5000, 1))) for entropy in range(5001)]
    (arm,) = summarize([stage(*many)], GOOD)[1]
    assert len(arm.entropies) == 2000
    assert (arm.entropies[0], arm.entropies[-1]) == (0.0, 1.0)
    assert np.mean(arm.entropies) == pytest.approx(0.5, abs=0.001)


# ---- Comparisons


def test_arms_are_compared_by_repetitions_that_both_have():
    stages = [
        stage(*answered(5, 10), repetition=0, seconds=10.0),
        stage(*answered(5, 10), repetition=1, seconds=5.0),
        stage(*answered(9, 10), repetition=2, seconds=1.0),
        stage(*answered(8, 10, tokens=22), arm="em", repetition=1, seconds=4.0),
        stage(*answered(8, 10, tokens=22), arm="em", repetition=0, seconds=10.0),
        stage(*answered(1, 10, tokens=22), arm="em", repetition=2, seconds=10.0, lags=[1.0]),
    ]
    _, _, (found,), _ = summarize(stages, GOOD)
    assert (found.arm, found.reference, found.load) == ("em", "plain", "closed 2")
    assert found.answers_per_second_ratio == Interval(value=1.125, low=1.0, high=1.25)
    assert found.tokens_ratio == pytest.approx(2.0)
    expected = {arm: {index: [index < right] * 2 for index in range(10)} for arm, right in (("em", 8), ("plain", 5))}
    assert found.accuracy_difference == paired_difference(expected["em"], expected["plain"])
    assert found.accuracy_difference is not None and found.accuracy_difference.value == pytest.approx(0.3)


def test_arms_are_compared_with_the_reference_under_the_same_load():
    loads = {"closed 2": 10.0, "closed 4": 5.0}
    stages = [stage(*answered(5, 10), arm=arm, load=load) for arm in ("plain", "em") for load in loads]
    stages.append(stage(*answered(5, 10), arm="plain", load="closed 8"))
    _, arms, comparisons, _ = summarize(stages, scenario(references=("em",)))
    assert [(found.arm, found.reference, found.load) for found in comparisons] == [
        ("plain", "em", "closed 2"),
        ("plain", "em", "closed 4"),
    ]
    assert len(arms) == 5


def test_without_repetitions_in_common_nothing_is_compared():
    stages = [stage(*answered(5, 10), repetition=0), stage(*answered(5, 10), arm="em", repetition=1)]
    assert summarize(stages, GOOD)[2] == []


def test_without_answers_or_usage_the_speed_is_compared_all_the_same():
    silent = [stage(item(whole(output_tokens=None)), arm=arm) for arm in ("plain", "em")]
    _, _, (found,), _ = summarize(silent, GOOD)
    assert found.answers_per_second_ratio.value == 1.0
    assert found.accuracy_difference is None and found.tokens_ratio is None


def test_all_are_compared_with_each_reference():
    scenario = GOOD.model_copy(update={"references": ("plain", "em")})
    stages = [stage(item(whole(), correct=arm == "em"), arm=arm) for arm in ("plain", "em", "vote")]
    _, _, comparisons, _ = summarize(stages, scenario)
    found = [(one.arm, one.reference) for one in comparisons]
    assert found == [("em", "plain"), ("vote", "plain"), ("plain", "em"), ("vote", "em")]
    differences = [one.accuracy_difference.value for one in comparisons if one.accuracy_difference]
    assert differences == [1, 0, -1, -1]


def test_arms_are_told_in_the_scenarios_order_whatever_ran_first():
    names = [arm.name for arm in GOOD.arms]
    stages = [stage(item(whole(), correct=True), arm=arm) for arm in reversed(names)]
    _, arms, _, _ = summarize(stages, GOOD)
    assert [arm.arm for arm in arms] == names
    assert len(names) > 1
