"""What an engine request asks of the sampler."""

from typing import Any

import pytest
from vllm import SamplingParams

from em_sampler import EMInfParams, MeasureParams
from em_sampler.params import Params
from em_sampler.validation import ParamsError
from em_sampler.vllm_plugin.request import params_in_worker, params_of


@pytest.mark.parametrize(
    ("em_inf", "sampled", "greedy"),
    [
        (None, None, None),
        ({"steps": 3}, EMInfParams(steps=3), None),
        ({"steps": 3, "stats": "tokens"}, EMInfParams(steps=3, stats="tokens"), EMInfParams(steps=3, stats="tokens")),
        ({"method": "none"}, MeasureParams(), MeasureParams()),
    ],
)
def test_a_greedy_request_is_left_alone_unless_it_is_measured(
    em_inf: dict[str, Any] | None, sampled: Params | None, greedy: Params | None
) -> None:
    extra_args = None if em_inf is None else {"em_inf": em_inf}
    assert params_of(SamplingParams(temperature=1.0, extra_args=extra_args)) == sampled
    assert params_of(SamplingParams(temperature=0.0, extra_args=extra_args)) == greedy


@pytest.mark.parametrize(
    ("extra_args", "problem"),
    [
        ({"em_inf": {"threshold": -1.0}}, "em_inf.threshold: got -1; must be"),
        ({"em_inf_method": "top_h", "em_inf_alpha": 2}, "em_inf_alpha: got 2; must be a number above 0, up to 1"),
        ({"em_inf_method": ["top_h"]}, "em_inf_method: got a list of 1 items; must be one of"),
        ({"em_inf": "yes"}, 'em_inf: got "yes"; must be'),
    ],
)
def test_params_that_nobody_has_validated_count_as_none(
    extra_args: dict[str, Any], problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An exception would end the engine."""
    params = SamplingParams(extra_args=extra_args)
    assert params_in_worker(params) is None
    assert f"sampled without a method: {problem}" in caplog.text
    caplog.clear()
    with pytest.raises(ParamsError):  # the server's side refuses the request, and says nothing of sampling
        params_of(params)
    assert not caplog.text
