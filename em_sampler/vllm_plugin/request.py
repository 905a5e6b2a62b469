"""What one engine request asks of the sampler. Both runners read it here."""

import logging

from vllm.sampling_params import SamplingParams, SamplingType

from em_sampler.params import Params, as_written, from_extra_args
from em_sampler.validation import ParamsError

logger = logging.getLogger("vllm.em_inf")  # vLLM's own handler prints it


def params_of(sampling_params: SamplingParams) -> Params | None:
    """Return the request's params, None if the sampler has nothing to do.

    A greedy request keeps its token under every method, so it is left alone unless it asks for its entropies.

    Params that cannot be used come only through a front-end that does not call `validate_params`, such as vLLM's in
    Rust. The worker can no longer refuse them, and an exception here would end the engine for all requests.
    """
    extra_args = sampling_params.extra_args or {}
    try:
        params = from_extra_args(extra_args)
    except ParamsError as error:
        logger.warning("em_inf: a request is sampled without a method: %s", as_written(error, extra_args))
        return None
    if params and sampling_params.sampling_type == SamplingType.GREEDY:
        return params if params.stats != "none" or params.method == "none" else None
    return params
