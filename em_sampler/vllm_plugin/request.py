"""What one vLLM request asks of the sampler. Both runners and the server read it here."""

from vllm.sampling_params import SamplingParams, SamplingType

from em_sampler.params import Params, from_extra_args


def params_of(sampling_params: SamplingParams) -> Params | None:
    """Read the request's method and parameters; None if the sampler has nothing to do.

    A greedy request keeps its token under every method, so it is left alone unless its entropies are asked for.

    Raises:
        ParamsError: (a ValueError, so that vLLM answers 400) for settings that cannot be used.
    """
    params = from_extra_args(sampling_params.extra_args)
    if params and sampling_params.sampling_type == SamplingType.GREEDY:
        return params if params.stats != "none" or params.method == "none" else None
    return params
