"""What one engine request asks of the sampler. Both runners and the server read it here."""

import logging

from vllm.sampling_params import SamplingParams, SamplingType

from em_sampler.params import Params, as_written, from_extra_args
from em_sampler.validation import ParamsError

logger = logging.getLogger("vllm.em_inf")  # vLLM's own handler prints it


def params_of(sampling_params: SamplingParams) -> Params | None:
    """Return the request's params, None if the sampler has nothing to do.

    A greedy request keeps its token under every method, so it is left alone unless it asks for its entropies.

    Raises:
        ParamsError: if the params cannot be used (a ValueError, so that vLLM answers with HTTP 400).
    """
    params = from_extra_args(sampling_params.extra_args)
    if params and sampling_params.sampling_type == SamplingType.GREEDY:
        return params if params.stats != "none" or params.method == "none" else None
    return params


def params_in_worker(sampling_params: SamplingParams) -> Params | None:
    """Return the same in a worker: params that cannot be used count as none, with a warning.

    They come only through a front-end that does not call `validate_params`, such as vLLM's in Rust. The worker can no
    longer refuse them, and an exception would end the engine for all requests.
    """
    try:
        return params_of(sampling_params)
    except ParamsError as error:
        problem = as_written(error, sampling_params.extra_args or {})
        logger.warning("em_inf: a request is sampled without a method: %s", problem)
        return None
