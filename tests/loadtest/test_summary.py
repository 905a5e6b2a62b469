"""Figures of configs and comparisons, and runs that must fail."""

from typing import Any

import numpy as np
import pytest

from loadtest.intervals import paired_difference
from loadtest.results import Interval
from loadtest.summary import summarize
from tests.loadtest.measured import GOOD, answered, broken, complete, question, scenario, stage

# ---- Whether the run has failed


def test_a_run_fails_if_too_many_questions_were_not_answered():
    lost = [question(broken("failed", "HTTP 500: no")), question(broken("incomplete", "stalled: 60 s"))]
    below, above = stage(*answered(9, 18), *lost), stage(*answered(9, 17), *lost, config="em", repetition=2)
    results, _, _, failed = summarize([below, above], GOOD)
    assert results[0].warnings == ["10.0% of 20 questions were not answered"]
    assert failed == [
        "em under closed 2, repetition 2: 10.5% of 19 questions were not answered; "
        "at most 10.0% is allowed (HTTP 500: 1, stalled: 1)"
    ]


def test_an_invalid_repetition_is_left_out_but_does_not_fail_the_run():
    stages = [
        stage(*answered(5, 10), repetition=0),
        stage(*answered(10, 10), repetition=1, seconds=1.0, scheduling_delays=[0.2]),
    ]
    results, configs, _, failed = summarize(stages, GOOD)
    assert [bool(result.invalid) for result in results] == [False, True]
    assert failed == []
    assert (configs[0].repetitions, configs[0].answers_per_second) == (1, Interval(value=1.0, low=1.0, high=1.0))
    assert configs[0].accuracy is not None and configs[0].accuracy.value == 0.5


def test_a_config_without_a_valid_repetition_fails_the_run():
    stages = [stage(*answered(5, 10)), stage(*answered(5, 10), config="em", scheduling_delays=[0.2])]
    results, configs, comparisons, failed = summarize(stages, GOOD)
    assert len(results) == 2
    assert [config.config for config in configs] == ["plain"] and comparisons == []
    assert failed == ["em under closed 2: no valid repetition"]


# ---- Configs


def test_a_config_has_the_median_and_range_of_its_repetitions():
    stages = [
        stage(*answered(5, 10, first=0.1), repetition=0, seconds=10.0),
        stage(*answered(6, 10, first=0.2), repetition=1, seconds=8.0),
        stage(*answered(4, 10, first=0.4), repetition=2, seconds=5.0),
    ]
    (config,) = summarize(stages, GOOD)[1]
    assert (config.config, config.load, config.target_load, config.repetitions) == ("plain", "closed 2", 2.0, 3)
    assert config.answers_per_second == Interval(value=1.25, low=1.0, high=2.0)
    assert config.correct_per_second == Interval(value=0.75, low=0.5, high=0.8)
    assert config.output_tokens_per_second == Interval(value=13.75, low=11.0, high=22.0)
    assert config.goodput == Interval(value=1.25, low=1.0, high=2.0)
    assert config.accuracy is not None and config.accuracy.value == 0.5
    assert config.ttft_p50 == pytest.approx(0.2) and config.ttft_p99 == pytest.approx(0.2)
    assert config.tpot_p50 == pytest.approx(0.08)
    assert config.e2e_p50 == pytest.approx(1.0) and config.e2e_p99 == pytest.approx(1.0)


def test_what_a_right_answer_costs():
    stages = [stage(*answered(5, 10), repetition=0, seconds=10.0), stage(*answered(6, 10), repetition=1, seconds=12.0)]
    (config,) = summarize(stages, GOOD)[1]
    assert config.tokens_per_correct == pytest.approx(220 / 11)
    assert config.seconds_per_correct == pytest.approx(2.0)
    assert config.cost_per_correct == pytest.approx(2.0 * 7.2 / 3600)
    assert config.cost_per_million_tokens == pytest.approx(22 * 7.2 / 3600 / 220 * 1e6)
    (free,) = summarize(stages, scenario(price_per_hour=None))[1]
    assert (free.cost_per_correct, free.cost_per_million_tokens) == (None, None)


def test_tokens_per_question_and_replies_cut_off_are_over_all_repetitions():
    stages = [
        stage(*answered(1, 10, tokens=20, finish_reason="length"), repetition=0),
        stage(*answered(1, 30, tokens=40, finish_reason="stop"), repetition=1),
    ]
    (config,) = summarize(stages, GOOD)[1]
    assert config.cut_off == pytest.approx(10 / 40)
    assert config.tokens_per_question == pytest.approx((10 * 20 + 30 * 40) / 40)
    (silent,) = summarize([stage(*answered(5, 10, output_tokens=None))], GOOD)[1]
    assert silent.tokens_per_question is None


def test_where_nothing_is_right_or_counted_there_is_no_price_per_piece():
    (wrong,) = summarize([stage(*answered(0, 10))], GOOD)[1]
    assert (wrong.tokens_per_correct, wrong.seconds_per_correct, wrong.cost_per_correct) == (None, None, None)
    (silent,) = summarize([stage(*answered(5, 10, output_tokens=None))], GOOD)[1]
    assert (silent.tokens_per_correct, silent.cost_per_million_tokens) == (None, None)
    (unmarked,) = summarize([stage(question(complete()))], GOOD)[1]
    assert (unmarked.accuracy, unmarked.correct_per_second, unmarked.seconds_per_correct) == (None, None, None)


def test_a_config_has_the_entropies_of_its_replies():
    def summary(entropy: float | None, tokens: int) -> dict[str, Any]:
        return {"tokens": tokens, "optimized_tokens": 1, "missing": 0, "entropy_before": entropy, "entropy_after": 0.0}

    items = [
        question(complete(em_inf=summary(0.9, 1))),
        question(complete(em_inf=summary(0.1, 3))),
        question(complete(em_inf=summary(None, 0))),
    ]
    (config,) = summarize([stage(*items)], GOOD)[1]
    assert config.entropies == [0.1, 0.9]
    assert config.entropy_before == pytest.approx(0.3) and config.optimized_share == pytest.approx(3 / 4)
    many = [question(complete(em_inf=summary(entropy / 5000, 1))) for entropy in range(5001)]
    (config,) = summarize([stage(*many)], GOOD)[1]
    assert len(config.entropies) == 2000
    assert (config.entropies[0], config.entropies[-1]) == (0.0, 1.0)
    assert np.mean(config.entropies) == pytest.approx(0.5, abs=0.001)


# ---- Comparisons


def test_configs_are_compared_by_repetitions_that_both_have():
    stages = [
        stage(*answered(5, 10), repetition=0, seconds=10.0),
        stage(*answered(5, 10), repetition=1, seconds=5.0),
        stage(*answered(9, 10), repetition=2, seconds=1.0),
        stage(*answered(8, 10, tokens=22), config="em", repetition=1, seconds=4.0),
        stage(*answered(8, 10, tokens=22), config="em", repetition=0, seconds=10.0),
        stage(*answered(1, 10, tokens=22), config="em", repetition=2, seconds=10.0, scheduling_delays=[1.0]),
    ]
    _, _, (found,), _ = summarize(stages, GOOD)
    assert (found.config, found.reference, found.load) == ("em", "plain", "closed 2")
    assert found.answers_per_second_ratio == Interval(value=1.125, low=1.0, high=1.25)
    assert found.tokens_ratio == pytest.approx(2.0)
    expected = {
        config: {index: [index < correct] * 2 for index in range(10)} for config, correct in (("em", 8), ("plain", 5))
    }
    assert found.accuracy_difference == paired_difference(expected["em"], expected["plain"])
    assert found.accuracy_difference is not None and found.accuracy_difference.value == pytest.approx(0.3)


def test_configs_are_compared_with_the_reference_under_the_same_load():
    loads = {"closed 2": 10.0, "closed 4": 5.0}
    stages = [stage(*answered(5, 10), config=config, load=load) for config in ("plain", "em") for load in loads]
    stages.append(stage(*answered(5, 10), config="plain", load="closed 8"))
    _, configs, comparisons, _ = summarize(stages, scenario(references=("em",)))
    assert [(found.config, found.reference, found.load) for found in comparisons] == [
        ("plain", "em", "closed 2"),
        ("plain", "em", "closed 4"),
    ]
    assert len(configs) == 5


def test_without_common_repetitions_nothing_is_compared():
    stages = [stage(*answered(5, 10), repetition=0), stage(*answered(5, 10), config="em", repetition=1)]
    assert summarize(stages, GOOD)[2] == []


def test_without_answers_or_usage_the_speed_is_still_compared():
    stages = [stage(question(complete(output_tokens=None)), config=config) for config in ("plain", "em")]
    _, _, (found,), _ = summarize(stages, GOOD)
    assert found.answers_per_second_ratio.value == 1.0
    assert found.accuracy_difference is None and found.tokens_ratio is None


def test_every_config_is_compared_with_each_reference():
    scenario = GOOD.model_copy(update={"references": ("plain", "em")})
    stages = [stage(question(complete(), correct=config == "em"), config=config) for config in ("plain", "em", "vote")]
    _, _, comparisons, _ = summarize(stages, scenario)
    found = [(one.config, one.reference) for one in comparisons]
    assert found == [("em", "plain"), ("vote", "plain"), ("plain", "em"), ("vote", "em")]
    differences = [one.accuracy_difference.value for one in comparisons if one.accuracy_difference]
    assert differences == [1, 0, -1, -1]


def test_configs_are_in_the_scenarios_order():
    names = [config.name for config in GOOD.configs]
    stages = [stage(question(complete(), correct=True), config=config) for config in reversed(names)]
    _, configs, _, _ = summarize(stages, GOOD)
    assert [config.config for config in configs] == names
    assert len(names) > 1
