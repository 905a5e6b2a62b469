"""What an engine request asks of the sampler."""

from typing import Any

import pytest
from vllm import SamplingParams

from em_sampler import EMInfParams, MeasureParams
from em_sampler.params import Params
from em_sampler.validation import ParamsError
from em_sampler.vllm_plugin.request import params_of


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


def test_params_that_cannot_be_used_raise() -> None:
    with pytest.raises(ParamsError, match=r"em_inf\.threshold"):
        params_of(SamplingParams(extra_args={"em_inf": {"threshold": -1.0}}))
