"""Which params can be requested, in both forms, and what the errors say."""

import math
from typing import Any

import pytest

from em_sampler import AdaptiveTemperatureParams, EMInfParams, ParamsError
from em_sampler.params import (
    METHODS,
    RETURN_ADDRESS_KEY,
    MeasureParams,
    PLessParams,
    flat_keys,
    from_extra_args,
    parse_params,
    with_step_limit,
)

DEFAULT = EMInfParams(threshold=0.7, steps=9)


@pytest.mark.parametrize(
    ("value", "params"),
    [
        (None, DEFAULT),
        (True, DEFAULT),
        (False, None),
        ({}, EMInfParams()),
        ({"threshold": 1, "steps": 0}, EMInfParams(threshold=1.0, steps=0)),
        ({"method": "adaptive_temperature", "ratio": 0.2}, AdaptiveTemperatureParams(ratio=0.2)),
        ({"steps": 5.0}, EMInfParams(steps=5)),
        ({"method": "none"}, MeasureParams()),
        ({"method": "none", "stats": "tokens"}, MeasureParams(stats="tokens")),
        ({"stats": "summary"}, EMInfParams(stats="summary")),
        ({"stats": "summary", "top": 0}, EMInfParams(stats="summary")),
        ({"top": 20, "stats": "tokens"}, EMInfParams(stats="tokens", top=20)),
        ({"method": "adaptive_temperature", "stats": "none"}, AdaptiveTemperatureParams()),
        (AdaptiveTemperatureParams(), AdaptiveTemperatureParams()),
        (MeasureParams(), MeasureParams()),
    ],
)
def test_every_form_is_parsed(value: object, params: object) -> None:
    assert parse_params(value, DEFAULT) == params


def test_true_without_a_default_is_the_published_setting() -> None:
    published = EMInfParams(threshold=0.3, steps=5, learning_rate=0.1, kl_weight=0.001, optimizer="adam")
    assert parse_params(True) == published
    assert parse_params(None) is None


@pytest.mark.parametrize("method", METHODS)
def test_no_method_returns_stats_unless_they_are_requested(method: str) -> None:
    params = parse_params({"method": method})
    requested = parse_params({"method": method, "stats": "tokens"})
    assert params is not None and params.stats == "none"
    assert requested is not None and requested.stats == "tokens" and requested != params


@pytest.mark.parametrize(
    ("value", "field", "texts"),
    [
        ({"threshold": 20.5}, "em_inf.threshold", ["20.5", "from 0 up to 20"]),
        ({"threshold": -0.1}, "em_inf.threshold", ["-0.1", "from 0 up to 20"]),
        ({"threshold": math.nan}, "em_inf.threshold", ["NaN", "from 0 up to 20"]),
        ({"threshold": math.inf}, "em_inf.threshold", ["Infinity", "from 0 up to 20"]),
        ({"threshold": True}, "em_inf.threshold", ["true", "a number"]),
        ({"threshold": "0.3"}, "em_inf.threshold", ['"0.3"', "a number"]),
        ({"threshold": None}, "em_inf.threshold", ["null", "a number"]),
        ({"threshold": 10**400}, "em_inf.threshold", ["a huge integer", "a number"]),
        ({"\ud800": 1}, "em_inf.\\ud800", ["unknown field"]),
        ({"steps": 65}, "em_inf.steps", ["65", "an integer from 0 up to 64"]),
        ({"steps": 2.5}, "em_inf.steps", ["2.5", "an integer"]),
        ({"steps": {"a": [[]]}}, "em_inf.steps", ["an object of 1 items", "an integer"]),
        ({"learning_rate": 0}, "em_inf.learning_rate", ["0", "above 0, up to 10"]),
        ({"kl_weight": 11}, "em_inf.kl_weight", ["11", "from 0 up to 10"]),
        ({"optimizer": "lion"}, "em_inf.optimizer", ['"lion"', "adam, sgd"]),
        ({"method": "magic"}, "em_inf.method", ['"magic"', "em_inf, adaptive_temperature, none"]),
        ({"method": ["em_inf"]}, "em_inf.method", ["a list of 1 items"]),
        ({"stats": "all"}, "em_inf.stats", ['"all"', "one of none, summary, tokens"]),
        ({"stats": True}, "em_inf.stats", ["true", "one of none, summary, tokens"]),
        ({"stats": None}, "em_inf.stats", ["null", "one of none, summary, tokens"]),
        ({"stats": "tokens", "top": 21}, "em_inf.top", ["21", "an integer from 0 up to 20"]),
        ({"stats": "tokens", "top": -1}, "em_inf.top", ["-1", "an integer from 0 up to 20"]),
        ({"top": 3}, "em_inf.top", ["3", "0 without", '"tokens"']),
        ({"method": "top_h", "stats": "summary", "top": 3}, "em_inf.top", ["3", "0 without", '"tokens"']),
        ({"method": "none", "stats": "all"}, "em_inf.stats", ['"all"', "none, summary, tokens"]),
        ({"method": "none", "threshold": 0.3}, "em_inf.threshold", ["unknown field", "stats, top, method"]),
        ({"method": None}, "em_inf.method", ["null", "one of"]),
        ({"treshold": 0.3}, "em_inf.treshold", ["unknown field", "threshold"]),
        ({"ratio": 0.3}, "em_inf.ratio", ["unknown field", "threshold"]),
        ({7: 0.3}, "em_inf.7", ["unknown field"]),
        ({"method": "adaptive_temperature", "steps": 3}, "em_inf.steps", ["unknown field", "ratio"]),
        ({"method": "adaptive_temperature", "ratio": 1.1}, "em_inf.ratio", ["1.1", "from 0 up to 1"]),
        ({"method": "adaptive_temperature", "min_temperature": 3}, "em_inf", ["3 is above max_temperature 1"]),
        ("x" * 10**6, "em_inf", ["xxx...", "an object, true or false"]),
        ([1] * 10**6, "em_inf", ["a list of 1000000 items"]),
        (1, "em_inf", ["1", "true or false"]),
    ],
)
def test_errors_name_the_field_the_value_and_the_range(value: Any, field: str, texts: list[str]) -> None:
    with pytest.raises(ParamsError) as caught:
        parse_params(value)
    message = str(caught.value)
    assert caught.value.field == field
    assert message.startswith(f"{field}: ")
    assert len(message) < 250
    for text in texts:
        assert text in message


@pytest.mark.parametrize(
    ("extra_args", "params"),
    [
        (None, DEFAULT),
        ({}, DEFAULT),
        ({"other": 3}, DEFAULT),
        ({"em_inf": {"steps": 3}}, EMInfParams(steps=3)),
        ({"em_inf": True}, DEFAULT),
        ({"em_inf": 1}, DEFAULT),  # what vLLM's vllm_xargs turns true into
        ({"em_inf": 0}, None),
        ({"em_inf_steps": 3, "em_inf_threshold": 0.5}, EMInfParams(steps=3, threshold=0.5)),
        ({"em_inf": 1, "em_inf_steps": 3}, EMInfParams(steps=3)),
        ({"em_inf_method": "adaptive_temperature"}, AdaptiveTemperatureParams()),
        ({"em_inf_method": "none", "em_inf_stats": "summary"}, MeasureParams(stats="summary")),
        ({"em_inf": {"stats": "tokens"}, RETURN_ADDRESS_KEY: [1]}, EMInfParams(stats="tokens")),  # not a setting
    ],
)
def test_extra_args_are_read_in_both_forms(extra_args: dict[str, Any] | None, params: object) -> None:
    assert from_extra_args(extra_args, DEFAULT) == params


@pytest.mark.parametrize(
    ("extra_args", "field"),
    [
        ({"em_inf_threshold": "high"}, "em_inf_threshold"),
        ({"em_inf_thresold": 0.3}, "em_inf_thresold"),
        ({"em_inf": {}, "em_inf_steps": 3}, "em_inf"),
        ({"em_inf": False, "em_inf_steps": 3}, "em_inf"),
        ({"em_inf": 2}, "em_inf"),
    ],
)
def test_extra_args_that_cannot_be_used_are_refused(extra_args: dict[str, Any], field: str) -> None:
    with pytest.raises(ParamsError) as caught:
        from_extra_args(extra_args)
    assert caught.value.field == field


@pytest.mark.parametrize(("value", "wanted"), [(1, True), (0, False), (True, True), (False, False)])
def test_a_flat_boolean_may_be_a_number(value: object, wanted: bool) -> None:
    """Numbers are what `vllm_xargs` makes of JSON's true and false."""
    assert from_extra_args({"em_inf_method": "p_less", "em_inf_normalized": value}) == PLessParams(normalized=wanted)


OUT_OF_RANGE = {
    "p_less": ("normalized", "yes", "true or false"),
    "top_h": ("alpha", 0, "a number above 0, up to 1"),
    "top_n_sigma": ("n", 20.5, "a number above 0, up to 20"),
    "greedy_below": ("p_max", 1.5, "a number above 0, up to 1"),
}


@pytest.mark.parametrize("method", OUT_OF_RANGE)
def test_a_value_out_of_range_is_named_with_the_range(method: str) -> None:
    field, value, allowed = OUT_OF_RANGE[method]
    with pytest.raises(ParamsError, match=rf"em_inf\.{field}: got .*{value}.*; must be {allowed}"):
        parse_params({"method": method, field: value})
    assert parse_params({"method": method}) == METHODS[method]()


def test_unknown_flat_names_end_the_reading() -> None:
    """At most 32 of them are copied, however many a client sends, and an unknown one is always among those."""
    known = [f"em_inf_{name}" for model in METHODS.values() for name in model.model_fields]
    many = dict.fromkeys([*known, *(f"em_inf_x{number}" for number in range(1000))], 1)
    assert len(flat_keys(many)) == 32 > len(set(known))
    with pytest.raises(ParamsError, match=r"^em_inf_x0: unknown field"):
        from_extra_args({f"em_inf_x{number}": 1 for number in range(1000)})


def test_a_step_limit_lowers_defaults_and_refuses_requests() -> None:
    assert with_step_limit(EMInfParams(threshold=0.5), 3) == EMInfParams(threshold=0.5, steps=3)
    assert with_step_limit(EMInfParams(steps=3), 3) == EMInfParams(steps=3)
    assert with_step_limit(AdaptiveTemperatureParams(), 0) == AdaptiveTemperatureParams()
    assert with_step_limit(MeasureParams(), 0) == MeasureParams()
    assert with_step_limit(EMInfParams(stats="tokens"), 3) == EMInfParams(stats="tokens", steps=3)
    assert with_step_limit(None, 0) is None
    with pytest.raises(ParamsError, match=r"em_inf\.steps: got 4; .* 0 up to 3"):
        with_step_limit(EMInfParams(steps=4), 3)
