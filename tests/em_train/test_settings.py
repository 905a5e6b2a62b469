"""Flags: all are validated; errors name flag, value and range."""

import pytest

from em_train.prompts import InputError
from em_train.settings import FtSettings, RlSettings, SampleSettings, parse

FT = ["ft", "--model", "m", "--out", "o", "--outputs", "f"]
RL = ["rl", "--model", "m", "--out", "o", "--prompts", "f"]


def test_the_published_settings_are_the_defaults():
    ft, rl = parse(FT), parse(RL)
    assert isinstance(ft, FtSettings) and isinstance(rl, RlSettings)
    assert (ft.batch_size, ft.max_tokens, ft.steps) == (512, 4096, 40)
    assert (rl.generations, rl.beta, rl.learning_rate, rl.reward, rl.reduce) == (4, 0.001, 1e-6, "token", "sum")


def test_flags_reach_their_fields():
    settings = parse([*RL, "--reward", "sequence", "--reduce", "mean", "--bf16", "--lora-rank", "8"])
    assert isinstance(settings, RlSettings)
    assert (settings.reward, settings.reduce, settings.bf16, settings.lora_rank) == ("sequence", "mean", True, 8)
    sample = parse(["sample", "--model", "m", "--out", "o", "--prompts", "p", "--samples", "3"])
    assert isinstance(sample, SampleSettings) and sample.samples == 3


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([*FT, "--learning-rate", "0"], "--learning-rate: got '0'; input should be greater than 0"),
        ([*FT, "--learning-rate", "nan"], "--learning-rate: got 'nan'"),
        ([*FT, "--batch-size", "many"], "--batch-size: got 'many'"),
        ([*FT, "--batch-size", "6"], "--batch-size: got 6; must be a multiple of --micro-batch-size, which is 4"),
        ([*FT, "--steps", "7"], "--steps: got 7; must be a multiple of --eval-every, which is 5"),
        ([*FT, "--fresh-every", "1"], "either --outputs"),
        (FT[:5], "either --outputs"),
        ([*FT[:5], "--fresh-every", "1"], "--prompts is missing"),
        ([*FT[:5], "--prompts", "p", "--fresh-every", "2"], "--eval-every: got 5; must be a multiple of --fresh-every"),
        ([*RL, "--reward", "entropy"], "--reward: got 'entropy'; input should be 'token', 'sequence' or 'correct'"),
        ([*RL, "--generations", "1"], "--generations: got '1'; input should be greater than or equal to 2"),
        ([*RL, "--generations", "3"], "--batch-size: got 512; must be a multiple of --generations, which is 3"),
        (["sample", "--model", "m", "--out", "o"], "--prompts is missing"),
    ],
)
def test_the_error_of_a_wrong_value_names_flag_value_and_range(arguments: list[str], expected: str):
    with pytest.raises(InputError) as caught:
        parse(arguments)
    assert expected in str(caught.value)
