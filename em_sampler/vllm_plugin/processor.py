"""The class that vLLM finds by entry point (`vllm.logits_processors`) and instantiates in the worker of either runner.

The frontend loads it too, with no GPU visible, to validate requests: nothing heavy happens at import.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from em_sampler.params import (
    EXTRA_ARGS_KEY,
    MAX_STEPS,
    RETURN_ADDRESS_KEY,
    EMInfParams,
    as_written,
    from_extra_args,
    too_many_steps_error,
)
from em_sampler.validation import ParamsError, shorten
from em_sampler.vllm_plugin.version import check_vllm_version

check_vllm_version()  # before the imports, which may fail on an unsupported release

from vllm.exceptions import VLLMValidationError  # noqa: E402
from vllm.sampling_params import SamplingParams  # noqa: E402
from vllm.v1.sample.logits_processor.interface import LogitsProcessor as V1LogitsProcessor  # noqa: E402
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as V2LogitsProcessor  # noqa: E402


def _allow_amx() -> None:
    """Ask Linux for AMX's tiles, which vLLM's attention on the CPU uses without asking (docs/findings/upstream.md).

    Without this, the first token kills the worker on a CPU that has AMX. Harmless on others.
    """
    import torch

    torch.cpu._init_amx()


class EMInfLogitsProcessor(V1LogitsProcessor, V2LogitsProcessor):  # type: ignore[misc]  # the two bases differ by design
    """The class behind our entry point: a subclass of both runners' interfaces, which each runner checks for.

    The V1 runner calls it with (vllm_config, device, is_pin_memory), the V2 runner with (vllm_config, req_states).
    """

    max_steps: ClassVar[int] = MAX_STEPS  # the operator's limit on every route, set in the frontend
    seeds_end_engine: ClassVar[bool] = False  # server/guards.py; set in the frontend

    def __new__(cls, vllm_config: Any, *args: Any) -> Any:
        """Make the calling runner's processor: the number of arguments shows which runner it is."""
        _allow_amx()
        if len(args) == 2:
            from em_sampler.vllm_plugin.v1 import V1Processor

            return V1Processor(vllm_config, *args)
        from em_sampler.vllm_plugin.v2 import V2Processor

        return V2Processor(vllm_config, *args)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Reject a request whose params cannot be used, before it reaches the engine.

        A default above the limit is rejected too: the worker reads the request as it is, so it cannot be lowered here.

        Raises:
            VLLMValidationError: if the params cannot be used; vLLM answers with HTTP 400, whose `param` is the field.
        """
        if cls.seeds_end_engine and sampling_params.seed is not None:
            problem = f"got {sampling_params.seed}; must be left out: with chunked prefill it would end the engine"
            problem += " (the server's flag --no-enable-chunked-prefill allows it)"
            raise VLLMValidationError(f"seed: {problem}", parameter="body.seed")
        extra_args = sampling_params.extra_args or {}
        try:
            cls._check(extra_args)
        except ParamsError as error:
            written = as_written(error, extra_args)
            raise VLLMValidationError(str(written), parameter=f"body.vllm_xargs.{written.field}") from None

    @classmethod
    def _check(cls, extra_args: Mapping[str, Any]) -> None:
        params = from_extra_args(extra_args)
        if isinstance(params, EMInfParams) and params.steps > cls.max_steps:
            raise too_many_steps_error(params, cls.max_steps)
        if params and params.stats != "none" and RETURN_ADDRESS_KEY not in extra_args:
            problem = f"got {shorten(params.stats)}; statistics come with em-serve's completions, chat and responses"
            raise ParamsError(f"{EXTRA_ARGS_KEY}.stats", f"{problem} alone")
