"""Around vLLM's engine client: each request's tokens are counted, and a strategy makes several requests of one.

All routes reach the engine by `EngineClient.generate`; it is wrapped here, once for each.
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
from em_sampler.validation import ParamsError
from em_sampler.vllm_plugin.request import params_of
from server.stats.collector import METRICS_TIMEOUT_S, RESPONSE_TIMEOUT_S, RequestStats, StatsCollector
from server.stats.metrics import Metrics
from server.strategies.run import StrategyRun

if TYPE_CHECKING:
    from server.tracing import Tracing  # only where vLLM traces

# The engine requests made for the HTTP request at hand, in order; None on a route that cannot return statistics.
request_stats_var: ContextVar[list[RequestStats] | None] = ContextVar("em_inf_tallies", default=None)
# The strategy of the HTTP request at hand.
strategy_run_var: ContextVar[StrategyRun | None] = ContextVar("em_inf_running", default=None)


async def install_stats(engine_client: EngineClient, metrics: Metrics) -> None:
    """Observe all requests to `engine_client`.

    Not where the server was not started by em-serve: then the workers know no socket to send statistics to.
    """
    place = transport.server_address()
    if not place:
        return
    statistics = StatsCollector(metrics, place, engine_client.vllm_config.parallel_config._api_process_rank)
    _number_the_samples()
    _wrap_generate(engine_client, statistics, await _tracing(engine_client))


async def _tracing(engine_client: EngineClient) -> "Tracing | None":
    if not await engine_client.is_tracing_enabled():
        return None
    from server.tracing import Tracing

    return Tracing(engine_client)


def _wrap_generate(engine_client: EngineClient, statistics: StatsCollector, tracing: "Tracing | None") -> None:
    generate = engine_client.generate

    def observed(prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any) -> AsyncIterator[Any]:
        extra_args = {k: v for k, v in (sampling_params.extra_args or {}).items() if k != RETURN_ADDRESS_KEY}
        sampling_params = copy(sampling_params)
        sampling_params.extra_args = extra_args or None  # no return address but ours
        params = _observable(sampling_params)
        if params is None:
            return generate(prompt, sampling_params, request_id, **options)
        tally = statistics.tally(params, sampling_params.n)
        wanted = request_stats_var.get()
        if wanted is not None:
            wanted.append(tally)
        if tracing:
            tracing.tallies[request_id] = tally
        waited_for = params.stats != "none" or tracing is not None
        sampling_params.extra_args = extra_args | statistics.report(tally, every_token=waited_for)
        outputs = generate(prompt, sampling_params, request_id, **options)
        return _counted(
            outputs, sampling_params, statistics, tally, RESPONSE_TIMEOUT_S if waited_for else METRICS_TIMEOUT_S
        )

    engine_client.generate = observed  # type: ignore[method-assign, assignment]


class EngineBranches:
    """The engine request that vLLM made of an HTTP request, and its copies (`branches.EngineRequest`)."""

    def __init__(
        self, client: Any, generate: Any, prompt: Any, sampling_params: SamplingParams, request_id: str
    ) -> None:
        """`client`: vLLM's AsyncLLM. `generate`: its own, the options of the request bound."""
        self.client = client
        self.generate = generate
        self.prompt = prompt
        self.sampling_params = sampling_params
        self.request_id = request_id
        self.max_logprobs: int = client.model_config.max_logprobs

    def branch(
        self, number: int, prompt: Any | None, logprobs: int, every_token: bool
    ) -> tuple[str, bool, AsyncIterator[Any], list[RequestStats]]:
        """See the protocol."""
        params = copy(self.sampling_params)
        if params.seed is not None:
            params.seed = (params.seed + number + 2**63) % 2**64 - 2**63  # within int64, as requests are
        if params.logprobs != -1:
            params.logprobs = max(params.logprobs or 0, logprobs)  # 0: of the sampled token
        if every_token:
            params.output_kind = RequestOutputKind.DELTA
        request_id, own = f"{self.request_id}-{number}", list[RequestStats]()
        token = request_stats_var.set(own)
        try:
            outputs = self.generate(self.prompt if prompt is None else prompt, params, request_id)
        finally:
            request_stats_var.reset(token)
        return request_id, params.output_kind == RequestOutputKind.DELTA, outputs, own

    async def abort(self, request_id: str) -> None:
        """See the protocol."""
        await self.client.abort(request_id)

    def failure(self, message: str) -> Exception:
        """See the protocol: HTTP 500, or an error in the stream."""
        return GenerationError(message)

    def as_own_outputs(self, outputs: list[Any]) -> list[Any]:
        """See the protocol: one after another in a stream, otherwise as one."""
        if self.sampling_params.output_kind == RequestOutputKind.DELTA:
            return outputs
        first, *others = outputs
        for other in others:
            first.add(other, aggregate=True)
        return [first]


def install_strategies(engine_client: EngineClient) -> None:
    """Let the strategy of an HTTP request, if it has one, answer for its engine request."""
    generate = engine_client.generate

    def multiplied(prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any) -> AsyncIterator[Any]:
        run = strategy_run_var.get()
        if run is None:
            return generate(prompt, sampling_params, request_id, **options)
        bound = functools.partial(generate, **options)
        try:
            return run.outputs(EngineBranches(engine_client, bound, prompt, sampling_params, request_id))
        except ParamsError as error:
            raise VLLMValidationError(str(error), parameter=error.field) from None

    engine_client.generate = multiplied  # type: ignore[method-assign, assignment]


def _observable(sampling_params: SamplingParams) -> Params | None:
    """The request's parameters, if the sampler will send records and somebody wants them."""
    try:
        params = params_of(sampling_params)
    except ParamsError:
        return None  # vLLM's validation says so
    if params and params.stats != "none" and request_stats_var.get() is None:
        return None  # the same: there is nowhere to return them
    return params


async def _counted(
    outputs: AsyncIterator[Any],
    sampling_params: SamplingParams,
    statistics: StatsCollector,
    tally: RequestStats,
    grace: float,
) -> AsyncIterator[Any]:
    """`outputs` as they are, their tokens counted."""
    delta = sampling_params.output_kind == RequestOutputKind.DELTA
    statistics.open(tally)
    try:
        async for output in outputs:
            for sample in output.outputs:
                choice = tally.choices[sample.index]
                choice.tokens = len(sample.token_ids) + (choice.tokens if delta else 0)
            if output.finished:
                statistics.finish(tally, grace)
            yield output
    finally:
        statistics.finish(tally, grace)


def _number_the_samples() -> None:
    """Samples of one request (`n`) share its extra_args: each gets a copy with its number."""
    original = ParentRequest.get_child_info

    def get_child_info(self: ParentRequest, index: int) -> tuple[str, SamplingParams]:
        request_id, params = original(self, index)
        if report := (params.extra_args or {}).get(RETURN_ADDRESS_KEY):
            channel, number, _, every_token = report
            params = copy(params)
            params.extra_args = {**(params.extra_args or {}), RETURN_ADDRESS_KEY: [channel, number, index, every_token]}
        return request_id, params

    ParentRequest.get_child_info = get_child_info  # type: ignore[method-assign]
