"""The class that vLLM finds by entry point (`vllm.logits_processors`) and instantiates in the worker of either runner.

Also loaded by the frontend, with no GPU visible, to validate requests: nothing heavy happens at import.
"""

from typing import Any, ClassVar

from em_sampler.params import (
    EXTRA_ARGS_KEY,
    MAX_STEPS,
    RETURN_ADDRESS_KEY,
    EMInfParams,
    from_extra_args,
    too_many_steps_error,
)
from em_sampler.validation import ParamsError
from em_sampler.vllm_plugin.version import check_vllm_version

check_vllm_version()  # before the imports that an unsupported release may not survive

from vllm.sampling_params import SamplingParams  # noqa: E402
from vllm.v1.sample.logits_processor.interface import LogitsProcessor as V1LogitsProcessor  # noqa: E402
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as V2LogitsProcessor  # noqa: E402


def _allow_amx() -> None:
    """Linux lets no process use AMX's tiles that has not asked for them, and vLLM's attention on the CPU does not ask:
    on a machine that has them, the first token ends the worker (docs/findings/upstream.md). Harmless elsewhere.
    """
    import torch

    torch.cpu._init_amx()


class EMInfLogitsProcessor(V1LogitsProcessor, V2LogitsProcessor):  # type: ignore[misc]  # the two bases differ by design
    """Passes for a processor of both interfaces and becomes the one that its caller wants.

    The V1 runner checks for its base class and calls with (vllm_config, device, is_pin_memory); the V2 runner checks
    for its own and calls with (vllm_config, req_states).
    """

    max_steps: ClassVar[int] = MAX_STEPS  # an operator's cap, set in the frontend: it holds on every route

    def __new__(cls, vllm_config: Any, *runner: Any) -> Any:
        _allow_amx()
        if len(runner) == 2:
            from em_sampler.vllm_plugin.v1 import V1Processor

            return V1Processor(vllm_config, *runner)
        from em_sampler.vllm_plugin.v2 import V2Processor

        return V2Processor(vllm_config, *runner)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse a request whose settings cannot be used, before it reaches the engine (HTTP 400).

        The worker reads the request as it is, so a default above the cap cannot be lowered here: it is refused too.
        """
        params = from_extra_args(sampling_params.extra_args)
        if isinstance(params, EMInfParams) and params.steps > cls.max_steps:
            raise too_many_steps_error(params, cls.max_steps)
        if params and params.stats != "none" and RETURN_ADDRESS_KEY not in (sampling_params.extra_args or {}):
            problem = f"got {params.stats!r}; statistics come with em-serve's completions, chat and responses alone"
            raise ParamsError(f"{EXTRA_ARGS_KEY}.stats", problem)
