"""Wraps vLLM's engine client: each request's stats are collected, and a strategy makes several requests of one.

All routes reach the engine by `EngineClient.generate`, which is wrapped here once for each purpose.
"""

import asyncio
import functools
import uuid
from collections.abc import AsyncIterator
from contextvars import ContextVar
from copy import copy
from typing import TYPE_CHECKING, Any

import msgspec
from vllm.engine.protocol import EngineClient
from vllm.exceptions import GenerationError, VLLMValidationError
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.outputs import LogprobsLists

from em_sampler.params import RETURN_ADDRESS_KEY, Params
from em_sampler.stats import transport
from em_sampler.stats.aggregator import ReturnAddress
from em_sampler.validation import ParamsError
from em_sampler.vllm_plugin.request import params_of
from em_sampler.vllm_plugin.transform import TRANSFORM_RPC
from server.stats.collector import METRICS_TIMEOUT_S, RESPONSE_TIMEOUT_S, RequestStats, StatsCollector
from server.stats.metrics import Metrics
from server.strategies.branches import EngineRequest, confidence
from server.strategies.run import StrategyRun

if TYPE_CHECKING:
    from server.tracing import StatsSpanProcessor  # imported only if vLLM traces

MAX_FIELD_BYTES = 64 * 1024  # of a field of a request with a strategy: each branch sends the engine a copy
REQUEST_FIELDS = {  # of vLLM's chat request, by the engine request's field if that has another name
    "extra_args": "vllm_xargs",
    "_bad_words_token_ids": "bad_words",
    "_all_stop_token_ids": "stop_token_ids",
}

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
    _wrap_generate(engine_client, collector, await _span_processor(engine_client, collector))


async def _span_processor(engine_client: EngineClient, collector: StatsCollector) -> "StatsSpanProcessor | None":
    if not await engine_client.is_tracing_enabled():
        return None
    from server.tracing import StatsSpanProcessor

    return StatsSpanProcessor(engine_client, collector.requests)


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
        self.logprobs_mode: str = client.model_config.logprobs_mode
        asked = (sampling_params.num_logprobs, sampling_params.prompt_logprobs)
        self.returns_logprobs = asked != (None, None)

    def branch(
        self, number: int, prompt: Any | None, logprobs: int, every_token: bool
    ) -> tuple[str, bool, AsyncIterator[Any], list[RequestStats]]:
        """Send a copy of the request to the engine, with a seed, an id and a stats list that no other branch has.

        vLLM aborts all requests that have an id; a client may have chosen that of its request, or this one's.
        """
        params = copy(self.sampling_params)
        if params.seed is not None:
            params.seed = (params.seed + number + 2**63) % 2**64 - 2**63  # within int64, as vLLM requires
        if params.logprobs != -1 and not params.logprob_token_ids:  # -1: of the complete vocabulary
            params.logprobs = max(params.logprobs or 0, logprobs)  # 0: of the sampled token
        params.flat_logprobs = not self.returns_logprobs  # see ConfidenceProcessor
        if every_token:
            params.output_kind = RequestOutputKind.DELTA
        request_id, branch_stats = f"{self.request_id}-{number}-{uuid.uuid4().hex}", list[RequestStats]()
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

    def collect(self, outputs: list[Any], output: Any) -> None:
        """Add a branch's next output: as it is for a stream, joined to the one before otherwise."""
        if not self.returns_logprobs:
            output.outputs[0].logprobs = None
        if outputs and self.sampling_params.output_kind != RequestOutputKind.DELTA:
            outputs[0].add(output, aggregate=True)
        else:
            outputs.append(output)


def install_strategies(engine_client: EngineClient) -> None:
    """Wrap `generate`: a request with a strategy is answered by the strategy's branches."""
    keep_confidence_alone()
    give_turns(engine_client)
    generate = engine_client.generate

    def generate_branches(
        prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncIterator[Any]:
        run = strategy_run_var.get()
        if run is None:
            return generate(prompt, sampling_params, request_id, **options)
        bound = functools.partial(generate, **options)
        try:
            check_field_sizes(sampling_params)
            return run.outputs(EngineBranches(engine_client, bound, prompt, sampling_params, request_id))
        except ParamsError as error:
            raise VLLMValidationError(str(error), parameter=error.field) from None

    engine_client.generate = generate_branches  # type: ignore[method-assign, assignment]


class ConfidenceProcessor(LogprobsProcessor):
    """Keeps the sum of the sampled tokens' log-probabilities, and each token's confidence as its `logprobs`.

    vLLM's own decodes all candidates of each token to text, which costs an API server more than all else that it does
    for a token, and keeps 3 kB for each until the request ends. Nobody reads them if the client did not ask for them.
    """

    def _update_sample_logprobs(self, logprobs_lists: LogprobsLists) -> None:
        kept: list[Any] = self.logprobs  # type: ignore[assignment]  # vLLM slices and joins them alone
        assert self.num_logprobs is not None and self.cumulative_logprob is not None
        for sampled, *candidates in logprobs_lists.logprobs.tolist():
            self.cumulative_logprob += sampled
            if self.num_logprobs:  # the row has as many as any request of the batch asked for
                kept.append(confidence(candidates[: self.num_logprobs]))


def keep_confidence_alone() -> None:
    """Have vLLM use `ConfidenceProcessor` for requests with `flat_logprobs`, which no HTTP request can set."""
    original = LogprobsProcessor.from_new_request

    def from_new_request(tokenizer: Any, request: Any) -> LogprobsProcessor:
        params = request.sampling_params
        if not params.flat_logprobs:
            return original(tokenizer, request)
        return ConfidenceProcessor(None, [], None, 0.0, params.num_logprobs, None)

    LogprobsProcessor.from_new_request = from_new_request  # type: ignore[method-assign]


def give_turns(engine_client: Any) -> None:
    """Let the event loop run what else is ready before it takes a step's outputs from the engine.

    vLLM's output handler does not wait if it is slower than a step: nothing else would run until the engine is idle.
    """
    engine_core = engine_client.engine_core
    get_output = engine_core.get_output_async

    async def get_output_after_a_turn() -> Any:
        await asyncio.sleep(0)
        return await get_output()

    engine_core.get_output_async = get_output_after_a_turn


def check_field_sizes(sampling_params: SamplingParams) -> None:
    """Check what is sent to the engine once for each branch.

    Raises:
        ParamsError: if a field is too large.
    """
    for name in sampling_params.__struct_fields__:
        size = len(msgspec.msgpack.encode(getattr(sampling_params, name), enc_hook=repr))
        if size > MAX_FIELD_BYTES:
            problem = f"got {size} bytes; at most {MAX_FIELD_BYTES} with a strategy: each branch has a copy"
            raise ParamsError(f"body.{REQUEST_FIELDS.get(name, name)}", problem)


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
