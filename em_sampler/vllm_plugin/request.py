"""What one engine request asks of the sampler. Both runners and the server read it here."""

from vllm.sampling_params import SamplingParams, SamplingType

from em_sampler.params import Params, from_extra_args


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
