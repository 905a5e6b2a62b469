"""Wraps vLLM's engine client: each request's stats are collected, and a strategy makes several requests of one.

All routes reach the engine by `EngineClient.generate`, which is wrapped here once for each purpose.
"""

import functools
from collections.abc import AsyncIterator
from contextvars import ContextVar
from copy import copy
from typing import TYPE_CHECKING, Any

from vllm.engine.protocol import EngineClient
from vllm.exceptions import GenerationError, VLLMValidationError
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.parallel_sampling import ParentRequest

from em_sampler.params import RETURN_ADDRESS_KEY, Params
from em_sampler.stats import transport
from em_sampler.stats.aggregator import ReturnAddress
from em_sampler.validation import ParamsError
from em_sampler.vllm_plugin.request import params_of
from em_sampler.vllm_plugin.transform import TRANSFORM_RPC
from server.stats.collector import METRICS_TIMEOUT_S, RESPONSE_TIMEOUT_S, RequestStats, StatsCollector
from server.stats.metrics import Metrics
from server.strategies.branches import EngineRequest
from server.strategies.run import StrategyRun

if TYPE_CHECKING:
    from server.tracing import StatsSpanProcessor  # imported only if vLLM traces

# The stats of the engine requests made for the current HTTP request, in order; None if its route cannot return them.
request_stats_var: ContextVar[list[RequestStats] | None] = ContextVar("em_inf_request_stats", default=None)
# The strategy of the current HTTP request.
strategy_run_var: ContextVar[StrategyRun | None] = ContextVar("em_inf_strategy_run", default=None)


async def ask_for_transforms(engine_client: EngineClient) -> list[dict[str, str]]:
    """Return the transforms of the workers that sample, each once: {"transform": its name, "device": its type}.

    Of several data-parallel engines, vLLM asks the first.
    """
    answers: list[dict[str, str] | None] = await engine_client.collective_rpc(TRANSFORM_RPC)
    return [dict(each) for each in sorted({tuple(answer.items()) for answer in answers if answer})]


async def install_stats(engine_client: EngineClient, metrics: Metrics) -> None:
    """Collect the stats of all requests to `engine_client`.

    Does nothing if the server was not started by em-serve: then the workers know no address to send stats to.
    """
    server_address = transport.server_address()
    if not server_address:
        return
    server_index = engine_client.vllm_config.parallel_config._api_process_rank
    collector = StatsCollector(metrics, server_address, server_index)
    _number_choices()
    _wrap_generate(engine_client, collector, await _span_processor(engine_client))


async def _span_processor(engine_client: EngineClient) -> "StatsSpanProcessor | None":
    if not await engine_client.is_tracing_enabled():
        return None
    from server.tracing import StatsSpanProcessor

    return StatsSpanProcessor(engine_client)


def _wrap_generate(
    engine_client: EngineClient, collector: StatsCollector, span_processor: "StatsSpanProcessor | None"
) -> None:
    generate = engine_client.generate

    def generate_with_stats(
        prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncIterator[Any]:
        extra_args = {k: v for k, v in (sampling_params.extra_args or {}).items() if k != RETURN_ADDRESS_KEY}
        sampling_params = copy(sampling_params)
        sampling_params.extra_args = extra_args or None  # a client's return address is removed
        params = _params_to_track(sampling_params)
        if params is None:
            return generate(prompt, sampling_params, request_id, **options)
        stats = collector.new_request(params, sampling_params.n)
        returned_stats = request_stats_var.get()
        if returned_stats is not None:
            returned_stats.append(stats)
        if span_processor:
            span_processor.request_stats[request_id] = stats
        # Otherwise only the metrics need the stats, which can wait for totals.
        per_token = params.stats != "none" or span_processor is not None
        sampling_params.extra_args = extra_args | collector.return_address(stats, per_token).to_extra_args()
        outputs = generate(prompt, sampling_params, request_id, **options)
        is_delta = sampling_params.output_kind == RequestOutputKind.DELTA
        timeout_s = RESPONSE_TIMEOUT_S if per_token else METRICS_TIMEOUT_S
        return _count_tokens(outputs, is_delta, collector, stats, timeout_s)

    engine_client.generate = generate_with_stats  # type: ignore[method-assign, assignment]


class EngineBranches(EngineRequest):
    """The engine request that vLLM made of an HTTP request, and the branches of a strategy, which are its copies."""

    def __init__(
        self, client: Any, generate: Any, prompt: Any, sampling_params: SamplingParams, request_id: str
    ) -> None:
        """`client`: vLLM's AsyncLLM. `generate`: its method, with the request's options bound."""
        self.client = client
        self.generate = generate
        self.prompt = prompt
        self.sampling_params = sampling_params
        self.request_id = request_id
        self.max_logprobs: int = client.model_config.max_logprobs

    def branch(
        self, number: int, prompt: Any | None, logprobs: int, every_token: bool
    ) -> tuple[str, bool, AsyncIterator[Any], list[RequestStats]]:
        """Send a copy of the request to the engine, with a seed, an id and a stats list that no other branch has."""
        params = copy(self.sampling_params)
        if params.seed is not None:
            params.seed = (params.seed + number + 2**63) % 2**64 - 2**63  # within int64, as vLLM requires
        if params.logprobs != -1:  # -1: of the complete vocabulary
            params.logprobs = max(params.logprobs or 0, logprobs)  # 0: of the sampled token
        if every_token:
            params.output_kind = RequestOutputKind.DELTA
        request_id, branch_stats = f"{self.request_id}-{number}", list[RequestStats]()
        token = request_stats_var.set(branch_stats)
        try:
            outputs = self.generate(self.prompt if prompt is None else prompt, params, request_id)
        finally:
            request_stats_var.reset(token)
        return request_id, params.output_kind == RequestOutputKind.DELTA, outputs, branch_stats

    async def abort(self, request_id: str) -> None:
        """End a branch in the engine. Its last output has the finish reason "abort"."""
        await self.client.abort(request_id)

    def failure(self, message: str) -> Exception:
        """Make the exception that vLLM answers with HTTP 500, or with an error in the stream."""
        return GenerationError(message)

    def as_own_outputs(self, outputs: list[Any]) -> list[Any]:
        """Return a branch's outputs as they are for a stream, and merged into one otherwise."""
        if self.sampling_params.output_kind == RequestOutputKind.DELTA:
            return outputs
        first, *others = outputs
        for other in others:
            first.add(other, aggregate=True)
        return [first]


def install_strategies(engine_client: EngineClient) -> None:
    """Wrap `generate`: a request with a strategy is answered by the strategy's branches."""
    generate = engine_client.generate

    def generate_branches(
        prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncIterator[Any]:
        run = strategy_run_var.get()
        if run is None:
            return generate(prompt, sampling_params, request_id, **options)
        bound = functools.partial(generate, **options)
        try:
            return run.outputs(EngineBranches(engine_client, bound, prompt, sampling_params, request_id))
        except ParamsError as error:
            raise VLLMValidationError(str(error), parameter=error.field) from None

    engine_client.generate = generate_branches  # type: ignore[method-assign, assignment]


def _params_to_track(sampling_params: SamplingParams) -> Params | None:
    """Return the request's params if its stats are to be collected, None otherwise or if vLLM will reject it."""
    try:
        params = params_of(sampling_params)
    except ParamsError:
        return None
    if params and params.stats != "none" and request_stats_var.get() is None:
        return None  # the route cannot return them: EMInfLogitsProcessor.validate_params raises
    return params


async def _count_tokens(
    outputs: AsyncIterator[Any], is_delta: bool, collector: StatsCollector, stats: RequestStats, timeout_s: float
) -> AsyncIterator[Any]:
    """Yield `outputs` unchanged while their tokens are counted; the stats are in flight meanwhile."""
    collector.start(stats)
    try:
        async for output in outputs:
            for completion in output.outputs:
                choice = stats.choices[completion.index]
                choice.tokens = len(completion.token_ids) + (choice.tokens if is_delta else 0)
            if output.finished:
                collector.finish(stats, timeout_s)
            yield output
    finally:
        collector.finish(stats, timeout_s)


def _number_choices() -> None:
    """Give each choice of a request (`n`) its own return address; vLLM has them share `extra_args`."""
    original = ParentRequest.get_child_info

    def get_child_info(self: ParentRequest, index: int) -> tuple[str, SamplingParams]:
        request_id, params = original(self, index)
        if return_address := ReturnAddress.from_extra_args(params.extra_args):
            params = copy(params)
            params.extra_args = (params.extra_args or {}) | return_address._replace(choice=index).to_extra_args()
        return request_id, params

    ParentRequest.get_child_info = get_child_info  # type: ignore[method-assign]
