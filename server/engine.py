"""Statistics around vLLM's engine client: each request goes in with a return address, and its tokens are counted.

All routes reach the engine by `EngineClient.generate`; it is wrapped once, here.
"""

import os
from collections.abc import AsyncIterator
from contextvars import ContextVar
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.engine.protocol import EngineClient
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.parallel_sampling import ParentRequest

from em_sampler.params import REPORT_KEY, Params, ParamsError
from em_sampler.plugin import requested
from em_sampler.telemetry import FOLDER_VARIABLE
from server.metrics import Metrics
from server.stats import GRACE, LATE, Statistics, Tally

if TYPE_CHECKING:
    from server.tracing import Tracing  # only where vLLM traces

# The engine requests made for the HTTP request at hand, in order; None on a route that cannot return statistics.
tallies: ContextVar[list[Tally] | None] = ContextVar("em_inf_tallies", default=None)


async def watch(engine_client: EngineClient, metrics: Metrics) -> None:
    """Observe all requests to `engine_client`.

    Not where the server was not started by em-serve: then the workers know no socket to send statistics to.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        return
    statistics = Statistics(metrics, Path(folder))
    _number_the_samples()
    _wrap_generate(engine_client, statistics, await _tracing(engine_client))


async def _tracing(engine_client: EngineClient) -> "Tracing | None":
    if not await engine_client.is_tracing_enabled():
        return None
    from server.tracing import Tracing

    return Tracing(engine_client)


def _wrap_generate(engine_client: EngineClient, statistics: Statistics, tracing: "Tracing | None") -> None:
    generate = engine_client.generate

    def observed(prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any) -> AsyncIterator[Any]:
        extra_args = {k: v for k, v in (sampling_params.extra_args or {}).items() if k != REPORT_KEY}
        sampling_params = copy(sampling_params)
        sampling_params.extra_args = extra_args or None  # no return address but ours
        params = _observable(sampling_params)
        if params is None:
            return generate(prompt, sampling_params, request_id, **options)
        tally = statistics.tally(params, sampling_params.n)
        wanted = tallies.get()
        if wanted is not None:
            wanted.append(tally)
        if tracing:
            tracing.tallies[request_id] = tally
        waited_for = params.stats != "none" or tracing is not None
        sampling_params.extra_args = extra_args | statistics.report(tally, every_token=waited_for)
        outputs = generate(prompt, sampling_params, request_id, **options)
        return _counted(outputs, sampling_params, statistics, tally, GRACE if waited_for else LATE)

    engine_client.generate = observed  # type: ignore[method-assign, assignment]


def _observable(sampling_params: SamplingParams) -> Params | None:
    """The request's parameters, if the sampler will send records and somebody wants them."""
    try:
        params = requested(sampling_params)
    except ParamsError:
        return None  # vLLM's validation says so
    if params and params.stats != "none" and tallies.get() is None:
        return None  # the same: there is nowhere to return them
    return params


async def _counted(
    outputs: AsyncIterator[Any], sampling_params: SamplingParams, statistics: Statistics, tally: Tally, grace: float
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
        if report := (params.extra_args or {}).get(REPORT_KEY):
            channel, number, _, every_token = report
            params = copy(params)
            params.extra_args = {**(params.extra_args or {}), REPORT_KEY: [channel, number, index, every_token]}
        return request_id, params

    ParentRequest.get_child_info = get_child_info  # type: ignore[method-assign]
