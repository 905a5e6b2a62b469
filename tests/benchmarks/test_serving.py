"""The parts of the serving benchmark that need no server: intervals of known ratios, arms, and written models."""

import numpy as np
import pytest
from transformers import AutoConfig, AutoTokenizer

from benchmarks import dummy
from benchmarks.ratios import interval, paired, spread
from benchmarks.serving import ARMS, ON, PLAIN, Turn, bodies, prompts_of, rates_of
from em_sampler.params import EMInfParams, parse_params


def rounds(ratio, count=30, noise=0.05):
    """Rates of two arms in rounds that differ by much more than the arms do."""
    rng = np.random.default_rng(1)
    base = 1000 * np.exp(rng.normal(0, 0.5, count))
    return base * ratio * np.exp(rng.normal(0, noise, count)), base


def test_interval_of_equal_arms_includes_1():
    low, high = interval(paired(*rounds(1.0)))
    assert low < 1 < high and high - low < 0.06


def test_interval_of_a_slower_arm_excludes_1_and_holds_its_ratio():
    low, high = interval(paired(*rounds(0.9)))
    assert low < 0.9 < high < 0.95


def test_interval_without_noise_is_the_ratio():
    assert interval([0.9] * 5) == pytest.approx((0.9, 0.9))


def test_interval_covers_the_ratio_about_as_often_as_it_says():
    rng = np.random.default_rng(2)
    intervals = [interval(np.exp(rng.normal(0, 0.1, 20))) for _ in range(200)]
    assert 0.88 <= np.mean([low <= 1 <= high for low, high in intervals]) <= 0.99


def test_interval_knows_that_starts_differ():
    """Rounds that agree within each of four starts say little where the starts do not agree."""
    rng = np.random.default_rng(3)
    ratios = np.exp(np.repeat([0.05, -0.04, 0.06, -0.05], 12) + rng.normal(0, 0.01, 48))
    low, high = interval(ratios, starts=4)
    assert low < 0.98 and high > 1.02
    assert np.subtract(*interval(ratios)[::-1]) < 0.6 * (high - low)


def test_spread_shows_median_lowest_and_highest():
    assert spread([3.0, 1.0, 2.04], 1) == "2.0 (1.0 to 3.0)"


def test_rates_leave_the_warm_up_out():
    turns = [Turn(4, -1, ON, 1.0), Turn(4, 0, ON, 2.0), Turn(4, 0, PLAIN, 3.0), Turn(1, 0, ON, 4.0)]
    assert rates_of(turns, 4, ON) == [2.0]


def test_arms_differ_in_nothing_but_em_inf():
    prompts = prompts_of("demo", 3)
    requests = {name: bodies("demo", arm, prompts, 16, 0) for name, arm in ARMS.items()}
    for name, arm in ARMS.items():
        assert [body.pop("em_inf", None) is None for body in requests[name]] == [arm.em_inf is None] * 3
    assert all(each == requests[PLAIN] for each in requests.values())


def test_on_is_the_published_defaults_without_statistics():
    (body,) = bodies("demo", ARMS[ON], [[1]], 16, 0)
    assert parse_params(body["em_inf"]) == EMInfParams()


def test_seeds_are_distinct_within_and_across_rounds():
    seeds = [body["seed"] for number in range(-1, 3) for body in bodies("demo", ARMS[ON], [[1]] * 4, 16, number)]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("size", dummy.SIZES)
def test_a_written_model_loads_and_is_as_large_as_its_vocabulary(size, tmp_path):
    dummy.write_model(tmp_path, size)
    config, tokenizer = AutoConfig.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert config.architectures == ["Qwen2ForCausalLM"]
    assert config.vocab_size == len(tokenizer) == dummy.SIZES[size]["vocab_size"]
    assert tokenizer.decode(tokenizer("a + b").input_ids) == "a + b"
    assert all(0 < token < config.vocab_size for prompt in prompts_of(size, 4) for token in prompt)
